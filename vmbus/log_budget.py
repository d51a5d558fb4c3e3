"""How much a guest or a peer may make us log."""

from __future__ import annotations

import trio

BURST = 20
"""Lines of one kind that are logged one by one."""
INTERVAL = 10.0
"""Seconds until one line more may be logged: some 8 600 a day, which no disk minds."""


class LogBudget:
    """Decides about each line of one kind: a burst is let through, then one every so often.

    A guest can break rules, connect and open channels as often as it likes. Leaving out all but
    every n-th line would still let it fill the disk, only n times slower.
    """

    def __init__(self, *, burst: int = BURST, interval: float = INTERVAL) -> None:
        self._burst = burst
        self._interval = interval
        self._left = float(burst)
        self._left_out = 0
        self._since = trio.current_time()

    def spend(self) -> bool:
        """Whether the next line may be logged; counts it. Cannot block."""
        now = trio.current_time()
        self._left = min(self._burst, self._left + (now - self._since) / self._interval)
        self._since = now
        if self._left < 1:
            self._left_out += 1
            return False
        self._left -= 1
        return True

    def left_out(self) -> str:
        """Return the words about lines left out since this was last asked; usually none."""
        count, self._left_out = self._left_out, 0
        return f" ({count} lines like this were left out)" if count else ""
