"""The tutorial's disk is what the tutorial says it is."""

from __future__ import annotations

import re
import types

import pytest

from storvsp.disks.specs import DiskSpec
from storvsp.testing import check_disk
from tests.support.house import ROOT

TUTORIAL = ROOT / "docs/tutorials/first-disk.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)


def load(source: str) -> types.ModuleType:
    module = types.ModuleType("chess")
    exec(compile(source, "chess.py", "exec"), module.__dict__)
    return module


async def test_the_disk_as_first_written_fails_with_the_message_that_is_printed():
    chess = load(blocks("python")[0])
    printed = re.search(r"^AssertionError: (.*)$", TUTORIAL.read_text(), re.MULTILINE)
    assert printed is not None
    with pytest.raises(AssertionError, match=re.escape(printed[1])):
        await check_disk(lambda: chess.open_spec(DiskSpec.parse("chess:1M")))


async def test_the_disk_with_the_correction_keeps_the_contract():
    first, correction = blocks("python")
    closing = correction.split("\n\n")[0]
    check = correction.split("\n\n")[1].replace("        ...\n", "")
    source = (
        first.replace("import Disk,", "import DiskUnavailableError, Disk,")
        .replace(
            "        self._written = {}\n",
            "        self._written = {}\n        self._closed = False\n",
        )
        .replace("    async def aclose(self):\n        self._written.clear()\n", closing + "\n")
        .replace("    def _check(self, offset, length):\n", check)
    )
    assert source.count("self._closed") == 3
    chess = load(source)
    await check_disk(lambda: chess.open_spec(DiskSpec.parse("chess:1M")))
    with pytest.raises(ValueError, match="multiple of 512"):
        await chess.open_spec(DiskSpec.parse("chess:100"))
