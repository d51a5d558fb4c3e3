"""``vmbus demo`` with processes that do not do what they should."""

from __future__ import annotations

import json
import signal
import tempfile
from subprocess import DEVNULL

import pytest
import trio

from tests.support.cli import run_cli
from tests.support.patience import SOON
from vmbus.cli import demo, demo_child
from vmbus.cli.demo_report import Report
from vmbus.cli.demo_view import View

# Server and guest share a named pipe beside the socket, which ends for the one when the other does.
SERVES = (
    "import os, signal, sys; pipe = sys.argv[-1] + '.pipe'; os.mkfifo(pipe); "
    "print('listening on s', file=sys.stderr, flush=True); guest = open(pipe); "
)
STAYS = SERVES + "signal.pause()"
LEAVES = SERVES + "guest.read()"
LIVES = "import sys; pipe = open(sys.argv[1] + '.pipe', 'w'); "
SAYS_GOODBYE = 'print(\'{"event": "left", "interrupts": 1, "signals": 2}\', flush=True); '
STUBBORN = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('I stay', file=sys.stderr, flush=True); signal.pause()"
)


def perform(monkeypatch, *, server=LEAVES, guest=SAYS_GOODBYE, arguments=()):
    """Run the demo with other programs for server and guest; returns the result and the JSON."""
    monkeypatch.setattr(
        demo.Demo, "_serve_arguments",
        lambda self: ["-c", server, "serve", "--once", "--socket", self.socket],
    )  # fmt: skip
    monkeypatch.setattr(demo, "make_network", lambda *arguments, **options: None)
    monkeypatch.setattr(
        demo.Demo, "_guest_arguments", lambda self: ["-c", LIVES + guest, self.socket]
    )
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
    monkeypatch.setattr(demo_child, "SILENCE", SOON)
    result = perform(monkeypatch, server="import signal; signal.pause()", arguments=["--json"])
    assert problems_of(result) == [("server", "did not come up: was killed by SIGTERM")]


async def test_a_process_that_does_not_want_to_end_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_child, "GRACE", SOON)
    child = demo_child.Child("guest", ["-c", STUBBORN], tmp_path / "log")
    await child.start(stdout=DEVNULL)
    heard = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.follow, lambda line: heard.set())
        await heard.wait()
        await child.end()
    assert list(child.lines) == ["I stay"]
    assert demo_child.how(child.returncode) == "was killed by SIGKILL"


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
        monkeypatch.setattr(demo_child, "SILENCE", SOON)
        return came_up

    monkeypatch.setattr(demo.Demo, "_start_server", start_and_lose_patience)
    guest = "import signal; signal.pause()"
    result = perform(monkeypatch, server=STAYS, guest=guest, arguments=["--json"])
    assert problems_of(result) == [("guest", f"hangs: it has said nothing for {SOON:g} s")]


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
    monkeypatch.setattr(demo_child, "GRACE", SOON)
    guest = "import os, signal; os.close(1); signal.pause()"
    result = perform(monkeypatch, guest=guest, arguments=["--json"])
    assert problems_of(result)[0] == ("guest", "has closed its output but goes on")


@pytest.mark.slow
@pytest.mark.usefixtures("temporary")
def test_a_server_that_goes_on_without_its_guest_is_not_waited_for(monkeypatch):
    ended = demo.Demo._ended

    async def lose_patience_with_the_server(self, child, otherwise):
        if child.name == "server":
            monkeypatch.setattr(demo_child, "GRACE", SOON)
        return await ended(self, child, otherwise)

    monkeypatch.setattr(demo.Demo, "_ended", lose_patience_with_the_server)
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
    guest = f"import os, signal; os.kill(os.getppid(), {int(number)}); signal.pause()"
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
    child = demo_child.Child("nobody", [], tmp_path / "log")
    await child.end()
    assert child.returncode is None
    assert demo_child.how(child.returncode) == "had to be ended"


MISTAKE = "import sys; print('Error: what you typed', file=sys.stderr); sys.exit(2)"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_mistake_that_the_server_finds_is_one_and_leaves_nothing(
    monkeypatch, temporary, arguments
):
    result = perform(monkeypatch, server=MISTAKE, arguments=arguments)
    assert result.exit_code == 2
    assert result.stderr == "Error: what you typed\n"
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("spec", ["bla", "ram:[lun=0]1M", "raw:/nowhere/disk.img", "rom:1M"])
def test_a_disk_that_cannot_be_is_a_mistake(temporary, spec):
    result = run_cli("demo", "--size", "1M", "--disk", spec)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "1e10"])
def test_a_time_that_is_none_is_a_mistake(seconds):
    result = run_cli("demo", "--seconds", seconds)
    assert result.exit_code == 2
    assert "is not a number of seconds" in result.output
