"""The storage path: a whole request through ring, vstor, SCSI and disk, host side alone.

The guest's half is not counted: its packets are built beforehand, and its ring is filled and
emptied outside the clock.
"""

from __future__ import annotations

import os
import statistics
import struct
import tempfile
import time

import trio

from storvsp import ScsiController
from storvsp.disk import Disk
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import open_disk
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    DATA_IN,
    DATA_OUT,
    END_INITIALIZATION,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    VERSION_6_2,
    build_packet as build_vstor,
    build_protocol_version,
    build_srb,
)
from tests.bench import harness
from tests.bench.harness import Figure, median_ns
from vmbus.host.observer import Observers
from vmbus.testing import GuestEnd, channel_pair
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, GPA_DIRECT, IN_BAND, build_packet

DISK = 64 << 20
DEPTH = 32
BATCHES = 200
ANSWERS = 4000


def figures() -> list[Figure]:
    """Measure."""
    return trio.run(_figures)


async def _figures() -> list[Figure]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "disk.img")
        with open(path, "wb") as file:
            file.write(os.urandom(DISK))
        floors = {size: preadv_floor(size) for size in (4096, 65536)}
        for depth in (1, DEPTH):
            raw = await open_disk(f"raw:{path}")
            value = await run_requests(raw, 4096, depth)
            found.append(
                Figure(
                    f"cached 4 KiB read, raw file, depth {depth}",
                    value / 1000,
                    "us",
                    "bare preadv",
                    floors[4096] / 1000,
                    6.0 if depth == DEPTH else None,
                )
            )
        raw = await open_disk(f"raw:{path}")
        value = await run_requests(raw, 65536, DEPTH)
        found.append(
            Figure(
                f"cached 64 KiB read, raw file, depth {DEPTH}",
                value / 1000,
                "us",
                "bare preadv",
                floors[65536] / 1000,
            )
        )
        for size, write in ((4096, False), (131072, True)):
            found.append(
                Figure(
                    f"{'write' if write else 'read'} of {size >> 10} KiB, from ring to answer",
                    await _answer(await open_disk(f"raw:{path}"), size, write=write) / 1000,
                    "us",
                )
            )
    value = await run_requests(RamDisk(DISK), 4096, DEPTH)
    found.append(
        Figure(
            f"4 KiB read, RAM disk, depth {DEPTH}", value / 1000, "us", "bare copy", _copy_floor()
        )
    )
    value = await run_requests(RamDisk(DISK), 4096, DEPTH, write=True)
    found.append(
        Figure(
            f"4 KiB write, RAM disk, depth {DEPTH}", value / 1000, "us", "bare copy", _copy_floor()
        )
    )
    return found


def preadv_floor(size: int = 4096) -> float:
    """Return the nanoseconds of a bare read from the page cache."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(os.urandom(DISK))
        return _read_floor(file.fileno(), size)


def _read_floor(fd: int, size: int) -> float:
    buffer = memoryview(bytearray(size))

    def run(count: int) -> None:
        for index in range(count):
            os.preadv(fd, [buffer], index * size % DISK)

    return median_ns(run, 20_000 if size == 4096 else 5_000)


def _copy_floor() -> float:
    source, target = bytes(4096), memoryview(bytearray(4096))

    def run(count: int) -> None:
        for _ in range(count):
            target[:] = source

    return median_ns(run, 200_000) / 1000


def _request(guest: GuestEnd, index: int, size: int, *, write: bool) -> bytes:
    pages = size // 4096
    lba = index * size % DISK // 512
    cdb = struct.pack(">BBIBHB", 0x2A if write else 0x28, 0, lba, 0, size // 512, 0)
    first = guest.free_pfn + index % DEPTH * pages
    header = struct.pack("<II", 0, 1) + build_range(size, 0, range(first, first + pages))
    return build_packet(
        GPA_DIRECT,
        build_srb(cdb, data_in=DATA_OUT if write else DATA_IN, transfer_length=size),
        transaction_id=index + 1,
        flags=FLAG_COMPLETION_REQUESTED,
        header=header,
    )


async def run_requests(
    disk: Disk,
    size: int,
    depth: int,
    *,
    write: bool = False,
    observers: Observers | None = None,
) -> float:
    """Return the median nanoseconds per request at a queue depth; somebody may listen."""
    controller = ScsiController()
    controller.add_disk(disk)
    channel, guest = channel_pair(ring_pages=64, data_pages=DEPTH * size // 4096)
    if observers is not None:
        channel.observe(observers)
    times = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run, channel)
        await _handshake(guest)
        batches = [
            [_request(guest, index + batch * depth, size, write=write) for index in range(depth)]
            for batch in range(BATCHES)
        ]
        for _ in range(harness.ROUNDS):
            spent = 0
            for batch in batches:
                guest.send(*batch)
                start = time.perf_counter_ns()
                left = depth
                while left:
                    await trio.lowlevel.checkpoint()
                    if guest.interrupts:
                        spent += time.perf_counter_ns() - start
                        left -= len(guest.receive_nowait())
                        start = time.perf_counter_ns()
            times.append(spent / (BATCHES * depth))
        channel.end()
    await controller.aclose()
    channel.close_doorbell()
    return statistics.median(times)


async def _answer(disk: Disk, size: int, *, write: bool) -> float:
    """Return the median nanoseconds from a request in the ring to its answer and the interrupt.

    What :meth:`Channel.receive_batch` does before it returns, and what the session does with the
    batch, without the loop's turns: the time that a guest waits whose request is looked for.
    """
    controller = ScsiController()
    controller.add_disk(disk)
    channel, guest = channel_pair(ring_pages=64, data_pages=DEPTH * size // 4096)
    times = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run, channel)
        await _handshake(guest)
        # The serving task waits for its doorbell while this one, without a turn of the loop, does
        # its work.
        session = controller._session
        assert session is not None
        for index in range(ANSWERS):
            guest.send(_request(guest, index % DEPTH, size, write=write))
            start = time.perf_counter_ns()
            packets = channel._reader.read_batch_untrusted()
            channel._outstanding += len(packets)
            session.serve_batch(channel, packets, nursery)
            channel.try_flush()
            spent = time.perf_counter_ns() - start
            channel._reader.commit()
            if guest.receive_nowait():
                times.append(spent)
            else:
                # It had to wait for the disk, which another benchmark is about.
                await guest.receive()
        channel.end()
    await controller.aclose()
    channel.close_doorbell()
    return statistics.median(times)


async def _handshake(guest: GuestEnd) -> None:
    for operation, body in (
        (BEGIN_INITIALIZATION, b""),
        (QUERY_PROTOCOL_VERSION, build_protocol_version(VERSION_6_2)),
        (QUERY_PROPERTIES, b""),
        (END_INITIALIZATION, b""),
    ):
        guest.send(
            build_packet(
                IN_BAND,
                build_vstor(operation, body),
                transaction_id=99,
                flags=FLAG_COMPLETION_REQUESTED,
            )
        )
        await guest.receive()
