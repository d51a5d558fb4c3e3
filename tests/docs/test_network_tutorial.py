"""The tutorial about the network does what it says: its commands are run as they stand."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import child_environment
from tests.support.house import ROOT
from tests.support.patience import PATIENCE, until_in_thread

pytestmark = pytest.mark.slow

TUTORIAL = ROOT / "docs/tutorials/network.md"
SAYS = 'until grep -q "net" vm1.log; do sleep 0.05; done\n'
"""What a reader does who sees that a guest has come up, before going on."""


def blocks() -> list[str]:
    """Return what is typed, in its order."""
    text = TUTORIAL.read_text()
    found: list[str] = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home directory, and the commands on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, command in (("vmbus", f"{sys.executable} -m vmbus.cli"), ("python", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    found = child_environment(HOME=str(tmp_path))
    return {**found, "PATH": f"{programs}:{found['PATH']}"}


def test_the_commands_do_what_the_page_says(environment, tmp_path):
    prepare, serve, *rest = blocks()
    subprocess.run(["bash", "-ec", prepare], env=environment, check=True, timeout=PATIENCE)
    place = tmp_path / "vmbus-network"
    with subprocess.Popen(
        ["bash", "-ec", f"exec {serve}"],
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            until_in_thread((place / "lan.sock.control").exists)
            script = "".join(block + (SAYS if "--idle" in block else "") for block in rest)
            done = subprocess.run(
                ["bash", "-ec", script],
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 130
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event"')]
    kinds = [event["event"] for event in events]
    assert kinds.count("met") == kinds.count("ping") == kinds.count("left") == 2
    assert [event["lost"] for event in events if event["event"] == "stream"] == [0] * 4
    for name in ("one", "two"):
        assert (place / f"{name}.pcapng").stat().st_size > 1 << 20
    for words in (
        "added as adapter 1, address 00:15:5d:",
        "the link is down\nthe link is up\n",
        "removed adapter 1\n",
    ):
        assert words in done.stdout
    offers = [json.loads(line) for line in (place / "vm1.log").read_text().splitlines()]
    assert [each["class"] for each in offers if each["event"] == "offer"].count("net") == 2


def test_what_the_page_prints_is_of_that_kind():
    text = TUTORIAL.read_text()
    for line in re.findall(r'^\{"event".*$', text, re.MULTILINE):
        assert json.loads(line)["event"] in {"met", "ping", "stream"}
