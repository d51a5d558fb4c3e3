"""Frames that wait for a port: a line for each sender, served in turn.

One queue for all would belong to whoever sends most: a neighbour's frames would find it full. Here
a full queue takes from the longest line. Turns are measured in bytes, as in deficit round robin
(Shreedhar, Varghese 1995), with the deficit paid afterwards, so that no frame is looked at twice.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from netvsp.frames.frame import Frame

S = TypeVar("S")

LIMIT = 4 << 20
"""Weight of all that waits for a port."""
OVERHEAD = 1024
"""Weight of a frame beside its bytes: what its objects take, and what it costs to handle."""
QUANTUM = 16 << 10
"""Weight of a turn."""


class _Line(Generic[S]):
    __slots__ = ("credit", "frames", "source", "weight")

    def __init__(self, source: S, credit: int) -> None:
        self.source = source
        self.frames: deque[tuple[Frame, int]] = deque()
        """Each with its weight."""
        self.weight = 0
        self.credit = credit


class FairQueue(Generic[S]):
    """Frames by sender.

    Args:
        limit: Weight of all.

    Attributes:
        count: How many there are.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lines: dict[S, _Line[S]] = {}
        self._turns: deque[_Line[S]] = deque()
        self._debts: dict[S, int] = {}
        """Of those who have nothing here now, while others have: else one whose frames are long
        would have a turn with each."""
        self._weight = 0
        self.count = 0

    def push(self, source: S, frame: Frame, length: int) -> int:
        """Put a frame behind those of the same sender. Cannot block.

        Args:
            source: The sender.
            frame: Kept until it is taken or dropped.
            length: Its bytes.

        Returns:
            How many frames had to go for it: usually none, or the frame itself, or some of a
            sender who has more here.
        """
        weight = length + OVERHEAD
        line = self._lines.get(source)
        gone = 0
        if self._weight + weight > self._limit:
            own = line.weight if line is not None else 0
            if (own + weight) * (len(self._lines) + (line is None)) > self._limit:
                return 1
            while self._weight + weight > self._limit:
                longest = max(self._turns, key=_weight_of)
                if longest is line or longest.weight <= own + weight:
                    return gone + 1
                self._drop_last(longest)
                gone += 1
            line = self._lines.get(source)
        if line is None:
            line = self._lines[source] = _Line(source, self._debts.pop(source, QUANTUM))
            self._turns.append(line)
        line.frames.append((frame, weight))
        line.weight += weight
        self._weight += weight
        self.count += 1
        return gone

    def _drop_last(self, line: _Line[S]) -> None:
        _, weight = line.frames.pop()
        line.weight -= weight
        self._weight -= weight
        self.count -= 1
        if not line.frames:
            del self._lines[line.source]
            self._turns.remove(line)

    def pop(self, frames: int, size: int) -> list[Frame]:
        """Take frames out, each sender's in order. Cannot block.

        Args:
            frames: How many at most.
            size: Bytes at most, but for the first one.

        Returns:
            One at least, if there are any.
        """
        turns = self._turns
        taken: list[Frame] = []
        while turns and len(taken) < frames:
            line = turns[0]
            if line.credit <= 0:
                line.credit += QUANTUM
                turns.rotate(-1)
                continue
            waiting = line.frames
            frame, weight = waiting[0]
            size -= weight - OVERHEAD
            if size < 0 and taken:
                break
            waiting.popleft()
            taken.append(frame)
            line.credit -= weight
            line.weight -= weight
            self._weight -= weight
            if not waiting:
                turns.popleft()
                del self._lines[line.source]
                if line.credit < 0:
                    self._debts[line.source] = line.credit
        if not turns:
            self._debts.clear()
        self.count -= len(taken)
        return taken

    def forget(self, source: S) -> None:
        """Drop what a sender has here. Cannot block."""
        self._debts.pop(source, None)
        line = self._lines.pop(source, None)
        if line is not None:
            self._turns.remove(line)
            self._weight -= line.weight
            self.count -= len(line.frames)

    def clear(self) -> None:
        """Drop everything. Cannot block."""
        self._lines.clear()
        self._turns.clear()
        self._debts.clear()
        self._weight = self.count = 0


def _weight_of(line: _Line[S]) -> int:
    return line.weight
