"""The ring: one packet through shared memory, against the bare copy and the bare parse."""

from __future__ import annotations

import struct

from tests.bench.harness import Figure, median_ns
from vmbus.memory import PAGE_SIZE, allocate_memory, full_fence
from vmbus.ring import RingMemory, RingReader, RingWriter
from vmbus.wire.packets import IN_BAND, build_packet

PAGES = 64
BATCH = 32
BUFFER_PAGES = 32


def figures() -> list[Figure]:
    """Measure."""
    found = [_fence()]
    for size in (64, 1514):
        found += _batches(size)
    neighbours = tuple(range(BUFFER_PAGES))
    found.append(_gather("in one piece", neighbours))
    found.append(_gather("in 32 pieces", neighbours[::-1]))
    return found


def _gather(words: str, pfns: tuple[int, ...]) -> Figure:
    memory = allocate_memory(PAGES * PAGE_SIZE)
    size = len(pfns) * PAGE_SIZE

    def run(count: int) -> None:
        for _ in range(count):
            memory.gather(0, size, pfns)

    return Figure(f"memory of a buffer of 128 KiB, {words}", median_ns(run, 20_000), "ns")


def _fence() -> Figure:
    def run(count: int) -> None:
        for _ in range(count):
            full_fence()

    return Figure("full fence", median_ns(run, 200_000), "ns")


def _batches(size: int) -> list[Figure]:
    memory = allocate_memory(PAGES * 4096)
    pages = list(range(PAGES))
    writer = RingWriter(RingMemory(memory, pages))
    reader = RingReader(RingMemory(memory, pages))
    packet = build_packet(IN_BAND, bytes(size))
    batch = [packet] * BATCH

    def run(count: int) -> None:
        for _ in range(count // BATCH):
            writer.write_batch_untrusted(batch)
            reader.read_batch_untrusted()
            reader.commit()

    view = memory.page(1)
    layout = struct.Struct("<HHHHQ")
    store, load = bytes(min(size, 4000)), slice(0, min(size, 4000))

    def floor(count: int) -> None:
        for _ in range(count):
            view[load] = store
            data = bytes(view[load])
            layout.unpack_from(data)

    return [
        Figure(
            f"ring put+get, {size} B, batches of {BATCH}",
            median_ns(run, 64_000),
            "ns",
            "copy in, copy out, struct parse",
            median_ns(floor, 200_000),
        )
    ]
