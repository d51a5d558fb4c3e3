"""One life of the adapter: from OPEN of its primary channel to the close.

The primary channel carries the handshake, every control request and data; sub-channels carry data.
A packet that breaks a rule costs its sender that packet: it is answered if it asks for that, with
a status where the message has one, and counted.

**Exactly one completion for each packet that asks for one, and none for others**: Linux hangs with
its lock held without it, DPDK gives the device up at one too many. Where NVSP defines no answer
(SEND_NDIS_VERSION, SEND_NDIS_CONFIG, SWITCH_DATA_PATH, the REVOKEs) it is empty: OpenBSD looks at
the type of the last answer in its buffer, and refuses another one (if_hvn.c: hvn_nvs_cmd).
"""

from __future__ import annotations

import enum

import trio

from netvsp.backlog import TURN
from netvsp.buffers import ReceiveBuffer, SendBuffer
from netvsp.control import MAX_CONTROL, Control
from netvsp.endpoint import Endpoint
from netvsp.frames.frame import ETHERNET_HEADER, MAX_MTU, Buffer
from netvsp.link import AdapterConfig, Link
from netvsp.placing import part_size
from netvsp.receive import Receiver
from netvsp.statistics import AdapterStatistics
from netvsp.transmit import COST, Sender
from netvsp.wire import nvsp, rndis
from vmbus.errors import STATUS_INSUFFICIENT_RESOURCES, GuestProtocolError
from vmbus.host.channel import Channel
from vmbus.host.serving import Life
from vmbus.memory import PAGE_SIZE
from vmbus.ring import Packet
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, IN_BAND

SECTION_SIZE = 6144
"""Bytes of a section of the send buffer: what every host has, and drivers are made for."""
MAX_BUFFER = 32 << 20
"""Bytes of a receive or send buffer."""
MIN_RECEIVE_PARTS = 64
"""Sub-allocations that a receive buffer has to have."""
BUFFER_COST = TURN
"""Of a message that shares a buffer, which may have 8192 pages: a turn."""
REFUSAL_COST = TURN // 8
"""Of a packet that is refused: one that shares a buffer may be, for its last page."""
DEFAULT_MTU = 1500
"""Bytes of payload that there is always room for."""

_REFUSALS = {
    nvsp.INIT: nvsp.build_init_complete(0, nvsp.FAILURE),
    nvsp.SEND_RECEIVE_BUFFER: nvsp.build_receive_buffer_complete(nvsp.FAILURE),
    nvsp.SEND_SEND_BUFFER: nvsp.build_send_buffer_complete(nvsp.FAILURE),
    nvsp.SUBCHANNEL: nvsp.build_subchannel_complete(nvsp.FAILURE, 0),
    nvsp.SEND_RNDIS_PACKET: nvsp.build_rndis_packet_complete(nvsp.INVALID_RNDIS_PACKET),
}
"""What answers a message that is refused; nothing is in the answer to any other."""


class Stage(enum.Enum):
    """How far the handshake has come; each value names what is expected next."""

    INIT = "INIT"
    AGREED = "SEND_NDIS_VERSION and buffers"
    READY = "RNDIS"
    """There is a receive buffer."""


class Session:
    """State of one life; all channels of the life share it.

    Args:
        primary: The primary channel.
        endpoint: Where frames go.
        config: What the adapter agrees to.
        link: Its link.
        statistics: Its counters.

    Attributes:
        stage: How far the handshake has come.
        version: NVSP version agreed on.
        subchannels: Sub-channels offered.
        refused: Packets that broke a rule.
    """

    def __init__(
        self,
        primary: Channel,
        endpoint: Endpoint,
        *,
        config: AdapterConfig,
        link: Link,
        statistics: AdapterStatistics,
    ) -> None:
        self.primary = primary
        self.stage = Stage.INIT
        self.version = 0
        self.subchannels = 0
        self.refused = 0
        self.ndis_version = (0, 0)
        self.capabilities = 0
        self._config = config
        self._link = link
        self._statistics = statistics
        self._endpoint = endpoint
        self.control = Control(config, link, statistics, self._settings_changed)
        self.receiver = Receiver(self.control, config, link, statistics.receive, self._flush_later)
        self._senders: dict[Channel, Sender] = {}
        self._send_buffer: SendBuffer | None = None
        self._told_up = link.up
        self._told_speed = link.speed
        self._untold = False
        """Whether there was no place for what is to be said of the link."""
        self._table_sent = False
        self._max_frame = link.max_frame
        self._life = Life(primary, self.serve_batch, opened=self._opened, closed=self._closed)
        self._nursery: trio.Nursery | None = None
        self._flushing: set[Channel] = set()

    async def run(self) -> None:
        """Serve until the primary ends. Returns when nothing touches guest memory any more."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await self._life.run()
                finally:
                    self._nursery = None
                nursery.cancel_scope.cancel()
        finally:
            self._release()

    def _flush_later(self, channel: Channel) -> None:
        """Have what waits for a ring, or for the end of a pause, go on in a task. Cannot block."""
        if self._nursery is not None and channel not in self._flushing:
            self._flushing.add(channel)
            self._nursery.start_soon(self._flush, channel)

    async def _flush(self, channel: Channel) -> None:
        try:
            await channel.undertakings.wait_released()
            await channel.flush()
        except trio.EndOfChannel:
            return
        except GuestProtocolError as error:
            if channel is self.primary:
                raise
            # Its own task ends when it next writes there; the others go on.
            channel.complain(str(error))
            self.receiver.lose(channel)
        finally:
            self._flushing.discard(channel)
        self.receiver.flushed(channel)

    def _release(self) -> None:
        self.receiver.channels.clear()
        self.receiver.forget()
        for buffer in (self.receiver.buffer, self._send_buffer):
            if buffer is not None:
                buffer.release()
        self.receiver.buffer = self._send_buffer = None
        self._senders.clear()

    def _opened(self, channel: Channel) -> None:
        index = channel.subchannel_index
        sender = self._senders[channel] = Sender(
            channel,
            index % self._endpoint.info.queues,
            self._endpoint,
            config=self._config,
            link=self._link,
            statistics=self._statistics.transmit,
        )
        sender.messages.send_buffer = self._send_buffer
        sender.max_frame = self._max_frame
        sender.ready = bool(self.control.filter)
        self.receiver.open(channel)
        self._send_table()

    def _closed(self, channel: Channel) -> None:
        self._senders.pop(channel, None)
        self.receiver.lose(channel)

    # -- packets ---------------------------------------------------------------------------------

    def serve_batch(self, channel: Channel, packets: list[Packet], nursery: trio.Nursery) -> int:
        """Act on packets that came in together, as many as one turn is for. Cannot block.

        Returns:
            How many; the rest is to come again.
        """
        sender = self._senders[channel]
        done = sender.serve_batch_untrusted(packets, nursery, self._act, parts=self._life.parts)
        if self._untold:
            self.link_changed()
        return done

    def _act(self, sender: Sender, packet: Packet, nursery: trio.Nursery) -> int:
        """Act on a packet, or refuse it. Returns what that costs beside what any packet does."""
        channel = sender.channel
        try:
            if packet.kind != COMPLETION:
                return self._packet_untrusted(sender, packet, nursery)
            self.receiver.completed_untrusted(channel, packet.transaction_id)
            if packet.wants_completion:  # no driver's does
                channel.complete(packet.transaction_id, b"")
        except GuestProtocolError as error:
            self._complain(channel, packet, str(error))
            self._refuse(channel, packet)
            return REFUSAL_COST
        return 0

    def _refuse(self, channel: Channel, packet: Packet) -> None:
        """Answer a packet that makes no sense as the message does that it seems to be."""
        self._statistics.transmit.errors += 1
        if packet.wants_completion:
            kind = int.from_bytes(packet.payload[:4], "little")
            channel.complete(packet.transaction_id, _REFUSALS.get(kind, b""))

    def _packet_untrusted(self, sender: Sender, packet: Packet, nursery: trio.Nursery) -> int:
        """Act on a packet; frames that it holds are sent. Returns what it costs."""
        if packet.kind not in {IN_BAND, GPA_DIRECT}:
            raise GuestProtocolError(f"packet of type {packet.kind}", field="type")
        data = packet.data
        start = packet.payload_offset
        if len(data) - start < nvsp.RNDIS_PACKET.size:
            return self._message_untrusted(sender.channel, packet)
        kind, channel_type, section, length = nvsp.RNDIS_PACKET.unpack_from(data, start)
        if kind != nvsp.SEND_RNDIS_PACKET:
            return self._message_untrusted(sender.channel, packet)
        self._expect_agreed("SEND_RNDIS_PACKET")
        pieces = sender.pieces_untrusted(packet, section, length)
        # UEFI says 2, which is neither frames nor control, for its frames (NetvscTransmit).
        if channel_type != nvsp.CHANNEL_DATA and not _is_frame(pieces[0]):
            self._control_untrusted(sender, packet, pieces)
            return COST
        frames = sender.messages.frames_untrusted(pieces)
        cost = sender.cost(frames, len(pieces))
        if not self.control.filter:
            # Drivers send nothing before; Windows does, and expects it to be taken.
            self._statistics.transmit.dropped["not ready"] += len(frames)
            frames = []
        sender.add(packet, frames, nursery)
        return cost

    def _control_untrusted(self, sender: Sender, packet: Packet, pieces: list[Buffer]) -> None:
        if sender.channel is not self.primary:
            raise GuestProtocolError("a control message on a sub-channel", field="channel_type")
        if sum(map(len, pieces)) > MAX_CONTROL:
            raise GuestProtocolError(
                f"a control message of {sum(map(len, pieces))} bytes", field="msg_len"
            )
        message = b"".join(pieces)
        if self.stage is not Stage.READY and message[:4] != _HALT:
            # There is no place for its reply. DPDK halts when it has taken its buffers back.
            raise GuestProtocolError(
                f"SEND_RNDIS_PACKET where {self.stage.value} is expected", field="msg_type"
            )
        self.receiver.check_control()  # from here on it is answered
        reply = self.control.request_untrusted(message)
        if packet.wants_completion:
            # Before the reply: macOS waits for this one first.
            self.primary.complete(
                packet.transaction_id, nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
            )
        if reply:
            self.receiver.send_control(reply)

    # -- NVSP ------------------------------------------------------------------------------------

    def _message_untrusted(self, channel: Channel, packet: Packet) -> int:
        """Act on a message that is not RNDIS. Returns what it costs."""
        payload = packet.payload
        kind = nvsp.parse_type_untrusted(payload)
        name = nvsp.MESSAGE_NAMES.get(kind, str(kind))
        if channel is not self.primary:
            raise GuestProtocolError(f"NVSP {name} on a sub-channel", field="msg_type")
        answer = b""
        match kind:
            case nvsp.INIT:
                answer = self._init_untrusted(payload)
            case nvsp.SEND_NDIS_VERSION:
                self._expect_agreed(name)
                self.ndis_version = nvsp.parse_ndis_version_untrusted(payload)
            case nvsp.SEND_NDIS_CONFIG:
                self._expect_agreed(name)
                self._configure(nvsp.parse_ndis_config_untrusted(payload))
            case nvsp.SEND_RECEIVE_BUFFER:
                answer = self._receive_buffer_untrusted(channel, payload)
            case nvsp.SEND_SEND_BUFFER:
                answer = self._send_buffer_untrusted(channel, payload)
            case nvsp.REVOKE_RECEIVE_BUFFER:
                self._drop_receive_buffer()
            case nvsp.REVOKE_SEND_BUFFER:
                self._drop_send_buffer()
            case nvsp.SUBCHANNEL:
                answer = self._subchannels_untrusted(payload)
            case nvsp.SWITCH_DATA_PATH:
                if nvsp.parse_data_path_untrusted(payload) != nvsp.DATA_PATH_SYNTHETIC:
                    self._complain(channel, packet, "SWITCH_DATA_PATH to a VF that there is not")
            case nvsp.OID_QUERY_EX:
                answer = nvsp.build_oid_query_complete(rndis.STATUS_NOT_SUPPORTED)
            case nvsp.SEND_RNDIS_PACKET:
                raise GuestProtocolError("NVSP SEND_RNDIS_PACKET is too short", field="length8")
            case _:
                raise GuestProtocolError(f"NVSP {name} is not a request", field="msg_type")
        if packet.wants_completion:
            channel.complete(packet.transaction_id, answer)
        shares = kind in {nvsp.SEND_RECEIVE_BUFFER, nvsp.SEND_SEND_BUFFER}
        return BUFFER_COST if shares else COST

    def _expect_agreed(self, name: str) -> None:
        if self.stage is Stage.INIT:
            raise GuestProtocolError(
                f"NVSP {name} where {self.stage.value} is expected", field="msg_type"
            )

    def _init_untrusted(self, payload: bytes) -> bytes:
        least, greatest = nvsp.parse_init_untrusted(payload)
        for version in reversed(nvsp.VERSIONS):
            if least <= version <= greatest and version <= self._config.max_version:
                break
        else:
            status = (
                nvsp.PROTOCOL_TOO_NEW if least > nvsp.VERSION_6_1 else nvsp.PROTOCOL_UNSUPPORTED
            )
            return nvsp.build_init_complete(greatest, status)
        self._start_over()
        self.version = self.control.version = version
        self.stage = Stage.AGREED
        return nvsp.build_init_complete(version, nvsp.SUCCESS)

    def _start_over(self) -> None:
        self._drop_receive_buffer()
        self._drop_send_buffer()
        self.control.reset()
        self._set_mtu(DEFAULT_MTU, DEFAULT_MTU)
        self.capabilities = 0
        self.receiver.tags_beside = self.control.coalesces = False

    def _configure(self, config: nvsp.NdisConfig) -> None:
        # Linux counts the Ethernet header, FreeBSD does not (hn_nvs_conf_ndis); so the frames that
        # there is room for are those of the longer reading. And nobody minds room for 1500 bytes.
        said = config.mtu if config.mtu <= MAX_MTU + ETHERNET_HEADER else DEFAULT_MTU
        self._set_mtu(max(said - ETHERNET_HEADER, DEFAULT_MTU), max(said, DEFAULT_MTU))
        self.capabilities = config.capabilities
        self.receiver.tags_beside = bool(config.capabilities & nvsp.CAPABILITY_8021Q)
        self.control.coalesces = bool(config.capabilities & nvsp.CAPABILITY_RSC)

    def _set_mtu(self, mtu: int, longest: int) -> None:
        """Agree on what a guest wants, or what the network carries; the guest asks for it again.

        Args:
            mtu: Bytes of payload.
            longest: Bytes of payload of the frames that there is to be room for.
        """
        mtu = min(mtu, self._link.mtu)
        max_frame = min(longest, self._link.mtu) + ETHERNET_HEADER
        self.control.mtu = mtu
        self._max_frame = max_frame
        for sender in self._senders.values():
            sender.max_frame = max_frame

    # -- buffers ---------------------------------------------------------------------------------

    def _receive_buffer_untrusted(self, channel: Channel, payload: bytes) -> bytes:
        self._expect_agreed("SEND_RECEIVE_BUFFER")
        handle, number = nvsp.parse_buffer_untrusted(payload)
        if self.receiver.buffer is not None and not self.receiver.buffer.gone:
            raise GuestProtocolError("a second receive buffer", field="gpadl_handle")
        lease = channel.lease_gpadl(handle)
        try:
            pages = lease.gpadl.size
            size = part_size(self._max_frame, pages if self.control.may_coalesce else 0)
            if not MIN_RECEIVE_PARTS * size <= pages <= MAX_BUFFER:
                raise GuestProtocolError(f"a receive buffer of {pages} bytes", field="gpadl_handle")
            buffer = ReceiveBuffer(lease, channel.memory, size)
        except GuestProtocolError:
            lease.release()
            raise
        self.receiver.forget()
        self.receiver.buffer, self.receiver.buffer_id = buffer, number
        self.receiver.sort()
        self.stage = Stage.READY
        return nvsp.build_receive_buffer_complete(nvsp.SUCCESS, buffer.part_size, buffer.count)

    def _send_buffer_untrusted(self, channel: Channel, payload: bytes) -> bytes:
        self._expect_agreed("SEND_SEND_BUFFER")
        handle, _number = nvsp.parse_buffer_untrusted(payload)
        if self._send_buffer is not None and not self._send_buffer.gone:
            raise GuestProtocolError("a second send buffer", field="gpadl_handle")
        lease = channel.lease_gpadl(handle)
        try:
            if not PAGE_SIZE <= lease.gpadl.size <= MAX_BUFFER:
                raise GuestProtocolError(
                    f"a send buffer of {lease.gpadl.size} bytes", field="gpadl_handle"
                )
            buffer = SendBuffer(lease, channel.memory, SECTION_SIZE)
        except GuestProtocolError:
            lease.release()
            raise
        self._send_buffer = buffer
        for sender in self._senders.values():
            sender.messages.send_buffer = buffer
        return nvsp.build_send_buffer_complete(nvsp.SUCCESS, SECTION_SIZE)

    def _drop_receive_buffer(self) -> None:
        buffer, self.receiver.buffer = self.receiver.buffer, None
        if buffer is not None:
            buffer.release()
            self.receiver.forget()
            self.stage = Stage.AGREED

    def _drop_send_buffer(self) -> None:
        buffer, self._send_buffer = self._send_buffer, None
        for sender in self._senders.values():
            sender.messages.send_buffer = None
        if buffer is not None:
            buffer.release()

    # -- sub-channels ----------------------------------------------------------------------------

    def _subchannels_untrusted(self, payload: bytes) -> bytes:
        operation, count = nvsp.parse_subchannel_untrusted(payload)
        if operation != nvsp.SUBCHANNEL_ALLOCATE or self.version < nvsp.VERSION_5:
            raise GuestProtocolError(f"SUBCHANNEL operation {operation}", field="op")
        if self.subchannels:
            raise GuestProtocolError("SUBCHANNEL for the second time", field="op")
        count = min(count, self._config.max_queues - 1)
        try:
            if count:
                self.primary.offer_subchannels(count)
        except GuestProtocolError as error:
            if error.status != STATUS_INSUFFICIENT_RESOURCES:
                raise
            count = 0
        self.subchannels = count
        return nvsp.build_subchannel_complete(nvsp.SUCCESS, count)

    def _send_table(self) -> None:
        """Tell the guest which channels to send on, when it has opened all that it has asked for.

        One that opens fewer is told nothing: it sends on the ones it has.
        """
        channels = sorted(self.receiver.channels)
        if self._table_sent or not self.subchannels or len(channels) <= self.subchannels:
            return
        self._table_sent = True
        table = tuple(channels[i % len(channels)] for i in range(nvsp.SEND_TABLE_ENTRIES))
        self.primary.send(nvsp.build_send_table(table))
        self._flush_later(self.primary)

    # -- link and settings -----------------------------------------------------------------------

    def link_changed(self) -> None:
        """Tell the guest about its link. Cannot block."""
        link = self._link
        if self.control.state.name == "DOWN" or self.stage is not Stage.READY:
            self._told_up, self._told_speed = link.up, link.speed
            return
        self._untold = False
        if link.speed != self._told_speed:
            speed = min(link.speed // 100, 0xFFFFFFFF).to_bytes(4, "little")
            if self._indicate(rndis.STATUS_LINK_SPEED_CHANGE, speed):
                self._told_speed = link.speed
        if link.up != self._told_up and self._indicate(
            rndis.STATUS_MEDIA_CONNECT if link.up else rndis.STATUS_MEDIA_DISCONNECT
        ):
            self._told_up = link.up

    def _indicate(self, status: int, buffer: bytes = b"") -> bool:
        """Tell the guest of a change; False: later, when it has taken what it was told before."""
        try:
            self.receiver.check_control()
        except GuestProtocolError as error:
            self._untold = True
            self.primary.complain(str(error))
            return False
        self.receiver.send_control(rndis.build_indication(status, buffer))
        return True

    def _settings_changed(self) -> None:
        self._told_up, self._told_speed = self._link.up, self._link.speed
        for sender in self._senders.values():
            sender.ready = bool(self.control.filter)
        self.receiver.sort()

    def _complain(self, channel: Channel, packet: Packet, text: str) -> None:
        self.refused += 1
        channel.complain(text, packet.transaction_id)


def _is_frame(piece: Buffer) -> bool:
    """Whether the first RNDIS message of a packet is a PACKET."""
    return piece[:4] == _PACKET


_PACKET = rndis.PACKET.to_bytes(4, "little")
_HALT = rndis.HALT.to_bytes(4, "little")
