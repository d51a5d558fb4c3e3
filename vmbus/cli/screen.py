"""A terminal that is painted anew now and then, until somebody types q.

The other screen of the terminal is used, and given back: what stood there before stands there
again. A change of its size paints it at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TextIO

ENTER = "\x1b[?1049h\x1b[?25l"
"""The other screen, without a cursor (xterm's control sequences, which terminals share)."""
LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME = "\x1b[H"
_REST_OF_LINE = "\x1b[K"
_REST_OF_SCREEN = "\x1b[J"
QUIT = b"qQ"

Paint = Callable[[int], Sequence[str]]
"""Gets a width, and returns lines that are not wider."""


class Quit(Exception):  # noqa: N818  # no error
    """Somebody has typed q."""


class Screen:
    """What is painted, between :func:`open_screen` and its end.

    Args:
        output: The terminal.
        keys: Descriptor of the keyboard, or None if it is not this terminal's.
        resized: Descriptor that becomes readable when the terminal's size has changed.
    """

    def __init__(self, output: TextIO, keys: int | None, resized: int) -> None:
        self._output = output
        self._keys = keys
        self._resized = resized
        self._paint: Paint = lambda width: ()

    def show(self, paint: Paint) -> None:
        """Paint, and remember how, for another size. Raises OSError."""
        self._paint = paint
        self._repaint()

    def wait(self, seconds: float) -> None:
        """Wait, and paint anew if the size changes meanwhile.

        Raises:
            Quit: Somebody has typed q.
            OSError: The terminal is gone.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            watched = [fd for fd in (self._resized, self._keys) if fd is not None]
            ready, _, _ = select.select(watched, [], [], left)
            if self._resized in ready:
                os.read(self._resized, 4096)
                self._repaint()
            if self._keys in ready and self._keys is not None:
                typed = os.read(self._keys, 1024)
                if not typed:  # hung up
                    self._keys = None
                if any(key in QUIT for key in typed):
                    raise Quit

    def _repaint(self) -> None:
        width, height = shutil.get_terminal_size()
        lines = list(self._paint(width))
        if len(lines) > height:
            lines = [*lines[: height - 1], f"... {len(lines) - height + 1} more lines"[:width]]
        # No end of line after the last one: it would move everything up.
        painted = "\r\n".join(line + _REST_OF_LINE for line in lines)
        self._output.write(_HOME + painted + _REST_OF_SCREEN)
        self._output.flush()


@contextlib.contextmanager
def open_screen() -> Iterator[Screen]:
    """Use the terminal that is standard output for the length of a ``with`` block.

    Only from the main thread. SIGTERM ends the program as always, with the terminal as it was.
    """
    output = sys.stdout
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    with contextlib.ExitStack() as stack:
        resized, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, resized)
        stack.callback(os.close, waker)

        def wake(_number: int, _frame: FrameType | None) -> None:
            with contextlib.suppress(BlockingIOError):
                os.write(waker, b"\0")

        def end(number: int, _frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        stack.callback(signal.signal, signal.SIGWINCH, signal.signal(signal.SIGWINCH, wake))
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, end))
        if keys is not None:
            stack.callback(termios.tcsetattr, keys, termios.TCSADRAIN, termios.tcgetattr(keys))
            tty.setcbreak(keys, termios.TCSANOW)
        stack.callback(_write, output, LEAVE)
        _write(output, ENTER)
        yield Screen(output, keys, resized)


def _write(output: TextIO, text: str) -> None:
    output.write(text)
    output.flush()
