"""Traces: what a record costs to write and to read, and what recording costs a disk's guest."""

from __future__ import annotations

import os
import tempfile
import time

import trio

from storvsp.disks.specs import open_disk
from tests.bench.bench_storvsp import DEPTH, DISK, run_requests
from tests.bench.harness import Figure, median_ns
from vmbus.capture import Recorder
from vmbus.host.observer import Observers
from vmbus.trace import FileSink, Kind, TraceWriter, Way, open_trace

RECORDS = 50_000
DATA = bytes(128)


class _Nowhere:
    """A sink that keeps nothing, so that recording is measured and no disk."""

    full = False

    def begin(self, time_ns: int) -> None:
        pass

    def write(self, data: bytes, records: int) -> None:
        pass

    def take_lost(self) -> tuple[int, str]:
        return 0, ""


def figures() -> list[Figure]:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.pcapng")
        found = [
            Figure("record of 128 bytes, written to a file", _write(path), "us", target=3.3),
            Figure("record of 128 bytes, read from a file", _read(path), "us", target=5.0),
        ]
        disk = os.path.join(folder, "disk.img")
        with open(disk, "wb") as file:
            file.write(os.urandom(DISK))
        plain = trio.run(_reads, disk, None)
        for what, snap in (("with its data", None), ("without data", 0)):
            observers = Observers(lambda: None)
            observers.add(Recorder(TraceWriter(_Nowhere()), snap=snap))
            found.append(
                Figure(
                    f"cached 4 KiB read, depth {DEPTH}, recorded {what}",
                    trio.run(_reads, disk, observers) / 1000,
                    "us",
                    "the same, not recorded",
                    plain / 1000,
                )
            )
    return found


def _write(path: str) -> float:
    sink = FileSink(path)
    writer = TraceWriter(sink)
    life = writer.open_channel(5, "scsi")

    def run(count: int) -> None:
        now = time.time_ns()
        for _ in range(count):
            writer.write(Kind.PACKET, Way.TO_HOST, 5, life, DATA, time_ns=now)

    value = median_ns(run, RECORDS) / 1000
    sink.close()
    return value


def _read(path: str) -> float:
    def run(count: int) -> None:
        with open_trace(path) as trace:
            for number, _ in enumerate(trace, 1):
                if number == count:
                    break

    return median_ns(run, RECORDS) / 1000


async def _reads(path: str, observers: Observers | None) -> float:
    return await run_requests(await open_disk(f"raw:{path}"), 4096, DEPTH, observers=observers)
