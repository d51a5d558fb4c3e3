"""NVSP and RNDIS in a trace, for people."""

from __future__ import annotations

from typing import Any

from netvsp.frames.frame import ETHERNET_HEADER, format_mac
from netvsp.wire import nvsp, rndis
from vmbus.dissect.layers import Layer, RingPacket
from vmbus.wire.packets import COMPLETION, TRANSFER_PAGES

_CHANNELS = {nvsp.CHANNEL_DATA: "data", nvsp.CHANNEL_CONTROL: "control"}
_STATUS = {
    nvsp.SUCCESS: "SUCCESS",
    nvsp.FAILURE: "FAILURE",
    nvsp.PROTOCOL_TOO_NEW: "PROTOCOL_TOO_NEW",
    nvsp.PROTOCOL_TOO_OLD: "PROTOCOL_TOO_OLD",
    nvsp.INVALID_RNDIS_PACKET: "INVALID_RNDIS_PACKET",
    nvsp.BUSY: "BUSY",
    nvsp.PROTOCOL_UNSUPPORTED: "PROTOCOL_UNSUPPORTED",
}
_ETHERTYPES = {0x0800: "IPv4", 0x0806: "ARP", 0x8100: "VLAN", 0x86DD: "IPv6"}


class NetvspDissector:
    """See :class:`vmbus.dissect.layers.ChannelDissector`."""

    def packet_untrusted(self, packet: RingPacket) -> list[Layer]:
        """Return ``nvsp``. Cannot block.

        Raises:
            GuestProtocolError: It is no NVSP message.
        """
        payload = packet.payload
        if packet.kind == COMPLETION and not payload.strip(b"\0"):
            return [Layer("nvsp", "empty", {})]
        number = nvsp.parse_type_untrusted(payload)
        name = nvsp.MESSAGE_NAMES.get(number, f"type {number}")
        fields: dict[str, Any] = {"type": name}
        text = name
        if number == nvsp.SEND_RNDIS_PACKET:
            sent = nvsp.parse_rndis_packet_untrusted(payload)
            fields["channel_type"] = _CHANNELS.get(sent.channel_type, sent.channel_type)
            text += f" {fields['channel_type']}"
            if packet.kind != TRANSFER_PAGES and sent.section_index != nvsp.NO_SECTION:
                fields |= {"section": sent.section_index, "section_size": sent.section_size}
                text += f", {sent.section_size} bytes in section {sent.section_index}"
        elif number == nvsp.SEND_RNDIS_PACKET_COMPLETE:
            text = self._status(nvsp.parse_rndis_packet_complete_untrusted(payload), text, fields)
        elif number == nvsp.INIT:
            least, greatest = nvsp.parse_init_untrusted(payload)
            fields |= {"least": least, "greatest": greatest}
            text += f" {nvsp.VERSION_NAMES.get(greatest, hex(greatest))}"
        elif number == nvsp.INIT_COMPLETE:
            _, status = nvsp.parse_init_complete_untrusted(payload)
            text = self._status(status, text, fields)
        elif number == nvsp.SEND_NDIS_CONFIG:
            config = nvsp.parse_ndis_config_untrusted(payload)
            fields |= {"mtu": config.mtu, "capabilities": config.capabilities}
            text += f" MTU {config.mtu}, capabilities {config.capabilities:#x}"
        elif number in {nvsp.SEND_RECEIVE_BUFFER, nvsp.SEND_SEND_BUFFER}:
            handle, _ = nvsp.parse_buffer_untrusted(payload)
            fields["gpadl"] = handle
            text += f" GPADL {handle:#x}"
        return [Layer("nvsp", text, fields)]

    @staticmethod
    def _status(status: int, text: str, fields: dict[str, Any]) -> str:
        fields["status"] = _STATUS.get(status, status)
        return f"{text} {fields['status']}"

    def memory_untrusted(self, data: bytes, total: int, request: bytes | None) -> list[Layer]:
        """Return ``rndis`` of the first message, and ``ethernet`` of its frame. Cannot block.

        Raises:
            GuestProtocolError: It is no RNDIS message.
        """
        kind, length = rndis.parse_header_untrusted(data)
        name = rndis.MESSAGE_NAMES.get(kind, f"type {kind:#x}")
        fields: dict[str, Any] = {"type": name, "length": length}
        text = name
        layers = []
        if kind == rndis.PACKET:
            where = rndis.parse_frame_untrusted(data)
            fields |= {"data_length": where.data_length, "info_length": where.info_length}
            text += f", {where.data_length} bytes"
            frame = data[where.data_offset : where.data_offset + where.data_length]
            if len(frame) >= ETHERNET_HEADER:
                layers.append(_ethernet(frame))
        elif kind in {rndis.QUERY, rndis.SET}:
            asked = rndis.parse_request_untrusted(data)
            fields |= {"request_id": asked.request_id, "oid": asked.oid}
            text += f" OID {asked.oid:#010x}"
        if length < total and kind == rndis.PACKET:
            fields["more"] = total - length
            text += f", and {total - length} bytes more"
        return [Layer("rndis", text, fields), *layers]


def _ethernet(frame: bytes) -> Layer:
    kind = int.from_bytes(frame[12:14], "big")
    word = _ETHERTYPES.get(kind, f"{kind:#06x}")
    to, source = format_mac(frame[:6]), format_mac(frame[6:12])
    return Layer(
        "ethernet", f"{source} > {to} {word}", {"source": source, "target": to, "type": word}
    )
