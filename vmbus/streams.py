"""Standard streams that cannot be relied on: closed ones, full ones, and readers that leave.

A program that prints is run with :func:`guarded`. A standard output that takes no more ends it
with exit code 1: with a message, like any other error, or without one if its reader has left. It
never ends with a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from vmbus.errors import leaves

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class OutputError(OSError):
    """Standard output has not taken what was written."""


class _Output(io.FileIO):
    """Standard output, which says so in its errors."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401  # any buffer
        """Write what goes. Raises OutputError."""
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror, "standard output") from None


def guarded(work: Callable[[], int]) -> int:
    """Run a program; returns its exit code, which is 1 if its output could not be written.

    Ctrl-C that nobody has caught is exit code 130.

    Args:
        work: Returns an exit code, or raises SystemExit with one. What it prints may raise
            OutputError, which it need not catch.
    """
    _open_all()
    try:
        try:
            code = work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt, BaseExceptionGroup) as error:
        causes = leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
        if any(isinstance(each, KeyboardInterrupt) for each in causes):
            return EXIT_INTERRUPTED
        lost = next((each for each in causes if isinstance(each, OutputError)), None)
        if lost is None:
            raise
        code = EXIT_FAILED
        # What could not be written waits in a buffer, and is tried once more at the very end.
        _discard(sys.stdout)
        if lost.errno != errno.EPIPE:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"Error: standard output: {lost.strerror}\n")
    try:
        sys.stderr.flush()
    except OSError:  # whom could it be told?
        _discard(sys.stderr)
    return code


def _open_all() -> None:
    """Make streams of those that are closed, or else the next file that is opened becomes one.

    From a closed input comes nothing. A closed output takes nothing, and says so: it is open for
    reading only. Messages have nowhere to go then, and do.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for good
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        old: TextIO | None = sys.stdout
        raw = _Output(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=old.encoding if old else None,
            errors=old.errors if old else None,
            line_buffering=raw.isatty(),
        )


def _discard(stream: TextIO) -> None:
    """Let everything that is written to a stream vanish from now on."""
    fd = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(fd, stream.fileno())
    finally:
        os.close(fd)
