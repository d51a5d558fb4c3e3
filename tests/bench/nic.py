"""A network driver that does as little as there is to do, for benchmarks."""

from __future__ import annotations

import struct

from netvsp.frames.frame import ETHERNET_HEADER
from netvsp.wire import ndis, nvsp, oids, rndis
from vmbus.gpadl import Gpadl
from vmbus.memory import PAGE_SIZE
from vmbus.testing import GuestEnd
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
RING_PAGES = 64
RECEIVE_PAGES = 2048
SEND_PAGES = 256
MAC = bytes.fromhex("00155d000001")
PEER = bytes.fromhex("00155d000002")


class Guest:
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

    def give_back(self, *ids: int, end: GuestEnd | None = None) -> None:
        payload = nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
        (end or self.end).send(
            *[build_packet(COMPLETION, payload, transaction_id=each) for each in ids]
        )

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

    async def scale(self, channels: int) -> None:
        """Have frames go to several channels."""
        table = tuple(range(channels)) * (128 // channels)
        parameters = ndis.build_rss_parameters(
            flags=0, hash_information=0x1701, table=table, key=bytes(range(40))
        )
        await self.control(
            rndis.build_request(rndis.SET, 4, oids.GEN_RECEIVE_SCALE_PARAMETERS, parameters)
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
        """A header in a page, and a frame in others: a range for each, as Linux has it."""
        count = -(-len(frame) // PAGE_SIZE)
        first = self.data_pages[index * (count + 1)]
        self.end.memory.write(first * PAGE_SIZE, header)
        self.end.memory.write((first + 1) * PAGE_SIZE, frame)
        ranges = struct.pack("<II", 0, 1 + count) + build_range(len(header), 0, [first])
        for page in range(count):
            size = min(len(frame) - page * PAGE_SIZE, PAGE_SIZE)
            ranges += build_range(size, 0, [first + 1 + page])
        return build_packet(
            GPA_DIRECT,
            nvsp.build_rndis_packet(nvsp.CHANNEL_DATA),
            transaction_id=100 + index,
            flags=FLAG_COMPLETION_REQUESTED,
            header=ranges,
        )
