"""The ring: one packet through shared memory, against the bare copy and the bare parse."""

from __future__ import annotations

import struct

from tests.bench.harness import Figure, median_ns
from vmbus.memory import full_fence
from vmbus.memory_file import allocate_memory
from vmbus.ring import RingMemory, RingReader, RingWriter
from vmbus.wire.packets import IN_BAND, build_packet

PAGES = 64
BATCH = 32


def figures() -> list[Figure]:
    """Measure."""
    found = [_fence()]
    for size in (64, 1514):
        found += _batches(size)
    return found


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
