"""The processes of ``vmbus demo``: how they are started, heard, and made to end."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

import trio

LISTENING = "listening on"
"""What the server logs when guests may connect."""
SILENCE = 20.0
"""Seconds after which a guest that says nothing is taken for hung."""
GRACE = 10.0
"""Seconds a process has to end."""
_KEPT_LINES = 50


class Child:
    """A process whose standard error is kept.

    Args:
        name: What to call it.
        arguments: Of this Python.
        log: File that gets its standard error.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        """What it wrote to standard error, of late."""
        self._log = log
        self._process: trio.Process | None = None

    async def start(self, *, stdout: int) -> trio.Process:
        """Start it, out of reach of the terminal's Ctrl-C: its end is our business."""
        self._process = await trio.lowlevel.open_process(
            [sys.executable, *self.arguments],
            stdin=DEVNULL,
            stdout=stdout,
            stderr=PIPE,
            start_new_session=True,
        )
        return self._process

    @property
    def returncode(self) -> int | None:
        """Exit code, or None if it runs or was never started."""
        return self._process.returncode if self._process is not None else None

    async def follow(self, heard: Callable[[str], None]) -> None:
        """Keep its standard error, line by line, and pass each to ``heard``; until its end."""
        assert self._process is not None
        assert self._process.stderr is not None
        lines = Lines(self._process.stderr)
        with self._log.open("w", encoding="utf-8") as log:
            while (line := await lines.next()) is not None:
                log.write(line + "\n")
                log.flush()
                self.lines.append(line)
                heard(line)

    async def wait(self) -> None:
        """Wait for its end."""
        assert self._process is not None
        await self._process.wait()

    async def end(self) -> None:
        """Make it end: first politely, then not. Does nothing if it has ended."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        with trio.move_on_after(GRACE):
            await process.wait()
            return
        process.kill()
        await process.wait()


class Lines:
    """The lines of a stream, the last one even without its end."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._ready: deque[bytes] = deque()
        self._rest = b""

    async def next(self) -> str | None:
        """Return the next line, None at the end. A checkpoint if it has to wait."""
        while not self._ready:
            chunk = await self._stream.receive_some()
            if not chunk and not self._rest:
                return None
            # At the end, the rest is a line.
            *lines, self._rest = (self._rest + (chunk or b"\n")).split(b"\n")
            self._ready.extend(lines)
        return self._ready.popleft().decode("utf-8", "replace")


def how(returncode: int | None) -> str:
    """Say in words how a process has ended."""
    if returncode is None:
        return "had to be ended"
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"
