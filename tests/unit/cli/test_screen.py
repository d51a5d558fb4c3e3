"""The terminal that is painted anew: keys, sizes, and that it is given back."""

import os
import pty
import signal
import sys
import termios
from contextlib import contextmanager, suppress

import pytest

from tests.support.cli import Terminal
from tests.support.patience import PATIENCE, SOON
from vmbus.cli.screen import ENTER, LEAVE, Quit, Screen, open_screen


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "4")
    return Terminal()


@contextmanager
def opened(terminal, monkeypatch):
    """The screen, on what is standard output for now."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with open_screen() as screen:
            yield screen


@contextmanager
def keyboard(monkeypatch):
    """Standard input is a terminal; yields the end at which keys are pressed, and the other."""
    master, slave = pty.openpty()
    with os.fdopen(slave) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield master, slave
    os.close(master)


def lines(text: str) -> list[str]:
    """What one painting shows."""
    assert text.startswith("\x1b[H")
    assert text.endswith("\x1b[J")
    return text.removeprefix("\x1b[H").removesuffix("\x1b[J").replace("\x1b[K", "").split("\r\n")


def test_lines_beyond_the_screen_are_counted(terminal):
    screen = Screen(terminal, None, -1)
    screen.show(lambda width: [str(width), "b", "c", "d"])
    assert lines(terminal.getvalue()) == ["20", "b", "c", "d"]
    terminal.truncate(0)
    terminal.seek(0)
    screen.show(lambda width: "abcdefg")
    assert lines(terminal.getvalue()) == ["a", "b", "c", "... 4 more lines"]


def test_another_size_is_painted_at_once(terminal, monkeypatch):
    with keyboard(monkeypatch) as (master, _), opened(terminal, monkeypatch) as screen:

        def paint(width):
            if width == 5:
                os.write(master, b"q")
            return ["x" * width]

        screen.show(paint)
        monkeypatch.setenv("COLUMNS", "5")
        os.kill(os.getpid(), signal.SIGWINCH)
        with pytest.raises(Quit):
            screen.wait(PATIENCE)
    painted = terminal.getvalue().removeprefix(ENTER).removesuffix(LEAVE)
    first, second = painted.split("\x1b[J")[:2]
    assert (lines(first + "\x1b[J"), lines(second + "\x1b[J")) == (["x" * 20], ["x" * 5])


def test_q_ends_the_wait_and_other_keys_do_not(terminal, monkeypatch):
    with keyboard(monkeypatch) as (master, _), opened(terminal, monkeypatch) as screen:
        os.write(master, b"x y")
        screen.wait(SOON)
        os.write(master, b"aq")
        with pytest.raises(Quit):
            screen.wait(PATIENCE)


def test_a_keyboard_that_is_hung_up_is_no_more_looked_at(terminal, monkeypatch):
    read, write = os.pipe()
    resized, waker = os.pipe()
    screen = Screen(terminal, read, resized)
    os.close(write)
    while screen._keys is not None:
        screen.wait(SOON)
    screen.wait(SOON)
    for fd in (read, resized, waker):
        os.close(fd)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit, None])
def test_the_terminal_is_given_back_as_it_was(terminal, monkeypatch, error):
    handlers = [signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTERM)]
    with keyboard(monkeypatch) as (_, slave):
        before = termios.tcgetattr(slave)
        with suppress(BaseException), opened(terminal, monkeypatch):
            assert terminal.getvalue() == ENTER
            during = termios.tcgetattr(slave)
            if error is not None:
                raise error
        assert during != before
        assert during[3] & termios.ISIG  # Ctrl-C is one still
        assert termios.tcgetattr(slave) == before
    assert terminal.getvalue() == ENTER + LEAVE
    assert handlers == [signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTERM)]


def test_sigterm_gives_it_back_too(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended, opened(terminal, monkeypatch) as screen:
        os.kill(os.getpid(), signal.SIGTERM)
        screen.wait(PATIENCE)
    assert ended.value.code == 128 + signal.SIGTERM
    assert terminal.getvalue().endswith(LEAVE)
