"""The control messages that wait for their message slot.

All messages of a bus go through one queue, in order, one delivery at a time: most guests have one
slot for them, on one VP, and one message too many or out of order hangs them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import trio

from vmbus.engine.events import SendMessage
from vmbus.log_budget import LogBudget
from vmbus.partition.transport import Transport
from vmbus.wire.messages import MESSAGE_TYPE_VMBUS

_log = logging.getLogger("vmbus.bus")


class Deliveries:
    """The queue of one bus.

    Args:
        transport: Has the slots.
        delivered: Called after each message that has left the queue; must not block.
    """

    def __init__(self, transport: Transport, delivered: Callable[[], None]) -> None:
        self._transport = transport
        self._delivered = delivered
        self._log_budget = LogBudget()
        self._waiting: deque[SendMessage] = deque()
        self._current: tuple[SendMessage, trio.CancelScope] | None = None
        self._put = 0
        self._gone = 0
        self._added = trio.Event()
        self._progress = trio.Event()
        self._flowing = trio.Event()
        self._flowing.set()

    def __len__(self) -> int:
        """Messages that wait; the one that is being delivered does not count."""
        return len(self._waiting)

    def put(self, message: SendMessage) -> None:
        """Queue a message. Cannot block."""
        self._waiting.append(message)
        self._put += 1
        self._added.set()

    def drop(self, *, reserved: bool = False) -> None:
        """The guest has left: forget what is not in a slot yet. Cannot block.

        Args:
            reserved: Also what belongs to reserved channels, which outlive a connection but not
                a reset.
        """
        kept = [message for message in self._waiting if message.reserved and not reserved]
        self._gone += len(self._waiting) - len(kept)
        self._waiting = deque(kept)
        if self._current is not None:
            message, scope = self._current
            if reserved or not message.reserved:
                scope.cancel()
        self._advance()

    def hold(self) -> None:
        """Deliver nothing until :meth:`flow`. Cannot block."""
        if self._flowing.is_set():
            self._flowing = trio.Event()

    def flow(self) -> None:
        """Undo :meth:`hold`. Cannot block."""
        self._flowing.set()

    async def wait_delivered(self) -> None:
        """Wait until everything queued so far is in its slot, or dropped. A checkpoint if not."""
        target = self._put
        while self._gone < target:
            await self._progress.wait()

    async def run(self) -> None:
        """Deliver, until the partition is gone."""
        while True:
            while not self._waiting:
                self._added = trio.Event()
                await self._added.wait()
            await self._flowing.wait()
            if not self._waiting:
                continue
            try:
                await self._deliver(self._waiting.popleft())
            except trio.BrokenResourceError:
                _log.debug("%s: nobody is left to take messages", self._transport.name)
                return
            self._gone += 1
            self._advance()
            self._delivered()

    async def _deliver(self, message: SendMessage) -> None:
        with trio.CancelScope() as scope:
            self._current = message, scope
            try:
                arrived = await self._transport.deliver(
                    message.vp, message.sint, MESSAGE_TYPE_VMBUS, message.payload
                )
            finally:
                self._current = None
            if not arrived and self._log_budget.spend():
                _log.info(
                    "%s: message to VP %d SINT %d dropped, its SynIC is off",
                    self._transport.name,
                    message.vp,
                    message.sint,
                )

    def _advance(self) -> None:
        # A new event each time: several tasks may wait, and each has a target of its own.
        progress, self._progress = self._progress, trio.Event()
        progress.set()
