"""Where traces go: files, which follow each other if there is to be an end to them, or a ring."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

MIN_ROTATION = 64 << 10
"""Bytes."""
BUFFER = 64 << 10
"""Bytes that wait to be written; a process that is killed loses them."""
SEGMENTS = 16
"""Of a ring: its oldest one goes when there is no room."""


class FileSink:
    """A file, or several, one after the other.

    What is in a file is whole blocks, whatever happens: a write that fails half-way is taken back,
    and what could not be written is counted. The next write tries again, so a disk that was full
    costs a gap and not the rest of the trace.

    Args:
        path: The file; it is made anew. With a rotation the first one has this name, and the
            next ones ``.0001`` and so on before its suffix.
        size: Bytes after which another file begins; 0: never.
        span: Seconds after which another one begins; 0: never.
        files: So many are kept, and the oldest are removed; 0: all.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int = 0,
        span: float = 0,
        files: int = 0,
    ) -> None:
        self.path = Path(path)
        self.full = False
        self.failure = ""
        """Why something was lost last; empty if all is well."""
        self.records = 0
        """Written."""
        self.lost = 0
        """Records lost, in all."""
        self._size = max(size, MIN_ROTATION) if size else 0
        self._span = round(span * 1e9)
        self._keep = files
        self._kept: deque[Path] = deque()
        self._turn = 0
        self._end = 0
        """When the next file begins."""
        self._written = 0
        """Bytes in this file, whole blocks."""
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._waiting = 0
        """Records in the buffer."""
        self._untold = 0
        self._broken = False
        self._file = self._open(self.path)
        self._rotate = False

    def _open(self, path: Path) -> int:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._kept.append(path)
        return file

    def begin(self, time_ns: int) -> None:
        """See :class:`vmbus.trace.writer.Sink`."""
        if self._rotate:
            self._next()
        self.full = self._rotate = False
        self._end = time_ns + self._span if self._span else 0

    def _next(self) -> None:
        self.flush()
        self._turn += 1
        path = self.path.with_name(f"{self.path.stem}.{self._turn:04}{self.path.suffix}")
        try:
            file = self._open(path)
        except OSError as error:
            # The old one goes on, larger than it was to be.
            self._fail(error.strerror or str(error), 0)
            return
        os.close(self._file)
        self._file, self._written = file, 0
        while self._keep and len(self._kept) > self._keep:
            self._kept.popleft().unlink(missing_ok=True)

    def write(self, data: bytes, records: int) -> None:
        """See :class:`vmbus.trace.writer.Sink`."""
        self._buffer.append(data)
        self._buffered += len(data)
        self._waiting += records
        if self._buffered >= BUFFER:
            self.flush()
        if self._size and self._written + self._buffered >= self._size:
            self.full = self._rotate = True

    def look_at_clock(self, time_ns: int) -> None:
        """Begin another file with the next record, if it is time to. Cannot block."""
        if self._end and time_ns >= self._end:
            self.full = self._rotate = True

    def flush(self) -> None:
        """Write what waits. Blocks as writing does. Never raises."""
        if not self._buffer:
            return
        data, records = b"".join(self._buffer), self._waiting
        self._buffer.clear()
        self._buffered = self._waiting = 0
        if self._broken:
            self._fail("half a block is in a pipe", records)
            return
        done = 0
        try:
            view = memoryview(data)
            while done < len(data):
                done += os.write(self._file, view[done:])
        except OSError as error:
            self._fail(error.strerror or str(error), records)
            if done:
                self._take_back()
            return
        self._written += done
        self.records += records
        self.failure = ""

    def _fail(self, why: str, records: int) -> None:
        self.failure = why
        self._untold += records
        self.lost += records
        # Whatever was described in what is lost has to be described again.
        self.full = True

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._file, self._written)
            os.lseek(self._file, self._written, os.SEEK_SET)
        except OSError:
            # A pipe. Who reads it finds the end of a block missing, as if we had been killed, and
            # would take nothing that follows for a block.
            self._broken = True

    def take_lost(self) -> tuple[int, str]:
        """See :class:`vmbus.trace.writer.Sink`."""
        lost, self._untold = self._untold, 0
        return lost, self.failure or "they could not be written"

    def close(self) -> None:
        """Write what waits, and close the file. Blocks. Idempotent."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1


class RingSink:
    """The end of a trace in memory, of so many bytes.

    Args:
        size: Bytes; the oldest go if there are more.
    """

    def __init__(self, size: int) -> None:
        self.full = False
        self._part = max(size // SEGMENTS, MIN_ROTATION)
        self._size = size
        self._segments: deque[list[bytes]] = deque()
        self._sizes: deque[int] = deque()

    def begin(self, time_ns: int) -> None:
        """See :class:`vmbus.trace.writer.Sink`."""
        del time_ns
        self.full = False
        self._segments.append([])
        self._sizes.append(0)
        while len(self._sizes) > 1 and sum(self._sizes) + self._part > self._size:
            self._segments.popleft()
            self._sizes.popleft()

    def write(self, data: bytes, records: int) -> None:
        """See :class:`vmbus.trace.writer.Sink`."""
        del records
        self._segments[-1].append(data)
        self._sizes[-1] += len(data)
        if self._sizes[-1] >= self._part:
            self.full = True

    def take_lost(self) -> tuple[int, str]:
        """See :class:`vmbus.trace.writer.Sink`: what has gone is older than the rest."""
        return 0, ""

    def __len__(self) -> int:
        """Return how many bytes are here."""
        return sum(self._sizes)

    def pieces(self) -> Iterator[bytes]:
        """Yield what is here, the oldest first. Cannot block."""
        for segment in self._segments:
            yield from segment

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write what is here to a file, which is made anew. Blocks. What is here stays.

        Returns:
            Bytes written.

        Raises:
            OSError: It cannot be written.
        """
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        done = 0
        with open(file, "wb") as out:
            for piece in self.pieces():
                done += out.write(piece)
        return done
