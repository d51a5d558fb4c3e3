"""Memory between a shared unit and its keeper.

It is made and sealed by whoever brings both together, so neither end can pull it away from under
the other.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque

import trio

PAGE = 4096


class Staging:
    """A mapped staging area, and which parts of it are in use. Takes the descriptor over.

    Args:
        fd: A sealed memfd.
    """

    def __init__(self, fd: int) -> None:
        try:
            self.size = os.fstat(fd).st_size
            self._map = mmap.mmap(fd, self.size)
        finally:
            os.close(fd)
        self.view = memoryview(self._map)
        self._free: list[tuple[int, int]] = [(0, self.size)]
        """Offset and length of the gaps, in order."""
        self._waiting: deque[trio.Event] = deque()

    async def take(self, length: int) -> int:
        """Return the offset of a part of its own. A checkpoint if there is none free. In turn.

        Args:
            length: Bytes, at most :attr:`size`.
        """
        length = max(length, 1) + -length % PAGE
        if self._waiting or (offset := self._find(length)) is None:
            turn = trio.Event()
            self._waiting.append(turn)
            try:
                if self._waiting[0] is not turn:
                    await turn.wait()
                while (offset := self._find(length)) is None:
                    turn = self._waiting[0] = trio.Event()
                    await turn.wait()
            finally:
                self._waiting.remove(turn)
                self._wake()
        return offset

    def _find(self, length: int) -> int | None:
        for at, (offset, room) in enumerate(self._free):
            if room >= length:
                if room == length:
                    del self._free[at]
                else:
                    self._free[at] = (offset + length, room - length)
                return offset
        return None

    def give(self, offset: int, length: int) -> None:
        """Give a part back. Cannot block."""
        length = max(length, 1) + -length % PAGE
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, length)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].set()

    def close(self) -> None:
        """Give the mapping up; it goes when nobody has a part of it any more."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
