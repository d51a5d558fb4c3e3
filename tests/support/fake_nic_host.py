"""A network device for the scripted host: enough NVSP and RNDIS to please each driver.

It behaves well unless a test tells it not to: by replacing an answer in ``answers`` or ``replies``,
by holding completions, or by delivering whatever bytes it likes.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

import trio

from netvsp.guest import NetvscAdapter, attach
from netvsp.wire import ndis, nvsp, oids, rndis
from tests.support.fake_host import PAGE, Channel, Host, Machine, offer, poll_monitor
from vmbus.errors import leaves
from vmbus.guest import LINUX_6_1, Personality, boot
from vmbus.wire.guids import CLASS_NIC
from vmbus.wire.messages import OfferChannel
from vmbus.wire.packets import (
    build_transfer_pages,
    parse_descriptor_untrusted,
    parse_gpa_ranges_untrusted,
)

INSTANCE = UUID("eeeeeeee-0000-4444-8888-cccccccccccc")
ADDRESS = bytes.fromhex("00155d010203")
SECTION = 6144
SUB_ALLOCATION = 2048
ALL_SUMS = (
    ndis.CSUM_IP_OPTIONS | ndis.CSUM_TCP_OPTIONS | ndis.CSUM_TCP | ndis.CSUM_UDP | ndis.CSUM_IP
)
EVERYTHING = ndis.OffloadCapabilities(
    tx_ipv4=ALL_SUMS,
    rx_ipv4=ALL_SUMS,
    tx_ipv6=ALL_SUMS,
    rx_ipv6=ALL_SUMS,
    lso_max_size=65535,
    lso_min_segments=2,
    lso_ipv6=True,
    rsc_ipv4=True,
    rsc_ipv6=True,
)


class Sent(NamedTuple):
    """An RNDIS PACKET from the guest."""

    relid: int
    frame: bytes
    items: bytes
    message: bytes


def frame_message(data: bytes, items: bytes = b"") -> bytes:
    """An RNDIS PACKET with a frame."""
    return rndis.build_packet_header(len(data), items) + data


class Nic:
    """The device."""

    def __init__(self, host: Host, *, queues: int = 8) -> None:
        self.host = host
        self.versions = set(nvsp.VERSIONS)
        self.answers: dict[int, bytes] = {}
        """Payloads of completions by the type of the message, instead of the ordinary ones."""
        self.replies: dict[int, list[bytes]] = {}
        """RNDIS messages by object, or by type if there is none, instead of the ordinary reply."""
        self.objects = {
            oids.GEN_MAXIMUM_FRAME_SIZE: struct.pack("<I", 1500),
            oids.E802_3_PERMANENT_ADDRESS: ADDRESS,
            oids.E802_3_CURRENT_ADDRESS: ADDRESS,
            oids.GEN_FRIENDLY_NAME: "left port".encode("utf-16-le"),
            oids.GEN_MEDIA_CONNECT_STATUS: bytes(4),
            oids.GEN_LINK_SPEED: struct.pack("<I", 100_000_000),
            oids.GEN_RECEIVE_SCALE_CAPABILITIES: ndis.build_rss_capabilities(
                ndis.RssCapabilities(
                    ndis.RSS_TOEPLITZ | ndis.RSS_TCP_IPV4 | ndis.RSS_TCP_IPV6, 1, queues, 128
                )
            ),
        }
        self.capabilities = EVERYTHING
        self.statuses: dict[int, int] = {}
        """RNDIS status by object; others succeed if they are known."""
        self.max_packets = 8
        self.alignment = 3
        self.section_size = SECTION
        self.sub_allocation = SUB_ALLOCATION
        self.grant: int | None = None
        self.offered: int | None = None
        self.data_status = nvsp.SUCCESS
        self.holding = False
        self.held: list[tuple[Channel, int]] = []
        self.log: list[str] = []
        """Names of all that came, in order."""
        self.payloads: list[bytes] = []
        self.ids: list[tuple[str, int]] = []
        """Transaction ids."""
        self.control_ids: list[int] = []
        """RNDIS request ids."""
        self.sets: list[tuple[int, bytes]] = []
        self.packets: list[bytes] = []
        """Whole packets with frames."""
        self.sent: list[Sent] = []
        self.completions: list[tuple[int, int, bytes]] = []
        """relid, transaction id and payload of what the guest has completed."""
        self.receive: list[int] = []
        self.receive_id = 0
        self.send: list[int] = []
        self.next_section = 0
        self.count = 0
        self.filter = 0
        host.on_packet = self.packet
        host.offers = [offer(1, class_id=CLASS_NIC, instance_id=INSTANCE)]

    # -- memory

    def _bytes(self, pfns: Sequence[int], offset: int, length: int) -> bytes:
        out = bytearray()
        while length:
            page, inside = divmod(offset, PAGE)
            part = bytes(self.host.machine.view(pfns[page] * PAGE, PAGE)[inside : inside + length])
            out += part
            offset += len(part)
            length -= len(part)
        return bytes(out)

    def store(self, offset: int, data: bytes) -> None:
        """Write into the receive buffer."""
        while data:
            page, inside = divmod(offset, PAGE)
            view = self.host.machine.view(self.receive[page] * PAGE, PAGE)
            part = data[: PAGE - inside]
            view[inside : inside + len(part)] = part
            offset += len(part)
            data = data[len(part) :]

    # -- from the guest

    def packet(self, channel: Channel, packet: bytes) -> None:
        kind, offset, length, flags, tid = parse_descriptor_untrusted(packet)
        payload = packet[offset:length]
        message = int.from_bytes(payload[:4], "little")
        if kind == 11:
            self.completions.append((channel.offer.relid, tid, payload))
            return
        if message == nvsp.SEND_RNDIS_PACKET:
            self._rndis(channel, packet, payload, tid)
            return
        name = nvsp.MESSAGE_NAMES[message]
        self.log.append(name)
        self.payloads.append(payload)
        self.ids.append((name, tid))
        answer = self._nvsp(message, payload, channel)
        if flags & 1:
            channel.send(11, self.answers.get(message, answer), tid)

    def _nvsp(self, message: int, payload: bytes, channel: Channel) -> bytes:
        if message == nvsp.INIT:
            _least, version = nvsp.parse_init_untrusted(payload)
            known = version in self.versions
            return nvsp.build_init_complete(version, nvsp.SUCCESS if known else nvsp.FAILURE)
        if message == nvsp.SEND_RECEIVE_BUFFER:
            handle, self.receive_id = nvsp.parse_buffer_untrusted(payload)
            self.receive = self.host.gpadls[handle][1]
            self.count = len(self.receive) * PAGE // self.sub_allocation
            return nvsp.build_receive_buffer_complete(nvsp.SUCCESS, self.sub_allocation, self.count)
        if message == nvsp.SEND_SEND_BUFFER:
            handle, _number = nvsp.parse_buffer_untrusted(payload)
            self.send = self.host.gpadls[handle][1]
            return nvsp.build_send_buffer_complete(nvsp.SUCCESS, self.section_size)
        if message == nvsp.SUBCHANNEL:
            _operation, count = nvsp.parse_subchannel_untrusted(payload)
            granted = count if self.grant is None else self.grant
            offered = granted if self.offered is None else self.offered
            self.offer_sub_channels(channel.offer, offered)
            return nvsp.build_subchannel_complete(nvsp.SUCCESS, granted)
        return b""

    def offer_sub_channels(self, primary: OfferChannel, count: int) -> None:
        """Offer sub-channels; number 1 has relid 10."""
        for index in range(1, count + 1):
            new = offer(
                9 + index,
                class_id=CLASS_NIC,
                instance_id=INSTANCE,
                subchannel_index=index,
                monitor_allocated=primary.monitor_allocated,
                monitor_id=3 + index if primary.monitor_allocated else 0,
            )
            self.host.offers.append(new)
            self.host.send(new)

    def _rndis(self, channel: Channel, packet: bytes, payload: bytes, tid: int) -> None:
        _kind, offset, _length, flags, _tid = parse_descriptor_untrusted(packet)
        assert flags == 1
        about = nvsp.parse_rndis_packet_untrusted(payload)
        data = b""
        if about.section_index != nvsp.NO_SECTION:
            start = about.section_index * self.section_size
            data += self._bytes(self.send, start, about.section_size)
        if packet[0] == 9:
            ranges = parse_gpa_ranges_untrusted(packet, offset, max_ranges=64, allow_empty=True)
            for each in ranges:
                data += self._bytes(each.pfns, each.byte_offset, each.byte_count)
        if about.channel_type != nvsp.CHANNEL_CONTROL:
            self.packets.append(packet)
            self.ids.append(("frame", tid))
            while data:
                found = rndis.parse_frame_untrusted(data)
                message, data = data[: found.length], data[found.length :]
                self.sent.append(
                    Sent(
                        channel.offer.relid,
                        message[found.data_offset : found.data_offset + found.data_length],
                        message[found.info_offset : found.info_offset + found.info_length],
                        message,
                    )
                )
            if self.holding:
                self.held.append((channel, tid))
            else:
                channel.send(11, nvsp.build_rndis_packet_complete(self.data_status), tid)
            return
        self.ids.append(("control", tid))
        done = nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
        channel.send(11, self.answers.get(nvsp.SEND_RNDIS_PACKET, done), tid)
        self._control(channel, data)

    def release(self) -> None:
        """Complete the frames that are held."""
        self.holding = False
        held, self.held = self.held, []
        for channel, tid in held:
            channel.send(11, nvsp.build_rndis_packet_complete(self.data_status), tid)

    def _control(self, channel: Channel, message: bytes) -> None:
        kind, length = rndis.parse_header_untrusted(message)
        assert length == len(message)
        number = rndis.parse_request_id_untrusted(message)
        self.control_ids.append(number)
        name = rndis.MESSAGE_NAMES[kind]
        oid: int | None = None
        reply = b""
        if kind == rndis.INITIALIZE:
            reply = rndis.build_initialize_reply(
                number,
                rndis.STATUS_SUCCESS,
                max_packets=self.max_packets,
                max_transfer=0x4000,
                alignment=self.alignment,
            )
        elif kind == rndis.QUERY:
            request = rndis.parse_request_untrusted(message)
            oid = request.oid
            reply = self._query(number, oid, request.buffer)
        elif kind == rndis.SET:
            request = rndis.parse_request_untrusted(message)
            oid = request.oid
            self.sets.append((oid, request.buffer))
            if oid == oids.GEN_CURRENT_PACKET_FILTER:
                self.filter = int.from_bytes(request.buffer, "little")
            status = self.statuses.get(oid, rndis.STATUS_SUCCESS)
            reply = rndis.build_status_reply(kind, number, status)
        elif kind == rndis.KEEPALIVE:
            reply = rndis.build_status_reply(kind, number, rndis.STATUS_SUCCESS)
        self.log.append(name if oid is None else f"{name} {oids.NAMES.get(oid, hex(oid))}")
        messages = self.replies.get(oid or kind, [reply])
        for each in filter(None, messages):
            # Tests write their replies without knowing the id, which is 0 in them.
            unknown = each is not reply and each[8:12] == bytes(4)
            message = each[:8] + struct.pack("<I", number) + each[12:] if unknown else each
            self.deliver([message], relid=channel.offer.relid)

    def _query(self, number: int, oid: int, data: bytes) -> bytes:
        status = self.statuses.get(oid, rndis.STATUS_SUCCESS)
        found = self.objects.get(oid)
        if oid == oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES:
            _kind, revision, _size = ndis.parse_object_untrusted(data)
            found = ndis.build_offload_capabilities(self.capabilities, revision)
        if found is None and not status:
            status = rndis.STATUS_NOT_SUPPORTED
        return rndis.build_query_reply(number, status, b"" if status else found or b"")

    # -- to the guest

    def deliver(
        self,
        messages: Sequence[bytes],
        *,
        relid: int = 1,
        tid: int | None = None,
        offsets: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        set_id: int | None = None,
        flags: int = 1,
        payload: bytes | None = None,
    ) -> int:
        """Put RNDIS messages into sub-allocations, in turn, and send one packet about them."""
        if offsets is None:
            places = []
            for message in messages:
                places.append(self.next_section % self.count)
                self.next_section += -(-len(message) // self.sub_allocation) or 1
            offsets = [place * self.sub_allocation for place in places]
        for place, message in zip(offsets, messages, strict=True):
            self.store(place, message)
        sizes = lengths or [len(message) for message in messages]
        if tid is None:
            tid = offsets[0] // self.sub_allocation
        body = nvsp.build_rndis_packet(nvsp.CHANNEL_DATA) if payload is None else payload
        self.host.channels[relid].write(
            build_transfer_pages(
                body,
                list(zip(sizes, offsets, strict=True)),
                set_id=self.receive_id if set_id is None else set_id,
                transaction_id=tid,
                flags=flags,
            )
        )
        return tid

    def frame(self, data: bytes, items: bytes = b"", **options) -> int:
        """Deliver one frame."""
        return self.deliver([frame_message(data, items)], **options)

    def indicate(self, status: int, data: bytes = b"", **options) -> None:
        """Deliver INDICATE_STATUS."""
        self.deliver([rndis.build_indication(status, data)], **options)

    def notify(self, payload: bytes, *, relid: int = 1, flags: int = 0) -> None:
        """Send an in-band message."""
        self.host.channels[relid].send(6, payload, 0, flags)


@asynccontextmanager
async def plugged(
    personality: Personality = LINUX_6_1,
    *,
    vps: int = 1,
    pages: int = 2048,
    queues: int = 8,
    prepare=None,
    **options,
) -> AsyncIterator[tuple[NetvscAdapter, Nic]]:
    """A guest whose network driver is attached, with small buffers, and its device."""
    machine = Machine(vps=vps, pages=pages)
    nic = Nic(machine.host, queues=queues)
    if prepare is not None:
        prepare(nic)
    sizes = {"receive_size": 32 * PAGE, "send_size": 12 * PAGE, "ring_pages": 8}
    if personality.needs_monitor:
        machine.host.offers = [
            offer(1, class_id=CLASS_NIC, instance_id=INSTANCE, monitor_allocated=True, monitor_id=3)
        ]
    try:
        async with trio.open_nursery() as nursery:
            if personality.needs_monitor:
                nursery.start_soon(poll_monitor, machine)
            async with boot(machine, personality) as guest:
                (found,) = await guest.connection.connect()
                yield await attach(guest, found, **{**sizes, **options}), nic
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leaves(group)[0] from None
