"""The demo as visitors run it: a server and a guest in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netvsp.guest import HABITS as NETWORK_HABITS
from storvsp.guest import HABITS
from tests.support.cli import child_environment, install_plugin
from tests.support.house import ROOT
from tests.support.patience import PATIENCE
from vmbus.guest import PERSONALITIES

pytestmark = pytest.mark.slow

MANUAL = ROOT / "docs" / "reference" / "demo-json.md"
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from vmbus.cli import demo_child, main; "
    f"demo_child.SILENCE = demo_child.GRACE = {PATIENCE}; sys.exit(main())",
]
"""``vmbus``, but for the patience of ``vmbus demo``, which is a user's."""
QUICK = ("demo", "--seconds", "0", "--size", "1M")
LIES = '''
from storvsp.disks.ram import RamDisk

class LyingDisk(RamDisk):
    """Keeps everything but one bit."""

    def try_writev(self, offset, buffers, *, fua=False):
        done = super().try_writev(offset, buffers, fua=fua)
        if offset == 4096 * 32:
            changed = bytearray(bytes(buffers[0][:512]))
            changed[100] ^= 1
            super().try_writev(offset, [memoryview(changed)], fua=fua)
        return done

async def open_spec(spec):
    return LyingDisk(1 << 20)
'''


def run_demo(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=child_environment(**extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """One with a short path: that of the socket for operators has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="vmbus-") as made:
        yield Path(made)


@pytest.fixture
def place(tmp_path):
    """Environment in which the demo makes its directory in ``tmp_path``."""
    return {"TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("name", PERSONALITIES)
def test_every_guest_passes_the_demo(place, tmp_path, name):
    personality = PERSONALITIES[name]
    result = run_demo(*QUICK, "--json", "--guest", name, **place)
    assert result.returncode == 0, (result.stdout, result.stderr)
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["problems"] == []
    codes = document["exit_codes"]
    assert (codes["server"], codes["guest"], codes["network"]) == (0, 0, 0)
    if name in NETWORK_HABITS:
        assert (codes["station 1"], codes["station 2"]) == (0, 0)
        first, second = document["network"]
        assert first["ping"]["answered"] == second["ping"]["answered"] == 20
        assert (first["met"]["mac"], second["met"]["mac"]) == (
            second["adapter"]["mac"],
            first["adapter"]["mac"],
        )
        for sender, receiver in ((first, second), (second, first)):
            assert sender["sent"]["frames"] == receiver["received"]["frames"] >= 256
            assert receiver["received"]["lost"] == receiver["received"]["damaged"] == 0
    else:
        assert document["network"] == []
    assert document["guest"]["guest"] == personality.name
    assert document["bus"]["version"] == str(personality.versions[0])
    assert len(document["channels"]) == (4 if HABITS[name].vps_per_sub_channel else 1)
    disks = document["disks"]
    assert [(disk["backend"], disk["kind"]) for disk in disks] == [
        ("RamDisk", "disk"),
        ("RawDisk", "disk"),
        ("OverlayDisk", "disk"),
        ("CD-ROM drive", "cd"),
        ("RamDisk", "disk"),
    ]
    assert all(disk["verified"] for disk in disks)
    assert [disk["gone"] for disk in disks] == [False] * 4 + [True]
    assert disks[3]["label"] == "VMBUS_DEMO"
    assert disks[0]["phases"]["write"]["bytes"] == 1 << 20
    assert not list(tmp_path.iterdir())


def test_the_manual_names_every_member_of_the_json_document(place):
    manual = MANUAL.read_text(encoding="utf-8")
    document = json.loads(run_demo(*QUICK, "--json", **place).stdout)
    members = set(document)
    for part in ("guest", "attachment", "bus", "storage", "calls", "exit_codes"):
        members |= set(document[part])
    for part in ("offers", "channels", "notices", "disks", "network"):
        members |= set(document[part][0])
    for part in ("adapter", "met", "ping", "sent", "received"):
        members |= set(document["network"][0][part])
    (phases,) = {tuple(disk["phases"]) for disk in document["disks"] if disk["writable"]}
    members |= {*phases, *document["disks"][0]["phases"]["write"]}
    members |= set(document["disks"][0]["digests"])
    assert {member for member in members if f"`{member}`" not in manual} == set()


def test_a_pipe_gets_plain_lines_and_a_table(place):
    result = run_demo(*QUICK, "--channels", "2", "--depth", "4", **place)
    assert result.returncode == 0, result.stdout
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert "\033" not in result.stdout
    assert max(map(len, lines)) <= 100
    story = [line for line in lines if line.startswith("[")]
    assert all(re.match(r"\[ *\d+\.\d{3}\] ", line) for line in story)
    text = "\n".join(line.split("] ", 1)[1] for line in story)
    for words in (
        "contact  VMBus 5.3",
        "vstor    6.2: up to 2 MiB per request, 15 sub-channels",
        "channel  relid 2: 2 rings of 128 KiB, GPADL of 64 pages, interrupts VP 1",
        "0:0:1    verified: ",
        "operator vmbus disk add ram:1M",
        "guest    ENUMERATE_BUS from the host: scan again",
        "operator vmbus disk remove 0:0:4",
        "guest    0:0:4 is gone",
        "server   ended with exit code 0",
        "files    disk.img holds what was written",
        "vmbus serve --single-process --net switch:demo",
        "arp      1: 10.0.0.2 is at 00:15:5d:",
        "ping     2: 20 of 20 answered, ",
        "0 lost, every byte verified",
    ):
        assert words in text
    assert lines[-1].startswith("All verified: ")
    assert " datagrams, in " in lines[-1]


def test_a_terminal_gets_colour(place):
    ours, theirs = pty.openpty()
    environment = child_environment(**place) | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([*COMMAND, *QUICK], env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal's other end ends
        while chunk := os.read(ours, 65536):
            output += chunk
    os.close(ours)
    assert process.wait(PATIENCE) == 0, output.decode()
    assert b"\033[32mverified" in output
    assert b"\033[31m" not in output


def test_a_disk_that_loses_a_bit_is_caught(place, tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    install_plugin(plugins, "storvsp.disks", "lying", "lying_disk:open_spec", LIES)
    environment = child_environment(**place)
    environment["PYTHONPATH"] = os.pathsep.join([str(plugins), environment["PYTHONPATH"]])
    result = subprocess.run(
        [*COMMAND, *QUICK, "--disk", "lying:", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 1, result.stdout
    document = json.loads(result.stdout)
    ((problem),) = document["problems"]
    assert problem["where"] == "0:0:4"
    assert "corrupt: 4 KiB at byte 131072 (block 256)" in problem["text"]
    verified = {disk["address"]: disk["verified"] for disk in document["disks"]}
    assert verified == {
        "0:0:0": True, "0:0:1": True, "0:0:2": True, "0:0:3": True, "0:0:4": False, "0:0:5": True,
    }  # fmt: skip
    assert Path(document["directory"], "server.log").exists()


def test_a_disk_that_fails_is_reported_with_its_sense_data(place):
    result = run_demo(*QUICK, "--disk", "fault:[lba=100-103,on=read]ram:8M", **place)
    assert result.returncode == 1
    assert re.search(
        r"^0:0:4: READ of \d+ blocks at \d+: .* sense 3/11/00$", result.stdout, re.MULTILINE
    )
    (row,) = re.findall(r"^0:0:4  FaultDisk .*$", result.stdout, re.MULTILINE)
    assert row.endswith("broken")
    assert "the server's last lines:\n" in result.stdout


def test_a_disk_that_does_not_exist_is_named_by_the_server(place):
    result = run_demo(*QUICK, "--disk", "nonsense:8M", **place)
    assert result.returncode == 2, "it is a mistake in the command line"
    assert "unknown disk scheme 'nonsense'" in result.stderr


@contextlib.contextmanager
def long_demo(place) -> Iterator[tuple[subprocess.Popen[str], dict[str, int], list[str]]]:
    """A demo that is at work on its first disk; yields it, the pids of both, and its lines."""
    process = subprocess.Popen(
        [*COMMAND, "demo", "--seconds", "600", "--size", "1M"],
        env=child_environment(PYTHONUNBUFFERED="1", **place),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = {}
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"\] (server|guest ) .*pid (\d+)", line):
                pids[found[1].strip()] = int(found[2])
            if "] cd " in line:
                break
        assert set(pids) == {"server", "guest"}, lines
        yield process, pids, lines
        lines += process.stdout.readlines()
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    for pid in pids.values():
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("victim", ["server", "guest"])
def test_the_death_of_either_process_is_told(place, victim):
    with long_demo(place) as (process, pids, lines):
        os.kill(pids[victim], signal.SIGKILL)
    assert process.returncode == 1
    text = "".join(lines)
    assert f"{victim}: was killed by SIGKILL" in text
    assert "the server's last lines:\n" in text
    if victim == "server":
        assert "guest: the server is gone: " in text
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up_everything(place, tmp_path, number):
    with long_demo(place) as (process, _, lines):
        process.send_signal(number)
    assert process.returncode == 128 + number
    assert lines[-1] == f"ended by {number.name}\n"
    assert not list(tmp_path.iterdir())
