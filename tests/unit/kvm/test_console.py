"""The console on pipes and terminals."""

from __future__ import annotations

import os
import pty
import threading

import pytest

from tests.support.patience import PATIENCE
from vmbus.kvm.console import Console


class Guest:
    """Takes input, a few bytes at a time if told to."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.data = b""
        self.changed = threading.Condition()

    def receive(self, data: bytes) -> int:
        with self.changed:
            taken = data[: self.room]
            self.room -= len(taken)
            self.data += taken
            self.changed.notify_all()
            return len(taken)

    def wait(self, data: bytes) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.data == data, PATIENCE), self.data


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        try:
            os.close(fd)
        except OSError:
            continue


def no_escape() -> None:
    raise AssertionError("nobody typed the escape key")


def test_piped_input_reaches_the_guest_escape_characters_and_all(pipe):
    guest = Guest()
    console = Console(pipe[0], 1, no_escape)

    assert not console.interactive
    with console.attached(guest.receive):
        os.write(pipe[1], b"ls\x1d\n")
        guest.wait(b"ls\x1d\n")


def test_the_end_of_the_input_is_not_the_end_of_the_guest(pipe):
    guest = Guest()
    os.write(pipe[1], b"last")
    os.close(pipe[1])

    with Console(pipe[0], 1, no_escape).attached(guest.receive):
        guest.wait(b"last")


def test_what_the_guest_does_not_take_is_offered_when_it_has_room(pipe):
    guest = Guest(room=3)
    console = Console(pipe[0], 1, no_escape)

    with console.attached(guest.receive):
        os.write(pipe[1], b"abcdef")
        guest.wait(b"abc")
        guest.room = 3
        console.drained()
        guest.wait(b"abcdef")


def test_leaving_does_not_wait_for_a_guest_that_takes_nothing(pipe):
    guest = Guest(room=1)
    os.write(pipe[1], b"abc")

    with Console(pipe[0], 1, no_escape).attached(guest.receive):
        guest.wait(b"a")


def test_output_is_written_whole_and_nobody_has_to_read_it(pipe):
    console = Console(0, pipe[1], no_escape)

    console.transmit(b"boot\n")
    assert os.read(pipe[0], 100) == b"boot\n"
    os.close(pipe[0])
    console.transmit(b"unheard")


def test_output_waits_for_a_reader_that_is_slow(pipe):
    os.set_blocking(pipe[1], False)
    console = Console(0, pipe[1], no_escape)
    data = bytes(200_000)
    thread = threading.Thread(target=console.transmit, args=(data,))
    thread.start()

    got = b""
    while len(got) < len(data):
        got += os.read(pipe[0], 65536)

    thread.join(PATIENCE)
    assert got == data


def test_the_escape_key_is_heard_on_a_terminal_and_the_terminal_restored():
    ours, theirs = pty.openpty()
    escaped = threading.Event()
    guest = Guest()
    try:
        import termios

        before = termios.tcgetattr(theirs)
        console = Console(theirs, 1, escaped.set)
        assert console.interactive
        with console.attached(guest.receive):
            os.write(ours, b"x\x03\x1dy")
            assert escaped.wait(PATIENCE)
        assert guest.data == b"x\x03"
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_that_is_hung_up_ends_the_input():
    ours, theirs = pty.openpty()
    console = Console(theirs, 1, no_escape)
    console._interactive = False
    with console.attached(Guest().receive):
        os.close(ours)
        console._thread.join(PATIENCE)
        assert not console._thread.is_alive()
    os.close(theirs)


def test_output_that_is_not_taken_is_said_once_and_does_not_end_the_guest(caplog):
    with open("/dev/full", "wb") as full:
        console = Console(0, full.fileno(), no_escape)
        console.transmit(b"a")
        console.transmit(b"b")
    assert caplog.messages == ["the console cannot be shown: No space left on device"]
