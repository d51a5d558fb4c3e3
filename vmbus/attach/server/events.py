"""The queue between a link's reader and the bus, with the credits that bound it."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Callable

import trio

from vmbus.errors import PeerProtocolError
from vmbus.partition.events import PartitionEvent, PostedMessage


class EventQueue:
    """Partition events in order; an asynchronous iterator for one consumer.

    Posted messages are bounded by credits: the VMM may have so many under way, in here, or taken
    by the consumer and not done, and tells the guest "insufficient buffers" beyond that, as the
    hypervisor does with its 16 buffers per port. The reader therefore never has to stop, which
    matters because the replies that the bus waits for come through it. Everything else in here is
    bounded by the one-at-a-time rules.

    Args:
        credit_limit: Messages that may be under way.
        grant: Sends that many credits back to the VMM.
        begin: Called when the consumer asks for the first event.
    """

    def __init__(
        self, credit_limit: int, grant: Callable[[int], None], begin: Callable[[], None]
    ) -> None:
        self._limit = credit_limit
        self._grant = grant
        self._begin = begin
        self._begun = False
        self._events: deque[PartitionEvent] = deque()
        self._arrival = trio.Event()
        self._ended = False
        self._uncredited = 0
        self._owed = 0

    def take_credit(self) -> None:
        """A message arrived. Raises PeerProtocolError, fatal, if the VMM had no credit left."""
        self._uncredited += 1
        if self._uncredited > self._limit:
            raise PeerProtocolError(
                "POST_MESSAGE: no credit was left", errno=errno.EPROTO, fatal=True
            )

    def give_credit(self, count: int) -> None:
        """So many messages are done with; credits go back in handfuls while more wait.

        Before the consumer has begun they are only counted: the VMM takes none so early.
        """
        self._owed += count
        if not self._begun or self._ended:
            return
        if self._owed and (self._owed == self._uncredited or self._owed * 4 >= self._limit):
            self._uncredited -= self._owed
            owed, self._owed = self._owed, 0
            self._grant(owed)

    def message_done(self) -> None:
        """The consumer is done with a message. Cannot block."""
        self.give_credit(1)

    def put(self, event: PartitionEvent) -> None:
        """Append. Cannot block."""
        self._events.append(event)
        self._arrival.set()

    def drop_messages(self) -> None:
        """Forget what the guest posted in the life that has just ended."""
        kept = [event for event in self._events if type(event) is not PostedMessage]
        dropped = len(self._events) - len(kept)
        self._events = deque(kept)
        self.give_credit(dropped)

    def end(self) -> None:
        """No more events, not even queued ones. Idempotent."""
        self._ended = True
        self._events.clear()
        self._arrival.set()

    def __aiter__(self) -> AsyncIterator[PartitionEvent]:
        """Return itself."""
        return self

    async def __anext__(self) -> PartitionEvent:
        """The next event."""
        if not self._begun:
            self._begun = True
            self._begin()
            # What was dropped before the guest was attached.
            self.give_credit(0)
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._arrival = trio.Event()
            await self._arrival.wait()
        # Not a full checkpoint: the credits run out soon enough for others to get their turn.
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._events.popleft()
