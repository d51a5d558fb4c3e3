"""The network path: frames through ring, RNDIS and endpoint, host side alone.

The guest's half is not counted: its packets are built beforehand, and its ring is filled and
emptied outside the clock.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Sequence
from uuid import UUID

import trio

from netvsp.adapter import NetworkAdapter
from netvsp.endpoint import Endpoint
from netvsp.endpoints.null import NullEndpoint
from netvsp.frames.frame import ETHERNET_HEADER, Frame
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.bench.harness import ROUNDS, Figure, median_ns
from vmbus.gpadl import Gpadl
from vmbus.memory import PAGE_SIZE, allocate_memory
from vmbus.testing import GuestEnd, channel_pair
from vmbus.testing.channels import LoneHost
from vmbus.wire.gpa import GpaRange, build_range
from vmbus.wire.packets import (
    COMPLETION,
    FLAG_COMPLETION_REQUESTED,
    GPA_DIRECT,
    IN_BAND,
    TRANSFER_PAGES,
    build_packet,
)

DEPTH = 64
BATCHES = 100
RING_PAGES = 64
RECEIVE_PAGES = 1024
SEND_PAGES = 256
MAC = bytes.fromhex("00155d000001")
PEER = bytes.fromhex("00155d000002")


class _Guest:
    """A driver that does as little as there is to do."""

    def __init__(self, end: GuestEnd) -> None:
        self.end = end
        first = end.free_pfn
        self.receive_pages = range(first, first + RECEIVE_PAGES)
        self.send_pages = range(first + RECEIVE_PAGES, first + RECEIVE_PAGES + SEND_PAGES)
        self.data_pages = range(self.send_pages[-1] + 1, self.send_pages[-1] + 1 + 32 * DEPTH)

    def gpadls(self) -> dict[int, Gpadl]:
        return {
            handle: Gpadl(handle, (GpaRange(len(pages) * PAGE_SIZE, 0, tuple(pages)),))
            for handle, pages in ((1, self.receive_pages), (2, self.send_pages))
        }

    async def command(self, payload: bytes, *, answered: bool = True) -> bytes:
        self.end.send(
            build_packet(
                IN_BAND,
                payload,
                transaction_id=7,
                flags=FLAG_COMPLETION_REQUESTED if answered else 0,
            )
        )
        if not answered:
            return b""
        return (await self.end.receive())[0].payload

    async def control(self, message: bytes) -> None:
        """Send a request and wait for both answers."""
        page = self.data_pages[0]
        self.end.memory.write(page * PAGE_SIZE, message)
        header = struct.pack("<II", 0, 1) + build_range(len(message), 0, [page])
        self.end.send(
            build_packet(
                GPA_DIRECT,
                nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL),
                transaction_id=9,
                flags=FLAG_COMPLETION_REQUESTED,
                header=header,
            )
        )
        left = 2
        while left:
            for packet in await self.end.receive():
                left -= 1
                if packet.kind == TRANSFER_PAGES:
                    self.give_back(packet.transaction_id)

    def give_back(self, *ids: int) -> None:
        payload = nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
        self.end.send(*[build_packet(COMPLETION, payload, transaction_id=each) for each in ids])

    async def start(self) -> None:
        await self.command(nvsp.build_init(nvsp.VERSION_6_1, nvsp.VERSION_6_1))
        config = nvsp.build_ndis_config(
            1500 + ETHERNET_HEADER, nvsp.CAPABILITY_8021Q | nvsp.CAPABILITY_RSC
        )
        await self.command(config, answered=False)
        await self.command(nvsp.build_ndis_version(6, 30), answered=False)
        answer = await self.command(
            nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, 1, nvsp.RECEIVE_BUFFER_ID)
        )
        assert nvsp.parse_receive_buffer_complete_untrusted(answer).status == nvsp.SUCCESS
        answer = await self.command(nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, 2, 0))
        self.section_size = nvsp.parse_send_buffer_complete_untrusted(answer)[1]
        await self.control(rndis.build_initialize(1, 0x4000))
        on = ndis.OffloadParameters(
            tcp_ipv4=4, lso_v2_ipv4=2, rsc_ipv4=ndis.OFFLOAD_ENABLED, rsc_ipv6=ndis.OFFLOAD_ENABLED
        )
        await self.control(
            rndis.build_request(
                rndis.SET, 2, oids.TCP_OFFLOAD_PARAMETERS, ndis.build_offload_parameters(on)
            )
        )
        await self.control(
            rndis.build_request(
                rndis.SET, 3, oids.GEN_CURRENT_PACKET_FILTER, (0x0D).to_bytes(4, "little")
            )
        )

    def section_packet(self, index: int, message: bytes) -> bytes:
        """A message in a section of the send buffer."""
        self.end.memory.write(self.send_pages[0] * PAGE_SIZE + index * self.section_size, message)
        return build_packet(
            IN_BAND,
            nvsp.build_rndis_packet(nvsp.CHANNEL_DATA, index, len(message)),
            transaction_id=100 + index,
            flags=FLAG_COMPLETION_REQUESTED,
        )

    def pages_packet(self, index: int, header: bytes, frame: bytes) -> bytes:
        """A header in a page, and a frame in others."""
        count = -(-len(frame) // PAGE_SIZE)
        first = self.data_pages[index * (count + 1)]
        self.end.memory.write(first * PAGE_SIZE, header)
        self.end.memory.write((first + 1) * PAGE_SIZE, frame)
        ranges = struct.pack("<II", 0, 2) + build_range(len(header), 0, [first])
        ranges += build_range(len(frame), 0, range(first + 1, first + 1 + count))
        return build_packet(
            GPA_DIRECT,
            nvsp.build_rndis_packet(nvsp.CHANNEL_DATA),
            transaction_id=100 + index,
            flags=FLAG_COMPLETION_REQUESTED,
            header=ranges,
        )


def figures() -> list[Figure]:
    """Measure."""
    return trio.run(_figures)


async def _figures() -> list[Figure]:
    found = []
    for size, target in ((64, None), (1514, 4.0)):
        value = await _transmit(NullEndpoint(), _small(size))
        found.append(
            Figure(
                f"frame of {size} bytes from the guest, to null",
                value / 1000,
                "us",
                "bare copy",
                _copy_floor(size),
                target,
            )
        )
    value = await _transmit(NullEndpoint(), _large(), depth=16)
    found.append(Figure("segment of 60 KiB from the guest, to null", value / 1000, "us"))
    for size, target in ((64, None), (1514, 5.0)):
        value = await _receive(size)
        found.append(
            Figure(
                f"frame of {size} bytes to the guest",
                value / 1000,
                "us",
                "bare copy",
                _copy_floor(size),
                target,
            )
        )
    return found


def _frame(size: int) -> bytes:
    return (PEER + MAC + b"\x08\x00E").ljust(size, b"\x11")


def _small(size: int):
    def build(guest: _Guest, index: int) -> bytes:
        frame = _frame(size)
        return guest.section_packet(index, rndis.build_packet_header(len(frame)) + frame)

    return build


def _large():
    def build(guest: _Guest, index: int) -> bytes:
        frame = bytearray(_frame(60 << 10))
        frame[14] = 0x45
        frame[23] = 6
        frame[46] = 0x50
        item = ppi.build_item(
            ppi.LARGE_SEND, ppi.pack_large_send(ppi.LargeSend(1448, 34, ipv6=False))
        )
        return guest.pages_packet(index, rndis.build_packet_header(len(frame), item), bytes(frame))

    return build


async def _started(endpoint: Endpoint, nursery: trio.Nursery):
    pages = 2 * RING_PAGES + RECEIVE_PAGES + SEND_PAGES + 32 * DEPTH + 64
    memory = allocate_memory(pages * PAGE_SIZE)
    host = LoneHost(memory)
    channel, end = channel_pair(ring_pages=RING_PAGES, memory=memory, host=host)
    guest = _Guest(end)
    host.gpadls.update(guest.gpadls())
    adapter = NetworkAdapter(endpoint, mac=MAC, instance_id=UUID(int=5))
    nursery.start_soon(adapter.run, channel)
    await guest.start()
    assert not host.complaints, host.complaints
    return adapter, channel, guest, host


async def _transmit(endpoint: Endpoint, build, depth: int = DEPTH) -> float:
    """Return the median nanoseconds per packet."""
    times = []
    async with trio.open_nursery() as nursery:
        adapter, channel, guest, host = await _started(endpoint, nursery)
        batch = [build(guest, index) for index in range(depth)]
        for _ in range(ROUNDS):
            spent = 0
            for _ in range(BATCHES):
                assert guest.end.send(*batch) == depth
                left = depth
                start = time.perf_counter_ns()
                while left:
                    await trio.lowlevel.checkpoint()
                    if guest.end.interrupts:
                        spent += time.perf_counter_ns() - start
                        left -= len(guest.end.receive_nowait())
                        start = time.perf_counter_ns()
            times.append(spent / (BATCHES * depth))
        assert not host.complaints, host.complaints
        assert adapter.statistics.transmit.total_frames == ROUNDS * BATCHES * depth
        channel.end()
    await adapter.aclose()
    channel.close_doorbell()
    return statistics.median(times)


async def _receive(size: int) -> float:
    """Return the median nanoseconds per frame, completions included."""
    times = []
    async with trio.open_nursery() as nursery:
        adapter, channel, guest, _host = await _started(NullEndpoint(), nursery)
        frames: Sequence[Frame] = [
            Frame((MAC + PEER + b"\x08\x00E").ljust(size, b"\x11")) for _ in range(DEPTH)
        ]
        for _ in range(ROUNDS):
            spent = 0
            for _ in range(BATCHES):
                start = time.perf_counter_ns()
                assert adapter.receive(frames) == DEPTH
                spent += time.perf_counter_ns() - start
                packets = guest.end.receive_nowait()
                guest.give_back(*[packet.transaction_id for packet in packets])
                start = time.perf_counter_ns()
                while adapter.snapshot()["receive_outstanding"]:
                    await trio.lowlevel.checkpoint()
                spent += time.perf_counter_ns() - start
            times.append(spent / (BATCHES * DEPTH))
        channel.end()
    await adapter.aclose()
    channel.close_doorbell()
    return statistics.median(times)


def _copy_floor(size: int) -> float:
    source, target = bytes(size), memoryview(bytearray(size))

    def run(count: int) -> None:
        for _ in range(count):
            target[:] = source

    return median_ns(run, 200_000) / 1000
