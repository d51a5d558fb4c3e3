"""Where a command that waits may be stopped: what the SCSI layer knows of pauses.

A command that cannot be answered on the spot runs in a task of its own, and whoever has started it
may want it to stand still: the guest is paused, and neither its memory nor the disk may be touched
until it goes on; or nobody waits for the command any more. That is said by a :class:`Pace`, a
property of the task. A command looks at it where it does not mind: before each call of the disk
(:class:`storvsp.scsi.medium.Medium` does that), between the pieces of a long one (:func:`step`),
and when it has waited for its turn. It gives its turn to others while it stands still.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Protocol

import trio

from storvsp.scsi.gate import EVERYWHERE, Gate


class Pace(Protocol):
    """Whether a command may act; see :class:`vmbus.host.undertakings.Undertaking`, which is one."""

    @property
    def held(self) -> bool:
        """Whether it has to wait before it acts."""

    @property
    def over(self) -> bool:
        """Whether it must not act any more."""

    @property
    def whose(self) -> Hashable:
        """Whose it is, where commands take turns; a channel."""

    @property
    def rest_wanted(self) -> bool:
        """Whether it is to come to rest, if it can while it acts."""

    @property
    def end_wanted(self) -> bool:
        """Whether it is to end, if it can while it acts."""

    def heed(self, told: Callable[[], None] | None) -> None:
        """Be told when, while it acts, one of these two changes."""

    async def wait_released(self) -> None:
        """Wait until it may act. A checkpoint if it has to. Raises trio.EndOfChannel."""

    async def enter(self) -> None:
        """Begin to act, when that is allowed. Raises trio.EndOfChannel."""

    def leave(self) -> None:
        """Come to rest."""

    async def rest(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Rest while something is waited for. A checkpoint. Raises trio.EndOfChannel."""


class _Free:
    """The pace of a command that nothing holds up."""

    held = False
    over = False
    whose = None
    rest_wanted = False
    end_wanted = False

    def heed(self, told: Callable[[], None] | None) -> None:
        """Nothing changes."""

    async def wait_released(self) -> None:
        """Nothing to wait for."""

    async def enter(self) -> None:
        """It may."""

    def leave(self) -> None:
        """Nobody minds."""

    async def rest(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait."""
        await wait()


FREE: Final[Pace] = _Free()
_pace: contextvars.ContextVar[Pace] = contextvars.ContextVar("pace", default=FREE)
_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("turn", default=None)


def keep_pace(pace: Pace) -> None:
    """Give this task a pace. Cannot block."""
    _pace.set(pace)


def current_pace() -> Pace:
    """Return the pace of this task."""
    return _pace.get()


class Turn:
    """A command's turn at a gate, for the length of an ``async with``.

    Args:
        gate: Which.
        exclusive: Alone, or beside others.
        initiator: Who sent the command; its channels take turns as well.
        where: The sections of the medium that it is about.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        exclusive: bool,
        initiator: Hashable = None,
        where: int = EVERYWHERE,
    ) -> None:
        self._gate = gate
        self._exclusive = exclusive
        self._where = where
        self._whose = (initiator, _pace.get().whose)
        self._inside = False

    async def enter(self) -> None:
        """Wait for it. A checkpoint if it has to."""
        await self._gate.acquire(exclusive=self._exclusive, whose=self._whose, where=self._where)
        self._inside = True

    def leave(self) -> None:
        """Let others have theirs. Idempotent. Cannot block."""
        if self._inside:
            self._inside = False
            self._gate.release(exclusive=self._exclusive, where=self._where)

    async def __aenter__(self) -> None:
        _turn.set(self)
        await self.enter()

    async def __aexit__(self, *_: object) -> None:
        _turn.set(None)
        self.leave()


async def may_act() -> None:
    """Return when this task's command may act. A checkpoint if it has to wait.

    Raises:
        trio.EndOfChannel: It must not act any more.
    """
    pace = _pace.get()
    if pace.over:
        raise trio.EndOfChannel
    while pace.held:
        turn = _turn.get()
        if turn is None:
            await pace.wait_released()
        else:  # others may use the medium meanwhile, another guest perhaps
            turn.leave()
            await pace.wait_released()
            await turn.enter()


async def step() -> None:
    """Let others run between two pieces of a long command, and stand still if need be.

    A checkpoint: an aborted command ends here.

    Raises:
        trio.EndOfChannel: It must not act any more.
    """
    await trio.lowlevel.checkpoint()
    await may_act()
