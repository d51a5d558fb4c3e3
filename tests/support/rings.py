"""The host's ends of a ring over guest memory, and a packet."""

from __future__ import annotations

import struct

from tests.support.ring_peer import IN_BAND, PeerReader, PeerRing, PeerWriter, packet
from vmbus.memory import PAGE_SIZE, GuestMemory
from vmbus.ring import RingMemory, RingReader, RingWriter


def pages(memory: GuestMemory, pfns: range | list[int]) -> list[memoryview]:
    return [memory.page(pfn) for pfn in pfns]


def set_indices(memory: GuestMemory, pfn: int, write: int, read: int | None = None) -> None:
    memory.write(pfn * PAGE_SIZE, struct.pack("<II", write, write if read is None else read))


def incoming(
    memory: GuestMemory, data_pages: int = 1, start: int = 0
) -> tuple[PeerWriter, RingReader]:
    set_indices(memory, 0, start)
    pfns = range(data_pages + 1)
    return PeerWriter(PeerRing(pages(memory, pfns))), RingReader(RingMemory(memory, pfns))


def outgoing(
    memory: GuestMemory, data_pages: int = 1, start: int = 0
) -> tuple[RingWriter, PeerReader]:
    set_indices(memory, 0, start)
    pfns = range(data_pages + 1)
    return RingWriter(RingMemory(memory, pfns)), PeerReader(PeerRing(pages(memory, pfns)))


def words(memory: GuestMemory) -> memoryview:
    return memory.page(0).cast("I")


SMALL = packet(IN_BAND, b"12345678", ident=1)
"""24 bytes, 32 in the ring."""
