"""``vmbus demo`` with processes that do not do what they should, and its words for everything."""

from __future__ import annotations

import io
import json
import signal
import tempfile
from subprocess import DEVNULL

import click
import pytest
import trio
from rich.console import Console

from storvsp.demo.trial import GRAIN, fingerprint
from tests.support.cli import run_cli
from vmbus.cli import demo, demo_view
from vmbus.cli.demo_report import DiskReport, Images, Problem, Report, file_digest, size_option
from vmbus.cli.demo_view import Line, PlainView, RichView, View, make_view, narrate, show, summarize

SERVES = "import sys, time; print('listening on s', file=sys.stderr, flush=True); "
STAYS = SERVES + "time.sleep(60)"
LEAVES = SERVES + "time.sleep(0.3)"
SAYS_GOODBYE = 'print(\'{"event": "left", "interrupts": 1, "signals": 2}\', flush=True); '
STUBBORN = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('I stay', file=sys.stderr, flush=True); time.sleep(60)"
)


def perform(monkeypatch, *, server=LEAVES, guest=SAYS_GOODBYE, arguments=()):
    """Run the demo with other programs for server and guest; returns the result and the JSON."""
    monkeypatch.setattr(
        demo.Demo, "_serve_arguments",
        lambda self: ["-c", server, "serve", "--once", "--socket", self.socket],
    )  # fmt: skip
    monkeypatch.setattr(demo.Demo, "_guest_arguments", lambda self: ["-c", guest])
    return run_cli("demo", "--size", "1M", *arguments)


def problems_of(result):
    assert result.exit_code == 1, result.output
    document = json.loads(result.output)
    assert document["ok"] is False
    return [(problem["where"], problem["text"]) for problem in document["problems"]]


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """Where the demo makes its directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# -- processes ------------------------------------------------------------------------------------


def test_a_guest_that_leaves_in_order_is_all_that_is_asked_for(monkeypatch, temporary):
    result = perform(monkeypatch, arguments=["--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["ok"] is True
    assert document["calls"] == {"interrupts": 1, "signals": 2}
    assert document["exit_codes"] == {"server": 0, "guest": 0}
    assert document["directory"] is None
    assert not list(temporary.iterdir())


def test_kept_directories_hold_logs_and_images(monkeypatch, temporary):
    result = perform(monkeypatch, arguments=["--keep"])
    assert result.exit_code == 0, result.output
    (directory,) = temporary.iterdir()
    assert f"Images and logs are in {directory}\n" in result.output
    assert {path.name for path in directory.iterdir()} >= {
        "server.log", "guest.log", "base.img", "cd.iso",
    }  # fmt: skip
    assert (directory / "server.log").read_text(encoding="utf-8") == "listening on s\n"


@pytest.mark.usefixtures("temporary")
def test_a_server_that_does_not_come_up_is_named(monkeypatch):
    result = perform(monkeypatch, server="raise SystemExit(7)", arguments=["--json"])
    assert problems_of(result) == [("server", "did not come up: ended with exit code 7")]


@pytest.mark.usefixtures("temporary")
def test_a_server_that_does_not_say_that_it_listens_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(demo, "SILENCE", 0.3)
    result = perform(monkeypatch, server="import time; time.sleep(60)", arguments=["--json"])
    assert problems_of(result) == [("server", "did not come up: was killed by SIGTERM")]


async def test_a_process_that_does_not_want_to_end_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "GRACE", 0.1)
    child = demo.Child("guest", ["-c", STUBBORN], tmp_path / "log")
    await child.start(stdout=DEVNULL)
    heard = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.follow, lambda line: heard.set())
        await heard.wait()
        await child.end()
    assert list(child.lines) == ["I stay"]
    assert demo.how(child.returncode) == "was killed by SIGKILL"


@pytest.mark.usefixtures("temporary")
def test_the_last_words_of_a_server_that_does_not_come_up_are_shown(monkeypatch):
    result = perform(monkeypatch, server="import sys; sys.exit('no such\\033 disk')")
    assert result.exit_code == 1
    assert "the server's last lines:\n  no such? disk\n" in result.output
    assert "server: did not come up: ended with exit code 1\n" in result.output
    assert "Images and logs are in " in result.output


@pytest.mark.usefixtures("temporary")
def test_a_guest_that_says_nothing_is_not_waited_for(monkeypatch):
    start = demo.Demo._start_server

    async def start_and_lose_patience(self, listeners):
        came_up = await start(self, listeners)
        monkeypatch.setattr(demo, "SILENCE", 0.2)
        return came_up

    monkeypatch.setattr(demo.Demo, "_start_server", start_and_lose_patience)
    guest = "import time; time.sleep(60)"
    result = perform(monkeypatch, server=STAYS, guest=guest, arguments=["--json"])
    assert problems_of(result) == [("guest", "hangs: it has said nothing for 0.2 s")]


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize(
    ("guest", "text"),
    [
        ("pass", "ended with exit code 0 before its time"),
        ("raise SystemExit(1)", "ended with exit code 1 before its time"),
        (SAYS_GOODBYE + "raise SystemExit(9)", "ended with exit code 9 before its time"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL before its time"),
    ],
)
def test_a_guest_that_does_not_end_as_it_should_is_named(monkeypatch, guest, text):
    result = perform(monkeypatch, guest=guest, arguments=["--json"])
    assert problems_of(result) == [("guest", text)]


@pytest.mark.usefixtures("temporary")
def test_a_guest_that_goes_on_without_output_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(demo, "GRACE", 0.2)
    guest = "import os, time; os.close(1); time.sleep(60)"
    result = perform(monkeypatch, guest=guest, arguments=["--json"])
    assert problems_of(result)[0] == ("guest", "has closed its output but goes on")


@pytest.mark.usefixtures("temporary")
def test_a_server_that_goes_on_without_its_guest_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(demo, "GRACE", 2.0)
    result = perform(monkeypatch, server=STAYS, arguments=["--json"])
    assert problems_of(result) == [("server", "goes on although its only guest has left")]


@pytest.mark.usefixtures("temporary")
def test_a_server_that_finds_fault_with_its_guest_is_heard(monkeypatch):
    result = perform(monkeypatch, server=LEAVES + "; sys.exit(3)", arguments=["--json"])
    assert problems_of(result) == [("server", "ended with exit code 3")]


@pytest.mark.usefixtures("temporary")
def test_what_is_no_event_is_kept_with_the_guests_last_lines(monkeypatch):
    guest = "print('a plug-in says hello'); print('bye', end=''); raise SystemExit(5)"
    result = perform(monkeypatch, guest=guest)
    assert "the guest's last lines:\n  a plug-in says hello\n  bye\n" in result.output


@pytest.mark.usefixtures("temporary")
def test_an_operator_who_cannot_reach_the_server_is_a_problem(monkeypatch):
    guest = 'print(\'{"event": "ready", "action": "add"}\'); ' + SAYS_GOODBYE
    result = perform(monkeypatch, guest=guest, arguments=["--json"])
    ((where, text),) = problems_of(result)
    assert where == "operator"
    assert "cannot connect" in text


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_ends_both_processes(monkeypatch, temporary, number, code):
    guest = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    result = perform(monkeypatch, server=STAYS, guest=guest, arguments=["--json"])
    assert result.exit_code == code
    document = json.loads(result.output)
    assert document["ok"] is False
    assert document["problems"] == []
    assert document["exit_codes"] == {"server": -15, "guest": -15}
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    "words",
    [("--size", "512K"), ("--size", str((1 << 20) + 512)), ("--guest", "beos"),
     ("--channels", "17"), ("--depth", "0"), ("--seconds", "-1")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(words):
    assert run_cli("demo", *words).exit_code == 2


def test_openbsd_gets_a_monitor_page(tmp_path):
    settings = demo.Settings(
        guest="openbsd", disks=("ram:1M",), channels=1, depth=1, seconds=0, size=1 << 20
    )
    play = demo.Demo(settings, tmp_path, Report(), View())
    assert "--monitor" in play.server.arguments
    assert play.server.arguments[-2:] == ["--disk", "ram:1M"]


async def test_a_process_that_was_never_started_needs_no_end(tmp_path):
    child = demo.Child("nobody", [], tmp_path / "log")
    await child.end()
    assert child.returncode is None
    assert demo.how(child.returncode) == "had to be ended"


# -- the report -----------------------------------------------------------------------------------

DISK = {
    "event": "disk", "address": "0:0:0", "kind": "disk", "vendor": "Msft",
    "product": "Virtual Disk", "block_size": 512, "size": 1 << 20, "used": 1 << 20,
    "writable": True, "unmaps": True, "label": None,
}  # fmt: skip


def phase(name, **changes):
    return {"event": "phase", "address": "0:0:0", "phase": name, "block": 4096, "requests": 10,
            "bytes": 40960, "seconds": 0.5, **changes}  # fmt: skip


def report_of(*events):
    report = Report(backends={"0:0:0": "RamDisk"})
    for event in events:
        report.take(event)
    return report


def test_the_report_keeps_what_the_guest_tells():
    report = report_of(
        DISK,
        {"event": "progress", **{k: v for k, v in phase("write").items() if k != "event"}},
        phase("write"),
        phase("mixed", requests=0, bytes=0),
        {"event": "contents", "address": "0:0:0", "when": "after", "digest": "ab"},
        {"event": "ready", "action": "add"},
        {"event": "verified", "address": "0:0:0", "unmapped": 4096},
        {"event": "gone", "address": "0:0:0"},
        {"event": "left", "interrupts": 1, "signals": 2},
    )
    disk = report.disks["0:0:0"]
    assert (disk.backend, disk.verified, disk.unmapped, disk.gone) == ("RamDisk", True, 4096, True)
    assert disk.digests == {"after": "ab"}
    assert disk.rate("write", "bytes") == 81920
    assert disk.rate("mixed", "requests") is None
    assert disk.rate("read", "bytes") is None
    assert disk.total("write", "read") == 40960
    assert (report.total("requests"), report.total("bytes")) == (10, 40960)
    assert report.ok
    report.take({"event": "problem", "where": "guest", "text": "no"})
    assert report.problems == [Problem("guest", "no")]
    assert not report.ok
    document = report.as_json()
    json.dumps(document)
    assert document["disks"][0]["phases"]["write"]["requests"] == 10


def test_both_sides_agree_what_a_digest_is(tmp_path):
    data = bytes(range(256)) * 40
    path = tmp_path / "file"
    path.write_bytes(data)
    prints = [fingerprint(data[start : start + GRAIN]) for start in range(0, 8192, GRAIN)]
    assert file_digest(path, 8192) == fingerprint(b"".join(prints)).hex()


@pytest.mark.parametrize(("size", "text"), [(32 << 20, "32M"), ((1 << 20) + 4096, "1028K")])
def test_sizes_are_written_as_options_take_them(size, text):
    assert size_option(size) == text


def test_files_are_compared_with_what_the_guest_has_seen(tmp_path):
    images = Images(tmp_path, 1 << 20)
    images.make()
    images.raw.write_bytes(bytes(1 << 20))
    paths = {"0:0:1": images.raw, "0:0:2": images.base, "0:0:3": images.cd}
    report = Report()
    for address, path in paths.items():
        digest = file_digest(path, 1 << 20)
        report.disks[address] = DiskReport(
            address, "-", {"used": 1 << 20}, digests={"before": digest, "after": digest}
        )
    assert images.compare(report) == [
        "disk.img holds what was written",
        "base.img showed through the overlay",
        "cd.iso was read as it is",
        "base.img is unchanged",
    ]
    assert not report.problems
    for path in paths.values():
        with path.open("r+b") as file:
            file.seek(70000)
            file.write(b"?!?")
    assert images.compare(report) == []
    assert [problem.where for problem in report.problems] == ["0:0:1", "0:0:2", "0:0:3", "0:0:2"]


# -- words ----------------------------------------------------------------------------------------

START = {"event": "start", "guest": "Linux", "vps": 4, "ram": 1 << 20, "pid": 7}
OFFER = {"event": "offer", "relid": 1, "class": "scsi", "instance": "f036f06a-bcfd",
         "subchannel": 0, "connection": 0x2001, "monitor": None, "ignored": None}  # fmt: skip
READ_ONLY = DISK | {"writable": False, "unmaps": False}


def words(event, *before):
    return [line.text for line in narrate(event, report_of(*before, event), 32)]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (START, "Linux: pid 7, 4 VPs, 1 MiB of RAM in a memfd"),
        ({"event": "attached", "features": ["LOG"]}, "attached over vmbus-user: LOG"),
        ({"event": "contact", "version": "5.3", "features": []}, "VMBus 5.3"),
        (
            {"event": "contact", "version": "6.0", "features": ["CLIENT_ID"]},
            "VMBus 6.0, features: CLIENT_ID",
        ),
        (OFFER, "relid 1: scsi f036f06a, connection 0x2001"),
        (
            OFFER | {"subchannel": 2, "monitor": 5, "ignored": "why ever"},
            "relid 1: scsi, sub-channel 2 of f036f06a, connection 0x2001, monitor bit 5, why ever",
        ),
        (
            {"event": "vstor", "version": "6.2", "max_transfer": 2 << 20, "max_subchannels": 15},
            "6.2: up to 2 MiB per request, 15 sub-channels",
        ),
        (
            {"event": "channel", "relid": 3, "ring": 131072, "gpadl_pages": 64, "vp": 2},
            "relid 3: 2 rings of 128 KiB, GPADL of 64 pages, interrupts VP 2",
        ),
        (DISK, "0:0:0  Virtual Disk      RamDisk       1 MiB, 512 B blocks, unmap"),
        (READ_ONLY, "0:0:0  Virtual Disk      RamDisk       1 MiB, 512 B blocks, read only"),
        (
            READ_ONLY | {"kind": "cd", "label": "X"},
            '0:0:0  Virtual Disk      RamDisk       1 MiB, 512 B blocks, volume "X"',
        ),
        (
            {"event": "notice", "operation": "ENUMERATE_BUS", "heeded": True},
            "ENUMERATE_BUS from the host: scan again",
        ),
        (
            {"event": "notice", "operation": "ENUMERATE_BUS", "heeded": False},
            "ENUMERATE_BUS from the host: this driver ignores it, by hand: scan again",
        ),
        ({"event": "problem", "where": "guest", "text": "ouch"}, "ouch"),
        (
            {"event": "left", "interrupts": 1234, "signals": 5},
            "left: channels closed, GPADLs torn down; 1,234 interrupts in, 5 signals out",
        ),
    ],
)
def test_every_event_has_its_words(event, text):
    assert words(event) == [text]


def test_events_about_disks_have_their_words_too():
    told = words(phase("write"), DISK)
    assert told == ["write   4 KiB x 32        20 requests/s       0 MB/s"]
    assert words(phase("mixed", requests=0), DISK) == []
    assert words(phase("survey"), DISK) == []
    verified = {"event": "verified", "address": "0:0:0", "unmapped": 4096}
    assert words(verified, DISK, phase("read")) == [
        "verified: 40 KiB read and compared, flushed, 4 KiB unmapped, now zeros"
    ]
    assert words(verified | {"unmapped": 0}, READ_ONLY, phase("read")) == [
        "verified: 40 KiB read and compared"
    ]
    gone = {"event": "gone", "address": "0:0:0"}
    assert words(gone, DISK) == ["0:0:0 is gone, commands to it get INVALID_LUN"]


def test_a_pipe_gets_lines_without_colour_and_a_time_before_each(capsys):
    view = make_view(quiet=False)
    assert type(view) is PlainView
    view.tell(Line("guest", "hello\033[1m", "bold red"))
    view.status("not shown")
    view.close()
    time, _, text = capsys.readouterr().out.partition("] ")
    assert time.startswith("[  0.0")
    assert text == "guest    hello?[1m\n"


def test_a_terminal_gets_colour_and_a_line_that_moves(monkeypatch):
    monkeypatch.setattr(demo_view, "on_terminal", lambda: True)
    screen = io.StringIO()
    monkeypatch.setattr(
        demo_view, "console",
        lambda: Console(file=screen, force_terminal=True, width=100, color_system="standard"),
    )  # fmt: skip
    view = make_view(quiet=False)
    assert type(view) is RichView
    report = report_of(DISK)
    show(view, {**phase("write"), "event": "progress"}, report, 32)
    view.tell(Line("server", "meanwhile"))
    before = screen.getvalue()
    assert "0:0:0 RamDisk: write   4 KiB x 32        20 requests/s" in before
    show(view, {"event": "problem", "where": "guest", "text": "ouch"}, report, 32)
    view.close()
    view.close()
    after = screen.getvalue().removeprefix(before)
    assert "\033[1;31mouch" in after
    assert "RamDisk" not in after.partition("ouch")[2]  # what is over is not shown any longer


def test_json_readers_get_no_lines(capsys):
    view = make_view(quiet=True)
    view.tell(Line("guest", "hello"))
    view.status("busy")
    view.close()
    assert capsys.readouterr().out == ""


def summary(report):
    with click.Context(demo.command):
        summarize(report)


def test_the_summary_has_a_row_for_each_disk(capsys):
    other = DISK | {"address": "0:0:1"}
    third = READ_ONLY | {"address": "0:0:2"}
    report = report_of(
        DISK, other, third, phase("write"), phase("mixed"),
        {"event": "verified", "address": "0:0:0", "unmapped": 0},
        {"event": "problem", "where": "0:0:1", "text": "corrupt\033"},
    )  # fmt: skip
    report.last_lines = {"server": [f"line {n}" for n in range(20)], "guest": []}
    summary(report)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("0:0:")]
    assert rows[0] == ["0:0:0", "RamDisk", "1", "MiB", "40", "KiB", "0", "B", "0", "MB/s", "-",
                       "20", "/s", "ok"]  # fmt: skip
    assert rows[1][-1] == "broken"
    assert rows[2][-1] == "-"
    assert "  line 11" not in lines
    assert "  line 12" in lines
    assert "0:0:1: corrupt?" in lines
    assert "the guest's last lines:" not in lines


def test_the_summary_of_an_interrupted_demo_blames_nobody(capsys):
    report = Report(interrupted=signal.SIGINT)
    summary(report)
    assert capsys.readouterr().out == "\nended by SIGINT\n"
    assert demo.exit_code(report) == 130
