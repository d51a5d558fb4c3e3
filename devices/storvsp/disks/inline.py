"""When a write into the page cache may be made on the loop's own thread.

Such a write is a copy into memory, most of the time, and handing it to a worker costs several times
as much. Now and then it waits all the same: for a page to be read that it covers in part, for the
file system's journal, or because too much of the machine's memory is dirty already. A file system
that can be asked not to wait (RWF_NOWAIT: XFS and btrfs since Linux 6.0) is asked; ext4 cannot. So
writes are timed, and after a slow one the next ones go to the workers, ever more of them as long as
those that are tried again are slow too: a disk that waits takes a small share of the loop's time.
"""

from __future__ import annotations

BASE_ALLOWANCE = 0.002
"""Seconds that a write may take, and be called quick."""
ALLOWANCE_PER_BYTE = 1e-8
"""Seconds in addition: 100 MB/s, far below the speed of a copy in memory."""
FIRST_PENALTY = 4
"""Writes that go to workers after a slow one."""
MAX_PENALTY = 1 << 14


class InlineWrites:
    """Decides for one disk. Ask :meth:`allowed` before each write, and tell :meth:`took` after."""

    __slots__ = ("_penalty", "_quick", "_skip")

    def __init__(self) -> None:
        self._skip = 0
        """Writes that still have to go to workers."""
        self._penalty = 0
        """How many did after the last slow one."""
        self._quick = 0
        """Quick ones since."""

    def allowed(self) -> bool:
        """Whether the next write may be made here. Counts it as made elsewhere if not."""
        if self._skip:
            self._skip -= 1
            return False
        return True

    def took(self, seconds: float, length: int) -> None:
        """Learn from a write that was made here.

        Args:
            seconds: How long it took.
            length: Bytes.
        """
        if seconds > BASE_ALLOWANCE + length * ALLOWANCE_PER_BYTE:
            self._penalty = min(max(self._penalty * 2, FIRST_PENALTY), MAX_PENALTY)
            self._skip = self._penalty
            self._quick = 0
        elif self._penalty:
            self._quick += 1
            if self._quick >= self._penalty:
                self._penalty = self._quick = 0
