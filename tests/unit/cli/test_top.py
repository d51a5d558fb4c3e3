"""``vmbus top``: rates, and the three ways to show them."""

import json
import os
import sys
import time

import pytest

from tests.support.cli import (
    Terminal,
    make_channel,
    make_guest,
    make_status,
    run_child,
    run_cli,
    scripted_server,
)
from tests.support.looks import channel_of, view_of
from vmbus.cli import program as program_module, top
from vmbus.cli.client import ask_guests
from vmbus.cli.rates import ServerView
from vmbus.cli.top import plain_lines, render, short


def test_devices_that_are_gone_and_rings_without_size_are_shown():
    channel = make_channel(device=99, outgoing_size=0, outgoing_used=0)
    shown = channel_of(view_of([], [make_guest("a", channel)]))
    assert (shown.device, shown.outgoing_fill) == ("?", 0.0)


@pytest.mark.parametrize(
    ("number", "base", "text"),
    [
        (0, 1000, "0"),
        (999.4, 1000, "999"),
        (4390, 1000, "4.39k"),
        (999_700, 1000, "1M"),
        (1536, 1024, "1.5k"),
        (5 << 30, 1024, "5G"),
        (7e14, 1000, "700T"),
    ],
)
def test_numbers_are_short(number, base, text):
    assert short(number, base) == text


GUESTS = [
    make_guest(
        "vm\x1b[2J 1",
        make_channel(1, packets_in=5000, bytes_in=3 << 20, incoming_used=500, outstanding=32),
        make_channel(2, subchannel_index=1),
        faults=3,
    ),
    make_guest("idle", number=2, version=None, paused=True),
]


def test_lines_for_a_pipe_are_key_and_value():
    lines = list(plain_lines(view_of([], GUESTS, 1.0)))
    assert lines[0] == "server=vmbus_1.2.3 pid=42 rss=41943040 guests_served=7 guests=2"
    assert lines[1] == (
        "guest=vm?[2J_1 version=5.3 memory=1073741824 paused=no faults=3 channels=2"
    )
    assert lines[2].startswith(
        "guest=vm?[2J_1 channel=1 device=scsi subchannel=0 ring_in=0.500 ring_out=0.000 "
        "outstanding=32 packets_in=5000.0 packets_out=0.0 bytes_in=3145728.0"
    )
    assert lines[4] == "guest=idle version=- memory=1073741824 paused=yes faults=0 channels=0"
    for line in lines:
        assert all(len(word.split("=")) == 2 for word in line.split(" "))


def test_a_guest_without_a_name_is_a_word():
    assert list(plain_lines(view_of([], [make_guest(" ")])))[1].startswith("guest=- ")


def test_the_table_fits_a_terminal_and_shows_everything(monkeypatch):
    from rich.console import Console

    console = Console(width=80, file=Terminal(), force_terminal=False)
    console.print(render(view_of([], GUESTS, 1.0)))
    assert isinstance(console.file, Terminal)
    text = console.file.getvalue()
    lines = [line.rstrip() for line in text.splitlines()]
    assert "vm?[2J 1: VMBus 5.3, 1 GiB of memory, 3 fault(s)" in lines
    assert "idle: no contact yet, 1 GiB of memory, 0 fault(s), paused, no open channels" in lines
    row = next(line for line in lines if line.startswith("1 scsi ")).split()
    assert row == ["1", "scsi", "50%", "0%", "32", "5k", "0", "3M", "0", "0", "0"]
    assert any(line.startswith("2 scsi.1 ") for line in lines)
    assert "…" not in text


@pytest.fixture
def server(tmp_path):
    """A server whose guest handles 1000 packets between two questions."""
    count = 0

    def query(kind):
        nonlocal count
        assert kind == "guests"
        count += 1000
        return make_status(make_guest("vm1", make_channel(packets_in=count)))

    with scripted_server(tmp_path / "socket", query) as path:
        yield path


def test_a_pipe_gets_as_many_looks_as_it_wants(server):
    result = run_cli("top", "--socket", server, "--interval", "0.1", "--count", "2")
    assert result.exit_code == 0
    assert [line.split("=")[0] for line in result.output.splitlines()] == [
        "server", "guest", "guest", "server", "guest", "guest"
    ]  # fmt: skip


def test_json_is_one_object_per_look(server):
    result = run_cli("top", "--socket", server, "--interval", "0.1", "--once", "--json")
    assert result.exit_code == 0
    (line,) = result.output.splitlines()
    view = json.loads(line)
    assert view["time"] <= time.time()
    channel = view["guests"][0]["channels"][0]
    assert channel["rates"]["packets_in"] == pytest.approx(1000 / view["interval"])


def test_a_terminal_gets_a_table_that_is_kept_up_to_date(server, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(top, "on_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    top.watch(view for view, _ in zip(top.look(server, 0.0), range(3), strict=False))
    assert terminal.getvalue().count("1 scsi") >= 2


def test_the_command_uses_the_table_on_a_terminal(server, monkeypatch):
    seen: list[ServerView] = []
    monkeypatch.setattr(top, "on_terminal", lambda: True)
    monkeypatch.setattr(top, "watch", seen.extend)
    assert run_cli("top", "--socket", server, "--interval", "0.1", "--once").exit_code == 0
    assert len(seen) == 1


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
