"""Tasks that wait for the same, woken some at a time.

A guest can have thousands of requests that stand still. Each that goes on does a piece of work
before it waits again, and all of them at once would be one turn of the loop, in which nobody else
is served. All that wait in one trio run share what is woken in a turn, and take turns.
"""

from __future__ import annotations

from collections import deque

import trio

WAKES_AT_ONCE = 32
"""Tasks that are woken in one turn of the loop."""
PART = 8
"""Of those, tasks that wait for the same, before others have their turn."""


class Waiting:
    """Those who wait until they may go on. First come, first woken."""

    def __init__(self) -> None:
        self._lot = trio.lowlevel.ParkingLot()
        self._left = 0
        """How many are to be woken still."""
        self._in_turn = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._lot)

    async def wait(self) -> None:
        """Wait to be woken. A checkpoint.

        What was waited for may be over again: look, and wait again if so.
        """
        await self._lot.park()

    def wake(self) -> None:
        """Wake those who wait now, in turns of the loop to come. Cannot block."""
        self._left = len(self._lot)
        if self._left and not self._in_turn:
            self._in_turn = True
            _waker().add(self)

    def stop(self) -> None:
        """Let those who have not been woken yet wait on. Cannot block."""
        self._left = 0

    def wake_some(self, most: int) -> int:
        """Wake the first ones. For this module.

        Returns:
            How many.
        """
        # Some may have been cancelled meanwhile.
        count = min(most, self._left, len(self._lot))
        self._lot.unpark(count=count)
        self._left = min(self._left - count, len(self._lot))
        return count

    def go_on(self) -> bool:
        """Whether there are more to be woken. For this module."""
        self._in_turn = self._left > 0
        return self._in_turn


class _Waker:
    """Wakes those of one trio run."""

    def __init__(self) -> None:
        self._turns: deque[Waiting] = deque()
        self._running = False

    def add(self, waiting: Waiting) -> None:
        """Have those who wait there woken as well. Cannot block."""
        self._turns.append(waiting)
        if not self._running:
            self._running = True
            trio.lowlevel.spawn_system_task(self._run)

    async def _run(self) -> None:
        try:
            while self._turns:
                left = WAKES_AT_ONCE
                while left and self._turns:
                    waiting = self._turns.popleft()
                    left -= waiting.wake_some(min(left, PART))
                    if waiting.go_on():
                        self._turns.append(waiting)
                await trio.lowlevel.checkpoint()
        finally:
            self._running = False


_wakers: trio.lowlevel.RunVar[_Waker] = trio.lowlevel.RunVar("vmbus waker")


def _waker() -> _Waker:
    try:
        return _wakers.get()
    except LookupError:
        made = _Waker()
        _wakers.set(made)
        return made
