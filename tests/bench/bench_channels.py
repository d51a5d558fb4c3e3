"""How long one channel of a guest waits while the other ones of the same guest do their worst.

A guest's channels are served by one loop: what fifteen of them ask for, the sixteenth waits for. It
sends one read of 4 KiB at a time. The guest's half is not counted: the clock stands still while its
tasks fill and empty rings.
"""

from __future__ import annotations

import gc
import os
import statistics
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from storvsp import ScsiController
from storvsp.disk import Disk
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import open_disk
from storvsp.wire import DATA_IN, DATA_NONE, DATA_OUT, build_srb
from tests.bench import harness
from tests.bench.bench_storvsp import _handshake
from tests.bench.harness import Figure
from tests.support.turns import watched
from vmbus.host.channel import Channel
from vmbus.memory import GuestMemory, allocate_memory
from vmbus.supervisor.garbage import collect_when_idle
from vmbus.testing import GuestEnd, channel_pair, make_offer
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, GPA_DIRECT, IN_BAND, build_packet

CHANNELS = 16
RING_PAGES = 129
DATA = CHANNELS * 2 * RING_PAGES
"""First page behind all rings."""
DATA_PAGES = 1100
MIB = 1 << 20
DISK = 64 * MIB
READS_A_ROUND = 60
SECONDS_A_ROUND = 0.5
"""For those reads; fewer have to do then."""
TARGET = 100.0
MEDIAN, LONGEST = "median", "longest"


def figures() -> Iterator[Figure]:
    """Measure."""
    for words, make in DISKS.items():
        for who, packets in NEIGHBOURS.items():
            waits = trio.run(_waits, make, packets)
            name = f"4 KiB read of {words} beside {who}"
            yield Figure(f"{name}: {MEDIAN}", statistics.median(waits) * 1000, "ms")
            yield Figure(f"{name}: {LONGEST}", max(waits) * 1000, "ms", target=TARGET)


class _Clock(trio.abc.Instrument):
    """Stands still during the steps of the guest's tasks.

    Attributes:
        guests: Those tasks.
    """

    def __init__(self) -> None:
        self.guests: set[trio.lowlevel.Task] = set()
        self._still = 0.0
        self._since = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._since = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self.guests:
            self._still += time.perf_counter() - self._since

    def now(self) -> float:
        """Seconds, for tasks that are not among :attr:`guests`."""
        return time.perf_counter() - self._still


async def _waits(
    make: Callable[[], AbstractAsyncContextManager[Disk]], packets: list[bytes]
) -> list[float]:
    """Return how long each read of one channel has taken, in seconds."""
    controller = ScsiController()
    memory = allocate_memory((DATA + DATA_PAGES) * 4096)
    memory.write((DATA + LIST) * 4096, _unmap_list())
    gc.collect()
    gc.freeze()  # as in a guest's process: what was there before is not looked at for garbage
    (primary, guest), *others = [_channel(memory, number) for number in range(CHANNELS)]
    clock = _Clock()
    waits: list[float] = []
    async with make() as disk:
        controller.add_disk(disk, owned=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect_when_idle)  # this, too
            nursery.start_soon(controller.run, primary)
            await _handshake(guest)
            for channel, end in others if packets else ():
                primary.deliver_subchannel(channel)
                nursery.start_soon(_keep_busy, end, packets, clock)
            read = _packet(_rw(0x28, 0, 8), [DATA])
            over = time.perf_counter() + SECONDS_A_ROUND * harness.ROUNDS
            with watched(clock):
                while len(waits) < READS_A_ROUND * harness.ROUNDS and time.perf_counter() < over:
                    start = clock.now()
                    guest.send(read)
                    await guest.receive()
                    waits.append(clock.now() - start)
            for channel, _ in ((primary, guest), *others):
                channel.end()
            nursery.cancel_scope.cancel()
        await controller.aclose()
    for channel, _ in ((primary, guest), *others):
        channel.close_doorbell()
    gc.unfreeze()
    return waits


def _channel(memory: GuestMemory, number: int) -> tuple[Channel, GuestEnd]:
    return channel_pair(
        memory=memory,
        ring_pages=RING_PAGES,
        first_pfn=number * 2 * RING_PAGES,
        offer=make_offer(max_subchannels=CHANNELS - 1),
    )


async def _keep_busy(guest: GuestEnd, packets: list[bytes], clock: _Clock) -> None:
    """Have all packets under way at any time, as far as the ring has room."""
    clock.guests.add(trio.lowlevel.current_task())
    at = guest.send(*packets)
    while True:
        for _ in await guest.receive():
            at += guest.send(packets[at % len(packets)])


# -- what the other channels do --------------------------------------------------------------------


def _packet(cdb: bytes, pfns: list[int], size: int = -1, *, out: bool = False) -> bytes:
    """A command with its buffer; ``size`` bytes, or all of the pages."""
    size = len(pfns) * 4096 if size < 0 else size
    return build_packet(
        GPA_DIRECT if size else IN_BAND,
        build_srb(
            cdb, data_in=(DATA_OUT if out else DATA_IN) if size else DATA_NONE, transfer_length=size
        ),
        transaction_id=1,
        flags=FLAG_COMPLETION_REQUESTED,
        header=struct.pack("<II", 0, 1) + build_range(size, 0, pfns) if size else b"",
    )


def _rw(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", opcode, flags, lba, 0, blocks, 0)


def _scattered(count: int) -> list[int]:
    return [DATA + 2 + 2 * (index % 512) for index in range(count)]


def _unmap_list() -> bytes:
    """A list of 256 single sectors."""
    ranges = b"".join(struct.pack(">QI4x", 4096 + 2 * at, 1) for at in range(256))
    return struct.pack(">HH4x", len(ranges) + 6, len(ranges)) + ranges


def _many(packet: bytes, count: int) -> list[bytes]:
    return [packet] * count


NOTHING = 1
"""Page of the data with zeros."""
LIST = 2
"""Page of the data with a list for UNMAP."""

READ = _packet(_rw(0x28, 0, 8), [DATA + 4])
COMPARE_AND_WRITE = _packet(
    struct.pack(">BBQ3xBBB", 0x89, 0, 98304, 1, 0, 0), [DATA + NOTHING], 1024, out=True
)

NEIGHBOURS: dict[str, list[bytes]] = {
    "nobody": [],
    "reads of 4 KiB": _many(READ, 256),
    "scattered reads of 2 MiB": _many(_packet(_rw(0x28, 0, 4096), _scattered(512)), 64),
    "lists of 65 000 pages": _many(_packet(bytes(6), _scattered(65_000)), 1),
    "UNMAP of 256 sectors": _many(
        _packet(_rw(0x42, 0, 4104), [DATA + LIST, DATA + LIST + 1], 4104, out=True), 128
    ),
    "WRITE SAME of 8 MiB": _many(
        _packet(_rw(0x41, 65536, 16384), [DATA + LIST], 512, out=True), 64
    ),
    "durable writes of 4 KiB": _many(_packet(_rw(0x2A, 65536, 8, 8), [DATA + 4], out=True), 256),
    "SYNCHRONIZE CACHE": _many(_packet(_rw(0x35, 0, 0), []), 256),
    "COMPARE AND WRITE": _many(COMPARE_AND_WRITE, 64),
    "reads behind COMPARE AND WRITE": [COMPARE_AND_WRITE, *_many(READ, 256)],
}
"""What keeps the queues of fifteen channels full."""


@asynccontextmanager
async def _raw() -> AsyncIterator[Disk]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "disk.img")
        with open(path, "wb") as file:
            file.writelines(bytes(MIB) for _ in range(DISK // MIB))
        disk = await open_disk(f"raw:{path}")
        try:
            yield disk
        finally:
            await disk.aclose()


@asynccontextmanager
async def _ram() -> AsyncIterator[Disk]:
    disk = RamDisk(DISK)
    disk.try_writev(0, [memoryview(bytes(DISK))])
    yield disk
    await disk.aclose()


DISKS: dict[str, Callable[[], AbstractAsyncContextManager[Disk]]] = {
    "a RAM disk": _ram,
    "a raw file": _raw,
}
