"""A network driver reduced to sending and receiving, and an endpoint that remembers."""

from __future__ import annotations

import itertools
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID

import trio
import trio.testing

from netvsp.adapter import NetworkAdapter
from netvsp.endpoint import Endpoint, EndpointInfo, Offloads, Port
from netvsp.frames.frame import ETHERNET_HEADER, Frame
from netvsp.link import AdapterConfig
from netvsp.wire import nvsp, oids, rndis
from vmbus.gpadl import Gpadl
from vmbus.host.channel import Channel
from vmbus.memory import PAGE_SIZE, allocate_memory
from vmbus.testing import GuestEnd, channel_pair, make_offer
from vmbus.testing.channels import LoneHost
from vmbus.wire.gpa import GpaRange, build_range, page_count
from vmbus.wire.guids import CLASS_NIC
from vmbus.wire.packets import (
    COMPLETION,
    FLAG_COMPLETION_REQUESTED,
    GPA_DIRECT,
    IN_BAND,
    RANGES_HEADER,
    TRANSFER_PAGES,
    build_packet,
    parse_transfer_pages_untrusted,
)

MAC = bytes.fromhex("00155d000001")
PEER = bytes.fromhex("00155d000002")
FILTER = oids.FILTER_DIRECTED | oids.FILTER_ALL_MULTICAST | oids.FILTER_BROADCAST
CAPABILITIES = nvsp.CAPABILITY_8021Q | nvsp.CAPABILITY_TEAMING | nvsp.CAPABILITY_RSC
RECEIVE_HANDLE, SEND_HANDLE = 1, 2
RING_PAGES = 16
SEND_PAGES = 16
DATA_PAGES = 64


class Received(NamedTuple):
    """A transfer-page packet and what it names."""

    transaction_id: int
    channel_type: int
    ranges: list[tuple[int, int]]
    """Length and offset of each message in the receive buffer."""
    messages: list[bytes]

    def frames(self) -> list[bytes]:
        return [frame_of(each) for each in self.messages]


def frame_of(message: bytes) -> bytes:
    """Return the frame in an RNDIS PACKET."""
    where = rndis.parse_frame_untrusted(message)
    assert where.length == len(message)
    return message[where.data_offset : where.data_offset + where.data_length]


class Network(Endpoint):
    """Keeps copies of what it is sent.

    Args:
        offloads: What it takes.
        room: Frames it takes before it is full; None: any number.
    """

    def __init__(
        self,
        offloads: Offloads | None = None,
        *,
        queues: int = 1,
        mtu: int | None = None,
        room: int | None = None,
    ) -> None:
        self.info = EndpointInfo(offloads=offloads or Offloads(), queues=queues, mtu=mtu)
        self.room = room
        self.frames: list[Frame] = []
        self.queues: list[int] = []
        self.calls: list[int] = []
        self.port: Port | None = None
        self.closed = 0
        self._writable = trio.Event()

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        taken = len(frames) if self.room is None else min(self.room, len(frames))
        if self.room is not None:
            self.room -= taken
        self.calls.append(len(frames))
        self.queues += [queue] * taken
        self.frames += [each.own() for each in frames[:taken]]
        return taken

    def make_room(self, count: int) -> None:
        self.room = (self.room or 0) + count
        self._writable.set()
        self._writable = trio.Event()

    async def wait_writable(self, queue: int) -> None:
        if self.room == 0:
            await self._writable.wait()
        else:
            await trio.lowlevel.checkpoint()

    async def run(self, port: Port) -> None:
        self.port = port
        await trio.sleep_forever()

    def bytes(self) -> list[bytes]:
        return [each.tobytes() for each in self.frames]

    async def aclose(self) -> None:
        self.closed += 1


class NetHost(LoneHost):
    """A bus that offers sub-channels, as many as it is asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.offered: list[int] = []
        self.refusal: Exception | None = None

    def offer_subchannels(self, count: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.offered.append(count)


class NetGuest:
    """The guest's half, by hand: see :func:`running`.

    Attributes:
        completions: Payloads by transaction id, in order.
        received: Transfer-page packets, given back at once if :attr:`gives_back`.
        messages: In-band packets.
    """

    def __init__(self, *, receive_pages: int = 256, subchannels: int = 0, **pair: Any) -> None:
        pages = 2 * RING_PAGES + receive_pages + SEND_PAGES + DATA_PAGES
        self.memory = allocate_memory(pages * PAGE_SIZE)
        self.host = NetHost(self.memory)
        self.channel, self.end = channel_pair(
            ring_pages=RING_PAGES,
            memory=self.memory,
            host=self.host,
            offer=make_offer(CLASS_NIC, max_subchannels=subchannels),
            **pair,
        )
        first = self.end.free_pfn
        self.receive_pfns: Sequence[int] = range(first, first + receive_pages)
        first += receive_pages
        self.send_pfns: Sequence[int] = range(first, first + SEND_PAGES)
        first += SEND_PAGES
        self.data_pfns = range(first, first + DATA_PAGES)
        self.section_size = 0
        self.part_size = 0
        self.part_count = 0
        self.gives_back = True
        self.completions: list[tuple[int, bytes]] = []
        self.received: list[Received] = []
        self.messages: list[bytes] = []
        self._ids = itertools.count(1000)
        self._requests = itertools.count(1)
        self.make_gpadls()

    def make_gpadls(self) -> None:
        for handle, pfns in ((RECEIVE_HANDLE, self.receive_pfns), (SEND_HANDLE, self.send_pfns)):
            pages = GpaRange(len(pfns) * PAGE_SIZE, 0, tuple(pfns))
            self.host.gpadls[handle] = Gpadl(handle, (pages,))

    # -- the ring --------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Let the device do all that it has to do, and take what it has written."""
        await trio.testing.wait_all_tasks_blocked()
        self.collect()

    def collect(self, end: GuestEnd | None = None) -> list[Received]:
        """Take what is in a ring, by default that of the primary channel."""
        found = []
        for packet in (end or self.end).receive_nowait():
            if packet.kind == COMPLETION:
                self.completions.append((packet.transaction_id, packet.payload))
            elif packet.kind == TRANSFER_PAGES:
                found.append(self._received(packet.transaction_id, packet.data, packet.payload))
            else:
                assert packet.kind == IN_BAND
                assert not packet.flags
                self.messages.append(packet.payload)
        self.received += found
        if self.gives_back and found:
            self.give_back(*[each.transaction_id for each in found], end=end)
        return found

    def _received(self, number: int, data: bytes, payload: bytes) -> Received:
        set_id, ranges = parse_transfer_pages_untrusted(data, len(data) - len(payload),
                                                        max_ranges=562)  # fmt: skip
        assert set_id == nvsp.RECEIVE_BUFFER_ID
        assert len(payload) == nvsp.MESSAGE_SIZE
        assert number < self.part_count
        message = nvsp.parse_rndis_packet_untrusted(payload)
        assert message.section_index == nvsp.NO_SECTION
        messages = []
        for length, offset in ranges:
            assert offset % self.part_size == 0
            assert length <= self.part_size
            messages.append(self.read(self.receive_pfns, offset, length))
        return Received(number, message.channel_type, ranges, messages)

    def give_back(self, *ids: int, end: GuestEnd | None = None) -> None:
        payload = nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
        packets = [build_packet(COMPLETION, payload, transaction_id=each) for each in ids]
        assert (end or self.end).send(*packets) == len(ids)

    async def exchange(self, *packets: bytes, end: GuestEnd | None = None) -> None:
        assert (end or self.end).send(*packets) == len(packets)
        await self.settle()
        if end is not None:
            self.collect(end)

    # -- memory ----------------------------------------------------------------------------------

    def read(self, pfns: Sequence[int], offset: int, length: int) -> bytes:
        return b"".join(self._views(pfns, offset, length))

    def write(self, pfns: Sequence[int], offset: int, data: bytes) -> None:
        for view in self._views(pfns, offset, len(data)):
            view[:] = data[: len(view)]
            data = data[len(view) :]

    def _views(self, pfns: Sequence[int], offset: int, length: int) -> list[memoryview]:
        first, start = divmod(offset, PAGE_SIZE)
        return self.memory.gather(start, length, pfns[first : first + page_count(start, length)])

    # -- packets ---------------------------------------------------------------------------------

    def in_band(self, payload: bytes, *, number: int | None = None, flags: int = 1) -> bytes:
        return build_packet(
            IN_BAND,
            payload,
            transaction_id=next(self._ids) if number is None else number,
            flags=flags,
        )

    def section(
        self, index: int, message: bytes, *, kind: int = nvsp.CHANNEL_DATA, **more: Any
    ) -> bytes:
        """A packet whose message is in the send buffer."""
        self.write(self.send_pfns, index * self.section_size, message)
        return self.in_band(nvsp.build_rndis_packet(kind, index, len(message)), **more)

    def pages(
        self,
        pieces: Iterable[tuple[int, bytes]],
        *,
        kind: int = nvsp.CHANNEL_DATA,
        section: tuple[int, bytes] | None = None,
        number: int | None = None,
        flags: int = FLAG_COMPLETION_REQUESTED,
    ) -> bytes:
        """A packet with one range for each piece: where in its first page it begins, and bytes."""
        ranges = b""
        count = 0
        pfns = iter(self.data_pfns)
        for offset, data in pieces:
            touched = [next(pfns) for _ in range(page_count(offset, len(data)))]
            self.write(touched, offset, data)
            ranges += build_range(len(data), offset, touched)
            count += 1
        payload = nvsp.build_rndis_packet(kind)
        if section is not None:
            index, message = section
            self.write(self.send_pfns, index * self.section_size, message)
            payload = nvsp.build_rndis_packet(kind, index, len(message))
        return build_packet(
            GPA_DIRECT,
            payload,
            transaction_id=next(self._ids) if number is None else number,
            flags=flags,
            header=RANGES_HEADER.pack(0, count) + ranges,
        )

    # -- the handshake ---------------------------------------------------------------------------

    async def ask(self, payload: bytes, *, flags: int = 1) -> bytes:
        """Send an NVSP message and return the completion, which has to be the only one."""
        number = next(self._ids)
        before = len(self.completions)
        await self.exchange(self.in_band(payload, number=number, flags=flags))
        found = self.completions[before:]
        assert [each for each, _ in found] == [number] * flags
        return found[0][1] if found else b""

    async def control(self, message: bytes) -> bytes:
        """Send an RNDIS request and return the reply; b"" if there is none."""
        number = next(self._ids)
        done, before = len(self.completions), len(self.received)
        await self.exchange(self.pages([(0, message)], kind=nvsp.CHANNEL_CONTROL, number=number))
        assert self.completions[done:] == [(number, nvsp.build_rndis_packet_complete(nvsp.SUCCESS))]
        await self.settle()
        replies = self.received[before:]
        assert all(each.channel_type == nvsp.CHANNEL_CONTROL for each in replies)
        assert len(replies) <= 1
        return replies[0].messages[0] if replies else b""

    async def query(self, oid: int, buffer: bytes = b"") -> rndis.QueryReply:
        number = next(self._requests)
        reply = await self.control(rndis.build_request(rndis.QUERY, number, oid, buffer))
        answer = rndis.parse_query_reply_untrusted(reply)
        assert answer.request_id == number
        return answer

    async def set(self, oid: int, buffer: bytes) -> int:
        """Set an OID and return the status."""
        number = next(self._requests)
        reply = await self.control(rndis.build_request(rndis.SET, number, oid, buffer))
        assert rndis.HEADER.unpack_from(reply) == (rndis.SET | rndis.COMPLETE, 16)
        found, status = rndis.parse_status_reply_untrusted(reply)
        assert found == number
        return status

    async def agree(
        self,
        *,
        version: int = nvsp.VERSION_6_1,
        mtu: int = 1500,
        capabilities: int = CAPABILITIES,
    ) -> None:
        answer = await self.ask(nvsp.build_init(version, version))
        assert nvsp.parse_init_complete_untrusted(answer) == (version, nvsp.SUCCESS)
        if version > nvsp.VERSION_1:
            config = nvsp.build_ndis_config(mtu + ETHERNET_HEADER, capabilities)
            assert not await self.ask(config, flags=0)
        assert not await self.ask(nvsp.build_ndis_version(6, 30), flags=0)

    async def share_receive_buffer(self) -> int:
        answer = await self.ask(
            nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, RECEIVE_HANDLE, nvsp.RECEIVE_BUFFER_ID)
        )
        found = nvsp.parse_receive_buffer_complete_untrusted(answer)
        self.part_size, self.part_count = found.sub_alloc_size, found.sub_alloc_count
        return found.status

    async def share_send_buffer(self) -> int:
        answer = await self.ask(nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, SEND_HANDLE, 0))
        status, self.section_size = nvsp.parse_send_buffer_complete_untrusted(answer)
        return status

    async def start(self, *, wants: int = FILTER, **options: Any) -> None:
        """Do all that Linux does."""
        await self.agree(**options)
        assert await self.share_receive_buffer() == nvsp.SUCCESS
        assert await self.share_send_buffer() == nvsp.SUCCESS
        reply = await self.control(rndis.build_initialize(next(self._requests), 0x4000))
        assert rndis.parse_initialize_reply_untrusted(reply).status == rndis.STATUS_SUCCESS
        if wants:
            await self.set_filter(wants)

    async def set_filter(self, wants: int) -> None:
        assert not await self.set(oids.GEN_CURRENT_PACKET_FILTER, wants.to_bytes(4, "little"))

    # -- what it has got -------------------------------------------------------------------------

    def take_frames(self) -> list[bytes]:
        """Return the frames that have come since the last call."""
        found, self.received = self.received, []
        return [
            frame
            for each in found
            if each.channel_type == nvsp.CHANNEL_DATA
            for frame in each.frames()
        ]

    def take_frames_of(self, ids: list[int]) -> list[bytes]:
        """Do as :meth:`take_frames`, and add what is to be given back to a list."""
        ids += [each.transaction_id for each in self.received]
        return self.take_frames()

    def take_completions(self) -> list[tuple[int, int]]:
        """Return id and status of the RNDIS packets completed since the last call."""
        found, self.completions = self.completions, []
        return [(each, nvsp.parse_rndis_packet_complete_untrusted(data)) for each, data in found]

    def add_subchannel(self, index: int) -> tuple[Channel, GuestEnd]:
        """Open a sub-channel, whose rings are in a memory of its own."""
        branch, end = channel_pair(ring_pages=4, data_pages=16)
        branch.subchannel_index = index
        self.channel.deliver_subchannel(branch)
        return branch, end


@asynccontextmanager
async def running(
    endpoint: Endpoint | None = None,
    *,
    config: AdapterConfig | None = None,
    started: bool = True,
    guest: NetGuest | None = None,
    **options: Any,
) -> AsyncIterator[tuple[NetGuest, NetworkAdapter]]:
    """An adapter that runs, and its guest; at the end nothing may be left.

    Args:
        endpoint: Behind the adapter; by default a :class:`Network`.
        config: Of the adapter.
        started: Whether the guest has done the handshake.
        guest: Use this one.
        options: Of :meth:`NetGuest.start`.
    """
    adapter = NetworkAdapter(endpoint or Network(), mac=MAC, instance_id=UUID(int=5), config=config)
    guest = guest or NetGuest(subchannels=adapter.offer.max_subchannels)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(adapter.run, guest.channel)
        await trio.testing.wait_all_tasks_blocked()
        if started:
            await guest.start(**options)
            guest.received.clear()
            guest.completions.clear()
        yield guest, adapter
        guest.channel.end()
    assert not len(guest.host.leases), "a buffer is held when nobody uses it"
    guest.channel.close_doorbell()
    await adapter.aclose()


def message_of(frame: bytes, information: bytes = b"") -> bytes:
    """An RNDIS PACKET."""
    return rndis.build_packet_header(len(frame), information) + frame


def plain_frame(size: int = 64, *, source: bytes = MAC, target: bytes = PEER) -> bytes:
    """A frame of no protocol that anybody knows."""
    return (target + source + b"\x88\xb5").ljust(size, b"\x5a")


def incoming(size: int = 64, *, number: int = 0) -> Frame:
    """A frame for the guest."""
    head = plain_frame(14, source=PEER, target=MAC) + struct.pack("<I", number)
    return Frame(head.ljust(size, b"\xa5"))
