"""Who may connect and what may be kept: nobody is locked out by those who do nothing, or too much.

A connection that has not said HELLO costs little and may be anybody's, so those are counted apart,
and the oldest goes when there are too many. Beyond ``max_connections`` a HELLO is refused, unless a
connection can be found that keeps a place and does nothing with it.
"""

from __future__ import annotations

import errno
import resource
from typing import Protocol

import trio

from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import GoodbyeReason
from vmbus.attach.protocol.messages import Number, State
from vmbus.attach.protocol.to_server import Goodbye
from vmbus.attach.server.link import Link, ServerLimits

_RESERVE = 64
_WITHOUT_GUEST = frozenset({State.GREETED, State.DESCRIBED, State.OPERATOR})


def is_idle(link: Link, seconds: float) -> bool:
    """Whether ``link`` has no guest and has asked for nothing in ``seconds``."""
    return (
        link.session.state in _WITHOUT_GUEST
        and not link.working
        and trio.current_time() - link.heard >= seconds
    )


def dismiss(link: Link, why: str) -> None:
    """Say goodbye and close. Cannot block."""
    link.request_soon(Number.GOODBYE, Goodbye(GoodbyeReason.NORMAL).encode(), [], lambda _: None)
    link.finish(why)


class Places:
    """The connections of one server. Nothing here blocks.

    Args:
        limits: ``max_connections``, ``max_silent``, and ``hello_timeout``, which is also how long a
            connection may be idle before it can lose its place.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._silent: dict[Link, None] = {}
        self._greeted: dict[Link, None] = {}

    def arrive(self, link: Link) -> None:
        """A connection was accepted; the oldest silent one may have to go for it."""
        self._silent[link] = None
        while len(self._silent) > self._limits.max_silent:
            oldest = next(iter(self._silent))
            self.leave(oldest)
            oldest.fail(f"no HELLO, and {self._limits.max_silent} others wait to say theirs")

    def greet(self, link: Link) -> None:
        """It says HELLO; it has a place unless :meth:`refuse` is called.

        Raises:
            PeerProtocolError: EAGAIN, there is no place; it may try again.
        """
        limit = self._limits.max_connections
        if len(self._greeted) >= limit:
            idle = [each for each in self._greeted if is_idle(each, self._limits.hello_timeout)]
            require(
                idle,
                f"HELLO: {limit} connections are served, which is the limit; try again later",
                errno.EAGAIN,
            )
            victim = min(idle, key=lambda each: each.heard)
            self.leave(victim)
            dismiss(victim, "idle, and its place was needed")
        self._silent.pop(link, None)
        self._greeted[link] = None

    def refuse(self, link: Link) -> None:
        """It may not come in for another reason, and may say HELLO again."""
        self.leave(link)
        self._silent[link] = None

    def welcome(self, link: Link) -> None:
        """It has come in; it is dismissed if it does nothing for long."""
        link.spawn(lambda: self._dismiss_when_idle(link))

    async def _dismiss_when_idle(self, link: Link) -> None:
        limit = self._limits.idle_timeout
        while link.session.state in _WITHOUT_GUEST:
            if is_idle(link, limit):
                dismiss(link, f"nothing was asked for {limit:g} s, and no guest is attached")
                return
            since = trio.current_time() if link.working else link.heard
            await trio.sleep_until(since + limit)

    def leave(self, link: Link) -> None:
        """It is over. Idempotent."""
        self._silent.pop(link, None)
        self._greeted.pop(link, None)


class Holder(Protocol):
    """Somebody who keeps descriptors for a peer."""

    @property
    def descriptors(self) -> int:
        """How many."""


class DescriptorShares:
    """Who may keep how many descriptors, of those that this process may have open.

    Half of them is divided evenly, and sure to everybody; the other half is for those who need
    more, as long as there is any. Nothing here blocks.

    Args:
        limits: ``max_connections`` and ``max_descriptors``.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._holders: dict[Holder, None] = {}

    def add(self, holder: Holder) -> None:
        """It will keep some."""
        self._holders[holder] = None

    def remove(self, holder: Holder) -> None:
        """It keeps none any more. Idempotent."""
        self._holders.pop(holder, None)

    def room(self, holder: Holder) -> int:
        """Return how many more it may keep; less than 1 is none."""
        connections = self._limits.max_connections
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            soft = 1 << 30
        # The rest is for sockets, images, and what else a program has open.
        half = max(0, soft - _RESERVE - 4 * connections) // 2
        share = half // connections
        beyond = sum(max(0, each.descriptors - share) for each in self._holders)
        held = holder.descriptors
        return min(self._limits.max_descriptors, max(held, share) + max(0, half - beyond)) - held
