"""A storage driver reduced to sending and receiving."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import trio
import trio.testing

from storvsp import ScsiController
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    COMPLETE_IO,
    END_INITIALIZATION,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    build_packet,
    build_protocol_version,
    build_srb,
    parse_packet_untrusted,
    parse_srb_reply_untrusted,
)
from tests.support.patience import PATIENCE
from vmbus.testing import GuestEnd, channel_pair
from vmbus.wire.gpa import build_range, page_count
from vmbus.wire.packets import (
    COMPLETION,
    FLAG_COMPLETION_REQUESTED,
    GPA_DIRECT,
    IN_BAND,
    RANGES_HEADER,
    build_packet as build_ring_packet,
)

ABSENT = 0x20


SUCCESS = 0x01


CHECK = 0x84


INQUIRY = bytes([0x12, 0, 0, 0, 36, 0])


TEST_UNIT_READY = bytes(6)


REPORT_LUNS = struct.pack(">BBBBBBIBB", 0xA0, 0, 0, 0, 0, 0, 4096, 0, 0)


READ_CAPACITY = bytes([0x25]) + bytes(9)


class Reply(NamedTuple):
    srb_status: int
    scsi_status: int
    transferred: int
    sense: bytes
    data: bytes
    raw: bytes


class Line:
    """A driver reduced to sending and receiving."""

    def __init__(self, guest: GuestEnd) -> None:
        self.guest = guest
        self.next_id = 0

    def send(
        self,
        payload: bytes,
        *,
        identity: int | None = None,
        wants: bool = True,
        kind: int = IN_BAND,
        header: bytes = b"",
    ) -> int:
        if identity is None:
            self.next_id += 1
            identity = self.next_id
        flags = FLAG_COMPLETION_REQUESTED if wants else 0
        packet = build_ring_packet(
            kind, payload, transaction_id=identity, flags=flags, header=header
        )
        assert self.guest.send(packet) == 1
        return identity

    async def replies(self) -> list[Any]:
        await trio.testing.wait_all_tasks_blocked()
        return self.guest.receive_nowait()

    async def control(self, operation: int, body: bytes = b"", *, size: int = 64) -> Any:
        identity = self.send(build_packet(operation, body, size=size))
        (packet,) = await self.replies()
        assert (packet.kind, packet.transaction_id) == (COMPLETION, identity)
        assert len(packet.payload) == -(-size // 8) * 8
        answer = parse_packet_untrusted(packet.payload)
        assert answer.operation == COMPLETE_IO
        return answer

    async def handshake(self, version: int = 0x602) -> None:
        assert (await self.control(BEGIN_INITIALIZATION)).status == 0
        body = build_protocol_version(version)
        assert (await self.control(QUERY_PROTOCOL_VERSION, body)).status == 0
        assert (await self.control(QUERY_PROPERTIES)).status == 0
        assert (await self.control(END_INITIALIZATION)).status == 0

    def start(
        self,
        cdb: bytes,
        *,
        read: int = 0,
        write: bytes = b"",
        offset: int = 0,
        size: int = 64,
        **srb: Any,
    ) -> int:
        """Send a command; its data lies from the first free page on."""
        length = read or len(write)
        data_in = 1 if read else 0 if write else 2
        srb.setdefault("sense_length", 20)
        payload = build_srb(cdb, data_in=data_in, transfer_length=length, size=size, **srb)
        if not length:
            return self.send(payload)
        pages = page_count(offset, length)
        pfns = range(self.guest.free_pfn, self.guest.free_pfn + pages)
        self.guest.memory.write(pfns[0] * 4096 + offset, write or bytes(length))
        header = RANGES_HEADER.pack(0, 1) + build_range(length, offset, pfns)
        return self.send(payload, kind=GPA_DIRECT, header=header)

    async def command(self, cdb: bytes, **options: Any) -> Reply:
        identity = self.start(cdb, **options)
        (packet,) = await self.replies()
        assert (packet.kind, packet.transaction_id) == (COMPLETION, identity)
        return self.reply(packet, options.get("offset", 0))

    def reply(self, packet: Any, offset: int = 0) -> Reply:
        srb = parse_srb_reply_untrusted(packet.payload)
        assert (srb.operation, srb.status) == (COMPLETE_IO, 0)
        at = self.guest.free_pfn * 4096 + offset
        data = self.guest.memory.read(at, srb.transfer_length)
        sense = srb.sense[: srb.sense_length] if srb.srb_status & 0x80 else b""
        return Reply(
            srb.srb_status, srb.scsi_status, srb.transfer_length, sense, data, packet.payload
        )


@asynccontextmanager
async def line(store: ScsiController, *, ready: bool = True) -> AsyncIterator[Line]:
    channel, guest = channel_pair(offer=store.offer)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run, channel)
            made = Line(guest)
            if ready:
                await made.handshake()
            yield made
            channel.end()
    channel.close_doorbell()


async def clear(wire: Line, **where: int) -> None:
    """Take the unit attentions that a new unit has for everybody."""
    for _ in range(6):
        if (await wire.command(TEST_UNIT_READY, **where)).srb_status == SUCCESS:
            return
