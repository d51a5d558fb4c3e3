"""Programs that do not outlive us, however we end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

_GUARD = "read -r _; kill -9 0"
"""Waits for the other end of its standard input, which is ours, to close; ends its whole group."""


def end_in_order() -> None:
    """Make the signals that end programs unwind ours, so that everything is cleared away."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    # A shell has what it starts in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def contained(command: Sequence[str | os.PathLike[str]], **options: Any) -> Iterator[Any]:
    """Run a program; at the end, kill it and all that it has started.

    That happens even if we are killed: a shell, which nobody would think of killing, waits for it.
    The shell is there first, and the program is in its group, so there is no moment in between.

    Args:
        command: The program and its arguments.
        options: For :class:`subprocess.Popen`.

    Yields:
        The process, a :class:`subprocess.Popen`.
    """
    guard = subprocess.Popen(["sh", "-c", _GUARD], stdin=subprocess.PIPE, process_group=0)
    process: subprocess.Popen[Any] | None = None
    try:
        process = subprocess.Popen(command, process_group=guard.pid, **options)
        yield process
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.communicate()
        if process is not None:
            process.wait()
