"""A partition in this process, and a bus that writes down what happens."""

from __future__ import annotations

from tests.support.synic import Guest, Partition
from vmbus.partition.events import PartitionEvent, PostedMessage
from vmbus.partition.loopback import LoopbackTransport


class Rig:
    """A partition, a running guest and a transport."""

    def __init__(self, **options) -> None:
        self.partition = Partition(2)
        self.synic = self.partition.synic
        self.guest = Guest(self.synic).enable()
        self.transport = LoopbackTransport(self.synic, **options)

    @property
    def interrupts(self) -> list[tuple[int, int]]:
        return self.partition.interrupts


async def follow(transport: LoopbackTransport, events: list[PartitionEvent]) -> None:
    """A bus that writes down what happens, and is done with everything at once."""
    async for event in transport.incoming():
        events.append(event)
        if not isinstance(event, PostedMessage):
            event.done()
            event.done()
