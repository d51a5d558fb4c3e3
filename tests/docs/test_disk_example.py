"""The example of docs/howto/write-a-disk.md works as it is printed there."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from storvsp.disk import ReadOnlyError
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import DISKS, open_disk
from storvsp.testing import check_disk
from tests.support.docstrings import public_members, signature
from tests.support.house import ROOT
from tests.support.leaks import open_descriptors
from vmbus.errors import ConfigError
from vmbus.plugins.specs import OptionReader

HOWTO = ROOT / "docs" / "howto"


@pytest.fixture
def example(monkeypatch):
    """Import the example and register it as its entry point would."""
    location = importlib.util.spec_from_file_location("example_disk", HOWTO / "example_disk.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    monkeypatch.setitem(sys.modules, "example_disk", module)
    location.loader.exec_module(module)
    installed = importlib.metadata.entry_points(group=DISKS.group)
    point = importlib.metadata.EntryPoint("concat", "example_disk:open_spec", DISKS.group)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: importlib.metadata.EntryPoints([*installed, point]),
    )
    return module


@pytest.mark.parametrize(
    "parts",
    ["ram:1M", "ram:1M+ram:[sector=512]3M", "ram:512+ram:1K+ram:64K", "overlay:ram:1M+ram:1M"],
)
async def test_the_example_keeps_the_contract(example, parts):
    await check_disk(lambda: open_disk(f"concat:{parts}"))


async def test_the_example_keeps_the_contract_over_files(example, tmp_path):
    await check_disk(
        lambda: open_disk(
            f"concat:raw:[create=100K]{tmp_path}/a.img+raw:[create=1M]{tmp_path}/b.img"
        )
    )
    await check_disk(lambda: open_disk(f"concat:raw:[ro]{tmp_path}/a.img+raw:{tmp_path}/b.img"))


async def test_the_example_puts_its_parts_one_behind_the_other(example):
    parts = [RamDisk(1024) for _ in range(3)]
    disk = example.ConcatDisk(parts)
    await disk.writev(512, [memoryview(b"1" * 700), memoryview(b"2" * 1348)])
    content = []
    for part in parts:
        view = memoryview(bytearray(1024))
        part.try_readv(0, [view])
        content.append(bytes(view))
    joined = bytes(512) + b"1" * 700 + b"2" * 1348 + bytes(512)
    assert content == [joined[:1024], joined[1024:2048], joined[2048:]]
    await disk.aclose()


async def test_the_example_refuses_what_it_cannot_do_and_leaves_nothing_open(example, tmp_path):
    (tmp_path / "a.img").write_bytes(bytes(4096))
    before = open_descriptors(collect=True)
    for target in ("raw:{0}/a.img+ram:[sector=4096]1M", "raw:{0}/a.img+raw:{0}/b.img", ""):
        with pytest.raises(ConfigError):
            await open_disk(f"concat:{target.format(tmp_path)}")
    assert open_descriptors() == before
    disk = await open_disk(f"concat:raw:[ro]{tmp_path}/a.img+ram:1M")
    with pytest.raises(ReadOnlyError):
        await disk.unmap(4096, 512)
    await disk.aclose()


def code_blocks(language):
    text = (HOWTO / "write-a-disk.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_page_quotes_the_example_word_for_word():
    source = (HOWTO / "example_disk.py").read_text()
    quoted = [block for block in code_blocks("python") if "trio.run" not in block]
    assert len(quoted) == 4
    for block in quoted:
        assert block in source


def test_the_page_has_the_reader_as_it_is():
    text = (HOWTO / "write-a-disk.md").read_text().replace("\\|", "|")
    rows = re.findall(r"^\| `((\w+)\(.*?)` \|", text, re.MULTILINE)
    assert {name for _, name in rows} == {name for name, _ in public_members(OptionReader)}
    for written, name in rows:
        assert written == signature(name, getattr(OptionReader, name), len(written) + 99)


def test_the_last_program_of_the_page_runs(tmp_path):
    (program,) = [block for block in code_blocks("python") if "trio.run" in block]
    (registration,) = code_blocks("toml")
    info = tmp_path / "example_disk-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-disk\nVersion: 1\n")
    table = re.sub(r"[][\"]|project\.entry-points\.", "", registration)
    group, line = table.splitlines()
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), str(HOWTO), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
