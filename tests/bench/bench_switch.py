"""The switch: a frame from port to port, in a process and through a keeper's lines.

What adapters do with it is not counted. The lines' figures have all of it that is done for a frame:
by the sender's process, the switch's and the receiver's, in one process here so that one clock sees
it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import trio

from netvsp.endpoints.switch import connect, open_keeper
from netvsp.frames.frame import Frame
from netvsp.shared.messages import frames_untrusted, kind_untrusted, pack_frames
from netvsp.switch.port import PortConfig, SwitchPort
from netvsp.switch.switch import Switch
from tests.bench.harness import ROUNDS, Figure, median_ns
from vmbus.plugins.sharing import make_line

BATCH = 64
FLOWS = 10_000
BATCHES = 100


def _address(number: int) -> bytes:
    return bytes.fromhex("02155d") + number.to_bytes(3, "big")


def _frame(source: int, target: int, size: int) -> Frame:
    head = _address(target) + _address(source) + b"\x08\x00"
    return Frame(head.ljust(size, b"\x11"))


def _make(ports: int, *, uplink: bool = False) -> tuple[Switch, list[SwitchPort]]:
    switch = Switch(time.monotonic)
    config = PortConfig(addresses=12_288, uplink=uplink)
    made = [switch.add_port(str(number), config, lambda: None) for number in range(ports)]
    for number, port in enumerate(made):
        switch.set_station(port, _address(1_000_000 + number))
    return switch, made


def figures() -> list[Figure]:
    """Measure."""
    copy = _copy_floor(1514)
    found = [
        Figure("switch: frame of 1514 bytes from port to port", _known(), "us", "bare copy", copy),
        Figure(f"switch: the same, {FLOWS} flows", _flows(), "us", "bare copy", copy),
        Figure("switch: broadcast, each of 15 ports", _flood(), "us", "bare copy", copy),
    ]
    for size in (64, 1514):
        value = _codec(size)
        name = f"switch: message of 64 frames of {size} bytes, both ways, each"
        found.append(Figure(name, value, "us", "bare copy", _copy_floor(size)))
    for size, batches in ((64, BATCHES), (1514, BATCHES), (60 << 10, 10)):
        value = trio.run(_lines, size, batches)
        name = f"switch: frame of {size} bytes from line to line"
        found.append(Figure(name, value, "us", "bare copy", _copy_floor(size)))
    return found


def _known() -> float:
    switch, (one, other) = _make(2)
    frames = [_frame(1_000_000, 1_000_001, 1514)] * BATCH

    def run(count: int) -> None:
        for _ in range(count):
            switch.receive(one, frames)
            other.take(BATCH, 1 << 20)

    return median_ns(run, 1000) / BATCH / 1000


def _flows() -> float:
    """Stations behind two uplinks, each known: every frame is of another flow."""
    switch, (one, other) = _make(2, uplink=True)
    half = FLOWS // 2
    there = [_frame(each, half + each, 1514) for each in range(1, half + 1)]
    back = [_frame(half + each, each, 1514) for each in range(1, half + 1)]
    for port, frames, sink in ((one, there, other), (other, back, one)):
        for at in range(0, half, BATCH):
            switch.receive(port, frames[at : at + BATCH])
            sink.take(BATCH, 1 << 20)
    assert len(switch.table) == FLOWS
    position = 0

    def run(count: int) -> None:
        nonlocal position
        for _ in range(count):
            position = (position + BATCH) % (half - BATCH)
            switch.receive(one, there[position : position + BATCH])
            other.take(BATCH, 1 << 20)

    return median_ns(run, 1000) / BATCH / 1000


def _flood() -> float:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0  # or they would be dropped
        return now

    switch = Switch(clock)
    ports = [switch.add_port(str(number), PortConfig(), lambda: None) for number in range(16)]
    for number, port in enumerate(ports):
        switch.set_station(port, _address(number + 1))
    frames = [Frame(b"\xff" * 6 + _address(1) + bytes(1502))] * BATCH

    def run(count: int) -> None:
        for _ in range(count):
            done = 0
            while done < BATCH:  # a frame for many ports is so much of a turn's work
                done += switch.receive(ports[0], frames[done:])
            for port in ports[1:]:
                assert len(port.take(BATCH, 1 << 20)) == BATCH

    return median_ns(run, 100) / BATCH / 15 / 1000


def _codec(size: int) -> float:
    frames = [_frame(1, 2, size)] * BATCH

    def run(count: int) -> None:
        for _ in range(count):
            pieces, _ = pack_frames(frames)
            data = memoryview(b"".join(pieces))
            frames_untrusted(data, kind_untrusted(data)[1])

    return median_ns(run, 1000) / BATCH / 1000


class _Sink:
    """Counts what arrives."""

    def __init__(self, mac: bytes) -> None:
        self.mac = mac
        self.left = 0
        self.done = trio.Event()

    def receive(self, frames: Sequence[Frame]) -> int:
        self.left -= len(frames)
        if not self.left:
            self.done.set()
        return len(frames)

    async def wait_room(self) -> None:
        raise AssertionError("there is always room")

    def lost(self, count: int) -> None:
        """See :meth:`netvsp.endpoint.Port.lost`."""
        raise AssertionError(f"{count} frames were dropped")

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        raise AssertionError("the link stays up")


async def _lines(size: int, batches: int) -> float:
    keeper = await open_keeper(["switch:lan"])
    sinks = [_Sink(_address(number)) for number in (1, 2)]
    frames = [_frame(1, 2, size)] * BATCH
    times = []
    async with trio.open_nursery() as nursery:
        endpoints = []
        for sink in sinks:
            ours, theirs = make_line(0)
            nursery.start_soon(keeper.serve, ours, "guest", "switch:lan")
            endpoints.append(connect(theirs))
            nursery.start_soon(endpoints[-1].run, sink)
        while len(keeper.hub.switch.own_stations()) < 2:
            await trio.lowlevel.checkpoint()
        for _ in range(ROUNDS):
            start = time.perf_counter_ns()
            for _ in range(batches):
                # No more than the queue takes: what is dropped would never arrive.
                sinks[1].left, sinks[1].done = BATCH, trio.Event()
                left = frames
                while left:
                    left = left[endpoints[0].transmit(0, left) :]
                    if left:
                        await endpoints[0].wait_writable(0)
                await sinks[1].done.wait()
            times.append((time.perf_counter_ns() - start) / (batches * BATCH))
        nursery.cancel_scope.cancel()
    for endpoint in endpoints:
        await endpoint.aclose()
    await keeper.aclose()
    return statistics.median(times) / 1000


def _copy_floor(size: int) -> float:
    source, target = bytes(size), memoryview(bytearray(size))

    def run(count: int) -> None:
        for _ in range(count):
            target[:] = source

    return median_ns(run, 200_000) / 1000
