"""Requests of a channel that take their time: weighed, held while the partition is paused, named.

A device answers most requests on the spot. What it cannot is an *undertaking*: it holds memory of
the host while it waits, it may touch guest memory at any moment, and it may never end if what is
behind the device is dead. So

* each has a **weight**, the bytes of host memory that it holds; beyond :data:`CHANNEL_LOAD` for a
  channel and :data:`DEVICE_LOAD` for all channels of a device, no more packets are read until some
  have ended. A guest only finds its ring full for a while;
* each says when it **acts**, that is, touches guest memory or has somebody else do it. A pause
  does not wait for those that rest, and those that rest do not begin to act before the resume;
* each can say **what** it is, so that one that does not come back is known by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Hashable, Sequence

import trio

from vmbus.host.waking import WAKES_AT_ONCE, Waiting

CHANNEL_LOAD = 16 << 20
"""Bytes of host memory that undertakings of one channel may hold before it is read no more."""
DEVICE_LOAD = 64 << 20
"""The same for all channels of a device together."""

NAMED = 3
"""Requests that are named when they do not come back; of more, how many there are."""


def not_back(names: Sequence[str], seconds: float, otherwise: str = "a device") -> str:
    """Say in a line what has not come back in time.

    Args:
        names: What it is, each.
        seconds: How long it was waited for.
        otherwise: What it is if there are no names.
    """
    text = "; ".join(names[:NAMED]) or otherwise
    if len(names) > NAMED:
        text += f" and {len(names) - NAMED} more"
    return f"{text}: not back in {seconds:g} s"


class Load:
    """What undertakings hold, and whether that is enough.

    Args:
        limit: Bytes from which on there should be no more.
        lighter: Called when there may be more again; cannot block.
    """

    def __init__(self, limit: int, lighter: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.total = 0
        self.full = False
        """Whether this, or what it is part of, has reached its limit."""
        self._lighter = lighter
        self._whole: Load | None = None
        self._parts: dict[Load, None] = {}

    def part_of(self, whole: Load | None) -> None:
        """Be part of a larger one from now on, or of none. Cannot block."""
        if self._whole is not None:
            del self._whole._parts[self]
            self._whole.change(-self.total)
        self._whole = whole
        if whole is not None:
            whole._parts[self] = None
            whole.change(self.total)
        self._judge()

    def change(self, weight: int) -> None:
        """Add a weight, or take it away. Cannot block."""
        self.total += weight
        if self._whole is not None:
            self._whole.change(weight)
        self._judge()

    def _judge(self) -> None:
        full = self.total >= self.limit or (self._whole is not None and self._whole.full)
        if full is not self.full:
            self.full = full
            for part in tuple(self._parts):
                part._judge()
            if not full:
                self._lighter()


class Undertakings:
    """Those of one channel.

    Args:
        settled: Called when one has come to rest or has ended; cannot block.
        lighter: Called when more may be begun again; cannot block.

    Attributes:
        load: What they hold.
        resting: How many there are that do not act.
    """

    def __init__(self, settled: Callable[[], None], lighter: Callable[[], None]) -> None:
        self.load = Load(CHANNEL_LOAD, lighter)
        self.resting = 0
        self._settled = settled
        self._acting: dict[Undertaking, None] = {}
        self._waits: dict[trio.CancelScope, None] = {}
        self._held = False
        self._waiting = Waiting()
        self._over = False

    def begin(self, weight: int, name: Callable[[], str]) -> Undertaking:
        """Begin one, at rest. Cannot block.

        Args:
            weight: Bytes of host memory that it holds.
            name: Says what it is, for people.
        """
        return Undertaking(self, weight, name)

    @property
    def held(self) -> bool:
        """Whether nothing may begin to act, here or without an undertaking."""
        return self._held

    async def wait_released(self) -> None:
        """Wait until something may begin to act. A checkpoint if it has to.

        Raises:
            trio.EndOfChannel: Nothing ever may again.
        """
        while self._held and not self._over:
            await self._waiting.wait()
        if self._over:
            raise trio.EndOfChannel

    def hold(self) -> None:
        """Internal: let none that rests begin to act. Cannot block."""
        if not self._held and not self._over:
            self._held = True
            self._waiting.stop()
            self._tell()

    def go_on(self) -> None:
        """Internal: undo :meth:`hold`: those that wait go on, some in each turn. Cannot block."""
        if self._held:
            self._held = False
            self._waiting.wake()
            self._tell()

    def _tell(self) -> None:
        """Tell those that act, and want to know, that something else is wanted of them."""
        for each in tuple(self._acting):
            if each._told is not None:
                each._told()

    def end(self) -> None:
        """Internal: the channel is over: none that rests will act any more. Cannot block."""
        self._over = True
        self._held = False
        self._waiting.wake()
        self._tell()
        self._end_waits()
        if self._waits:
            trio.lowlevel.spawn_system_task(self._end_other_waits)

    def _end_waits(self) -> None:
        for scope in [*itertools.islice(self._waits, WAKES_AT_ONCE)]:
            del self._waits[scope]
            scope.cancel()

    async def _end_other_waits(self) -> None:
        while self._waits:
            await trio.lowlevel.checkpoint()
            self._end_waits()

    @property
    def names(self) -> list[str]:
        """What those that act are."""
        return [each.name() for each in self._acting]


class Undertaking:
    """A request that takes its time. Made by :meth:`Undertakings.begin`.

    Attributes:
        name: Says what it is, for people.
    """

    __slots__ = ("_all", "_depth", "_told", "_weight", "name")

    def __init__(self, all_of_them: Undertakings, weight: int, name: Callable[[], str]) -> None:
        self.name = name
        self._all = all_of_them
        self._weight = weight
        self._depth = 0
        self._told: Callable[[], None] | None = None
        all_of_them.load.change(weight)
        all_of_them.resting += 1

    @property
    def held(self) -> bool:
        """Whether it has to wait before it acts."""
        return not self._depth and self._all._held

    @property
    def over(self) -> bool:
        """Whether it must not act any more, because the channel is over."""
        return not self._depth and self._all._over

    @property
    def whose(self) -> Hashable:
        """What is the same for all of one channel, and for no others."""
        return self._all

    @property
    def rest_wanted(self) -> bool:
        """Whether a pause waits for it to come to rest, or will if it acts."""
        return self._all._held

    @property
    def end_wanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._all._over

    def heed(self, told: Callable[[], None] | None) -> None:
        """Be told when, while it acts, what is wanted of it changes. Cannot block.

        For one that can be interrupted in an action.

        Args:
            told: Called then; cannot block. None: nobody wants to know.
        """
        self._told = told

    async def wait_released(self) -> None:
        """Wait until it may act. A checkpoint if it has to.

        Raises:
            trio.EndOfChannel: It never may again.
        """
        await self._all.wait_released()

    async def enter(self) -> None:
        """Begin to act, when that is allowed. A checkpoint if it has to wait.

        What is within one action is part of it: it neither waits nor is refused.

        Raises:
            trio.EndOfChannel: It must not act any more.
        """
        if not self._depth:
            if self._all._held or self._all._over:
                await self.wait_released()
            self._all.resting -= 1
            self._all._acting[self] = None
        self._depth += 1

    def leave(self) -> None:
        """Come to rest. Cannot block."""
        self._depth -= 1
        if not self._depth:
            del self._all._acting[self]
            self._all.resting += 1
            self._all._settled()

    async def rest(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Rest while something is waited for, also in the middle of an action. A checkpoint.

        Raises:
            trio.EndOfChannel: The channel has ended meanwhile.
        """
        depth = self._depth
        if depth:
            self._depth = 1
            self.leave()
        try:
            with trio.CancelScope() as scope:
                self._all._waits[scope] = None
                try:
                    if self._all._over:
                        scope.cancel()
                    await wait()
                finally:
                    self._all._waits.pop(scope, None)
            if scope.cancelled_caught:
                raise trio.EndOfChannel
            if depth:
                await self.wait_released()
        finally:
            if depth:
                self._all.resting -= 1
                self._all._acting[self] = None
                self._depth = depth

    def end(self) -> None:
        """It has ended, at rest. Cannot block."""
        self._all.resting -= 1
        self._all.load.change(-self._weight)
