"""``vmbus top``: the ways to show what a server does."""

import json
import os
import sys
import time

import pytest

from tests.support.cli import (
    Terminal,
    make_channel,
    make_controller,
    make_guest,
    make_status,
    make_unit,
    run_child,
    run_cli,
    scripted_server,
)
from vmbus.cli import program as program_module, top
from vmbus.cli.client import ask_guests
from vmbus.cli.screen import ENTER, LEAVE, Quit, Screen


@pytest.fixture
def server(tmp_path):
    """A server whose guest handles 1000 packets between two questions."""
    count = 0

    def query(kind):
        nonlocal count
        assert kind == "guests"
        count += 1000
        unit = make_unit(commands=count, bytes_read=count * 4096)
        guest = make_guest(
            "vm1", make_channel(packets_in=count), devices=[make_controller(0, unit)]
        )
        return make_status(guest)

    with scripted_server(tmp_path / "socket", query) as path:
        yield path


def test_a_pipe_gets_as_many_looks_as_it_wants(server):
    result = run_cli("top", "--socket", server, "--interval", "0.1", "--count", "2")
    assert result.exit_code == 0
    assert [line.split("=")[0] for line in result.output.splitlines()] == [
        "server", "guest", "guest", "guest", "server", "guest", "guest", "guest"
    ]  # fmt: skip


def test_json_is_one_object_per_look(server):
    result = run_cli("top", "--socket", server, "--interval", "0.1", "--once", "--json")
    assert result.exit_code == 0
    (line,) = result.output.splitlines()
    view = json.loads(line)
    assert view["time"] <= time.time()
    channel = view["guests"][0]["channels"][0]
    assert channel["rates"]["packets_in"] == pytest.approx(1000 / view["interval"])
    (disk,) = view["guests"][0]["disks"]
    assert disk["rates"]["bytes_read"] == pytest.approx(4096000 / view["interval"])


@pytest.fixture
def terminal(monkeypatch):
    """Make standard output one; not before the test itself, because pytest takes it as well."""

    def make():
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        return terminal

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return make


def test_a_terminal_gets_a_table_that_is_kept_up_to_date(server, terminal):
    shown = terminal()
    top.watch(server, 0.0, 2)
    text = shown.getvalue()
    painted, last = text.split(LEAVE)
    assert painted.startswith(ENTER)
    assert painted.count("1 scsi") == 2
    assert last.count("1 scsi") == 1  # it stays to be read


def test_q_ends_it_and_the_last_look_stays(server, terminal, monkeypatch):
    waits = []

    def wait(self, seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise Quit

    monkeypatch.setattr(Screen, "wait", wait)
    shown = terminal()
    top.watch(server, 5.0, None)
    assert waits == [5.0, 5.0]
    assert shown.getvalue().split(LEAVE)[1].count("1 scsi") == 1


def test_a_server_that_goes_away_gives_the_terminal_back(tmp_path, terminal):
    answers = [make_status(), make_status()]

    def query(kind):
        if not answers:
            raise OSError(5, "disk on fire")
        return answers.pop()

    shown = terminal()
    with (
        scripted_server(tmp_path / "s", query) as path,
        pytest.raises(program_module.Failure, match="disk on fire"),
    ):
        top.watch(path, 0.0, None)
    assert shown.getvalue().endswith(LEAVE)


def test_without_a_server_the_terminal_is_left_alone(tmp_path, terminal):
    shown = terminal()
    with pytest.raises(program_module.Failure, match="no server listens"):
        top.watch(str(tmp_path / "s"), 0.0, None)
    assert shown.getvalue() == ""


@pytest.mark.parametrize("arguments", [["--once"], ["--once", "--json"], []])
def test_the_command_watches_on_a_terminal_only_what_goes_on(server, monkeypatch, arguments):
    watched = []
    monkeypatch.setattr(top, "on_terminal", lambda: True)
    monkeypatch.setattr(top, "watch", lambda *args: watched.append(args))
    result = run_cli("top", "--socket", server, "--interval", "0.1", *arguments)
    assert result.exit_code == 0
    assert watched == ([] if arguments else [(server, 0.1, None)])
    assert ("scsi" in result.output) == bool(arguments)


@pytest.mark.parametrize("interval", ["nan", "inf", "-inf", "1e10", "0", "-1", "", "1s", "0x10"])
def test_an_interval_that_is_none_is_a_mistake(interval):
    result = run_cli("top", "--socket", "x", "--interval", interval)
    assert result.exit_code == 2
    assert "is not a number of seconds from 0.1 to 86400" in result.output


def test_once_is_one_look():
    result = run_cli("top", "--socket", "x", "--once", "--count", "2")
    assert result.exit_code == 2
    assert "--once is --count 1" in result.output


def test_the_socket_can_come_from_the_environment(server):
    result = run_cli("top", "--once", "--interval", "0.1", env={"VMBUS_SOCKET": server})
    assert result.exit_code == 0


def test_without_a_server_the_way_to_start_one_is_shown(tmp_path):
    result = run_child("top", "--socket", str(tmp_path / "s"), "--once")
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: no server listens on {tmp_path}/s; start one with: "
        f"vmbus serve --socket {tmp_path}/s\n"
    )


def test_another_failure_to_connect_is_told_as_it_is(tmp_path):
    result = run_cli("top", "--socket", str(tmp_path) + "/x" * 100, "--once")
    assert result.exit_code == 1
    assert "cannot connect" in result.output


def test_a_server_that_speaks_nonsense_breaks_the_protocol(tmp_path):
    import socket
    import threading

    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def answer():
            with listener.accept()[0] as peer:
                peer.recv(1000)
                peer.send(b"nonsense" * 10)
                peer.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        result = run_cli("top", "--socket", str(path), "--once")
        thread.join()
    assert result.exit_code == program_module.EXIT_PROTOCOL
    assert "broke the protocol" in result.output


def test_a_refusal_that_is_not_about_the_command_line_is_a_failure(tmp_path):
    def query(kind):
        raise OSError(5, "disk on fire")

    with scripted_server(tmp_path / "s", query) as path:
        result = run_cli("top", "--socket", path, "--once")
    assert result.exit_code == 1
    assert "disk on fire" in result.output


def test_the_server_is_asked_once_per_look(tmp_path):
    asked = []

    def query(kind):
        asked.append(kind)
        return make_status()

    with scripted_server(tmp_path / "s", query) as path:
        assert ask_guests(path)["pid"] == 42
        run_cli("top", "--socket", path, "--interval", "0.1", "--count", "3")
    assert asked == ["guests"] * 5
