"""The network path: frames through ring, RNDIS and endpoint, host side alone.

The guest's half is not counted: its packets are built beforehand, and its ring is filled and
emptied outside the clock. Neither is what is behind an endpoint: a neighbour's half of the switch,
and the kernel's own of a TAP, but for the system calls that reach it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import trio

from netvsp.adapter import NetworkAdapter
from netvsp.endpoint import Endpoint
from netvsp.endpoints import tun
from netvsp.endpoints.null import NullEndpoint
from netvsp.endpoints.specs import open_endpoint
from netvsp.endpoints.switch import SwitchEndpoint
from netvsp.frames.frame import PROTOCOL_TCP, Frame, Offload
from netvsp.frames.offload import pack_virtio
from netvsp.link import AdapterConfig
from netvsp.testing.frames import Packet
from netvsp.wire import ppi, rndis
from tests.bench.harness import ROUNDS, Figure, median_ns
from tests.bench.nic import DEPTH, MAC, PEER, RECEIVE_PAGES, RING_PAGES, SEND_PAGES, Guest
from tests.support.network import own_namespace, packet_socket, setting
from vmbus.errors import ConfigError
from vmbus.host.channel import Channel
from vmbus.memory import PAGE_SIZE, allocate_memory
from vmbus.testing import GuestEnd, channel_pair, make_offer
from vmbus.testing.channels import LoneHost

BATCHES = 100


class _Way(NamedTuple):
    """An endpoint, and what is behind it."""

    name: str
    endpoint: Endpoint
    bring: Callable[[Sequence[Frame]], None] | None
    """Has frames come in; None: they are handed to the adapter."""
    empty: Callable[[], None]
    """Takes away what has gone out."""


@contextlib.asynccontextmanager
async def _null(channels: int) -> AsyncIterator[_Way]:
    del channels
    yield _Way("null", NullEndpoint(), None, lambda: None)


@contextlib.asynccontextmanager
async def _switch(channels: int) -> AsyncIterator[_Way]:
    del channels
    endpoint, other = await open_endpoint("switch:bench"), await open_endpoint("switch:bench")
    assert isinstance(endpoint, SwitchEndpoint)
    assert isinstance(other, SwitchEndpoint)
    switch, port = other._hub.switch, other._port
    switch.set_station(port, PEER)

    def empty() -> None:
        while port.take(1024, 1 << 30):
            pass

    yield _Way("switch", endpoint, lambda frames: _bring(switch, port, frames), empty)
    await other.aclose()


def _bring(switch, port, frames: Sequence[Frame]) -> None:
    assert switch.receive(port, frames) == len(frames)


@contextlib.asynccontextmanager
async def _tap(channels: int) -> AsyncIterator[_Way]:
    endpoint = await open_endpoint(f"tap:[queues={channels}]t0")
    with packet_socket("t0") as sock:
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        yield _Way("TAP", endpoint, lambda frames: _send(sock, frames), lambda: None)


_SOL_PACKET, _PACKET_VNET_HDR = 263, 15


def _send(sock: socket.socket, frames: Sequence[Frame]) -> None:
    for frame in frames:
        sock.send(pack_virtio(frame.offload)[:10] + frame.head)


def figures() -> Iterator[Figure]:
    """Measure."""
    yield from _all_of(_null)
    yield from _all_of(_switch)
    try:
        with own_namespace():
            setting("ipv6/conf/default/disable_ipv6", 1)
            yield from _all_of(_tap)
    except (OSError, ConfigError) as error:
        print(f"no figures of a TAP: {error}", file=sys.stderr)
    yield Figure("an idle adapter's memory, of 50", _idle_memory(), "KiB", target=1024)


class _Kind(NamedTuple):
    name: str
    size: int
    depth: int


KINDS = (
    _Kind("frame of 64 bytes", 64, DEPTH),
    _Kind("frame of 1514 bytes", 1514, DEPTH),
    _Kind("segment of 60 KiB", 60 << 10, 16),
)


def _all_of(way) -> Iterator[Figure]:
    for kind in KINDS:
        floors = _floors(way, kind)
        for channels in (1, 4):
            name, sent, received = trio.run(_both_ways, way, kind, channels)
            end = "" if channels == 1 else f", {channels} channels"
            yield _figure(f"{kind.name} from the guest, to {name}{end}", sent, floors[0], channels)
            yield _figure(
                f"{kind.name} to the guest, from {name}{end}", received, floors[1], channels
            )


def _figure(name: str, value: float, floor: tuple[str, float], channels: int) -> Figure:
    target = None
    if channels == 1:
        if name == "frame of 1514 bytes from the guest, to null":
            target = 4.0
        elif name == "frame of 1514 bytes to the guest, from null":
            target = 5.0
        elif name == "segment of 60 KiB from the guest, to TAP":
            target = round(1.5 * floor[1], 1)
    return Figure(name, value / 1000, "us", *floor, target)


async def _both_ways(way, kind: _Kind, channels: int) -> tuple[str, float, float]:
    async with way(channels) as behind:
        sent, received = await _measure(behind, kind, channels)
    return behind.name, sent, received


async def _measure(behind: _Way, kind: _Kind, channels: int) -> tuple[float, float]:
    async with trio.open_nursery() as nursery:
        rig = await _started(behind.endpoint, nursery, channels=channels)
        sent = await _transmit(rig, behind, kind)
        received = await _receive(rig, behind, kind)
        assert not rig.host.complaints, rig.host.complaints
        rig.channel.end()
    await rig.adapter.aclose()
    rig.channel.close_doorbell()
    return sent, received


# -- adapter and guest ----------------------------------------------------------------------------


class _Rig(NamedTuple):
    adapter: NetworkAdapter
    channel: Channel
    guest: Guest
    ends: list[GuestEnd]
    host: LoneHost


async def _started(endpoint: Endpoint, nursery: trio.Nursery, *, channels: int = 1) -> _Rig:
    """An adapter and its guest, with as many channels open."""
    data = RECEIVE_PAGES + SEND_PAGES + 32 * DEPTH
    rings = 2 * RING_PAGES
    memory = allocate_memory((rings * channels + data + 64) * PAGE_SIZE)
    host = LoneHost(memory)
    channel, end = channel_pair(
        ring_pages=RING_PAGES, memory=memory, host=host, offer=make_offer(max_subchannels=3)
    )
    guest = Guest(end)
    host.gpadls.update(guest.gpadls())
    config = AdapterConfig(max_queues=4)
    adapter = NetworkAdapter(endpoint, mac=MAC, instance_id=UUID(int=5), config=config)
    nursery.start_soon(adapter.run, channel)
    await guest.start()
    ends = [end]
    for index in range(1, channels):
        branch, end = channel_pair(
            ring_pages=RING_PAGES, memory=memory, host=host, first_pfn=rings * index + data + 64
        )
        branch.subchannel_index = index
        channel.deliver_subchannel(branch)
        ends.append(end)
    if channels > 1:
        await guest.scale(channels)
    assert not host.complaints, host.complaints
    return _Rig(adapter, channel, guest, ends, host)


def _packet(kind: _Kind, number: int, *, arrives: bool) -> Frame:
    """A TCP packet of a flow of its own."""
    made = Packet(
        source_mac=PEER if arrives else MAC,
        target_mac=MAC if arrives else PEER,
        source_port=1024 + number,
        protocol=PROTOCOL_TCP,
        payload=bytes(kind.size - 54),
    )
    if kind.size > PAGE_SIZE:
        return Frame(*_with_offload(*made.build_partial(1448)))
    return Frame(made.build())


def _with_offload(data: bytes, offload: Offload) -> tuple[bytes, tuple[()], Offload]:
    return data, (), offload


def _from_guest(guest: Guest, kind: _Kind, index: int) -> bytes:
    frame = _packet(kind, index, arrives=False).head
    if kind.size <= PAGE_SIZE:
        return guest.section_packet(index, rndis.build_packet_header(len(frame)) + frame)
    item = ppi.build_item(ppi.LARGE_SEND, ppi.pack_large_send(ppi.LargeSend(1448, 34, ipv6=False)))
    return guest.pages_packet(index, rndis.build_packet_header(len(frame), item), frame)


async def _transmit(rig: _Rig, behind: _Way, kind: _Kind) -> float:
    """Return the median nanoseconds per frame, answers included."""
    share = kind.depth // len(rig.ends)
    packets = [_from_guest(rig.guest, kind, index) for index in range(kind.depth)]
    batches = [packets[at : at + share] for at in range(0, kind.depth, share)]
    times = []
    for _ in range(ROUNDS):
        gc.collect()
        spent = 0
        for _ in range(BATCHES):
            for end, batch in zip(rig.ends, batches, strict=True):
                assert end.send(*batch) == len(batch)
            left = kind.depth
            start = time.perf_counter_ns()
            while left:
                await trio.lowlevel.checkpoint()
                spent += time.perf_counter_ns() - start
                for end in rig.ends:
                    left -= len(end.receive_nowait())
                start = time.perf_counter_ns()
            behind.empty()
        times.append(spent / (BATCHES * kind.depth))
    assert rig.adapter.statistics.transmit.total_frames == ROUNDS * BATCHES * kind.depth
    return statistics.median(times)


async def _receive(rig: _Rig, behind: _Way, kind: _Kind) -> float:
    """Return the median nanoseconds per frame, completions included."""
    frames = [_packet(kind, number, arrives=True) for number in range(kind.depth)]
    received = rig.adapter.statistics.receive
    receiver = rig.adapter._session.receiver  # type: ignore[union-attr]
    times = []
    for _ in range(ROUNDS):
        gc.collect()
        spent = 0
        for _ in range(BATCHES):
            wanted = received.total_frames + kind.depth
            if behind.bring is not None:
                behind.bring(frames)
            start = time.perf_counter_ns()
            left: Sequence[Frame] = frames if behind.bring is None else ()
            while received.total_frames < wanted:
                if left:
                    left = left[rig.adapter.receive(left) :]
                if received.total_frames < wanted:
                    await trio.lowlevel.checkpoint()
            spent += time.perf_counter_ns() - start
            for end in rig.ends:
                ids = [packet.transaction_id for packet in end.receive_nowait()]
                rig.guest.give_back(*ids, end=end)
            start = time.perf_counter_ns()
            while receiver.outstanding:
                await trio.lowlevel.checkpoint()
            spent += time.perf_counter_ns() - start
        times.append(spent / (BATCHES * kind.depth))
    return statistics.median(times)


# -- floors ----------------------------------------------------------------------------------------


def _floors(way, kind: _Kind) -> tuple[tuple[str, float], tuple[str, float]]:
    """Return what a frame costs at least, each way, and what that is."""
    if way is not _tap:
        copy = "bare copy", _copy_floor(kind.size)
        return copy, copy
    tap = tun.open_tap("floor", 1)
    with packet_socket("floor") as sock:
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        found = _bare_write(tap.queues[0], kind), _bare_read(tap.queues[0], sock, kind)
    os.close(tap.queues[0])
    return found


def _bare_write(fd: int, kind: _Kind) -> tuple[str, float]:
    frame = _packet(kind, 1, arrives=False)
    pieces = [pack_virtio(frame.offload), frame.head]
    write = os.writev

    def run(count: int) -> None:
        for _ in range(count):
            write(fd, pieces)

    return "bare TAP write", median_ns(run, 100 * kind.depth) / 1000


def _bare_read(fd: int, sock: socket.socket, kind: _Kind) -> tuple[str, float]:
    frames = [_packet(kind, number, arrives=True) for number in range(kind.depth)]
    into = [memoryview(bytearray(1 << 17))]
    read = os.readv
    with contextlib.suppress(BlockingIOError):  # what was written has come here, too
        while True:
            read(fd, into)
    times = []
    for _ in range(ROUNDS):
        spent = 0
        for _ in range(BATCHES):
            _send(sock, frames)
            start = time.perf_counter_ns()
            for _ in frames:
                read(fd, into)
            spent += time.perf_counter_ns() - start
        times.append(spent / (BATCHES * kind.depth))
    return "bare TAP read", statistics.median(times) / 1000


def _copy_floor(size: int) -> float:
    source, target = bytes(size), memoryview(bytearray(size))

    def run(count: int) -> None:
        for _ in range(count):
            target[:] = source

    return median_ns(run, 200_000) / 1000


# -- memory ----------------------------------------------------------------------------------------

IDLE = 50


def _idle_memory() -> float:
    """Return the KiB that each of many adapters takes that have a guest and nothing to do.

    In a process of its own; its guests' memory is not counted, their drivers' Python objects are.
    """
    code = "from tests.bench.bench_netvsp import idle; idle()"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(said.stdout)


def idle() -> None:
    """Print the KiB that each idle adapter takes."""
    trio.run(_idle)


async def _idle() -> None:
    async with trio.open_nursery() as nursery:
        await _started(NullEndpoint(), nursery)
        before = _anonymous()
        for _ in range(IDLE):
            await _started(NullEndpoint(), nursery)
        print((_anonymous() - before) / IDLE)
        nursery.cancel_scope.cancel()


def _anonymous() -> int:
    """KiB of this process that are in no file, and so no guest's."""
    gc.collect()
    found = re.search(
        r"^Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE
    )
    assert found is not None
    return int(found[1])
