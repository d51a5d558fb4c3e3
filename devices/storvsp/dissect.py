"""vstor and SCSI in a trace, for people."""

from __future__ import annotations

from typing import Any

from storvsp.scsi.cdb import command_name, decode_transfer_untrusted
from storvsp.scsi.sense import CheckCondition
from storvsp.wire import (
    CREATE_SUB_CHANNELS,
    DATA_IN,
    DATA_OUT,
    EXECUTE_SRB,
    OPERATION_NAMES,
    PACKET_SIZE,
    QUERY_PROTOCOL_VERSION,
    SRB_AUTOSENSE_VALID,
    SRB_SUCCESS,
    Srb,
    parse_packet_untrusted,
    parse_protocol_version_untrusted,
    parse_srb_reply_untrusted as parse_reply_untrusted,
    parse_sub_channels_untrusted,
    unpack_srb,
    whole_packet_untrusted,
)
from vmbus.dissect.layers import Layer, RingPacket
from vmbus.wire.packets import COMPLETION

_WAYS = {DATA_OUT: "out", DATA_IN: "in"}
_TRANSFERS = frozenset({0x08, 0x0A, 0x28, 0x2A, 0x88, 0x8A, 0xA8, 0xAA, 0x35, 0x91, 0x2F, 0x8F})
"""READ, WRITE, SYNCHRONIZE CACHE and VERIFY, which name blocks."""
_STATUS = {0: "GOOD", 2: "CHECK CONDITION", 8: "BUSY", 0x18: "RESERVATION CONFLICT",
           0x28: "TASK SET FULL", 0x40: "TASK ABORTED"}  # fmt: skip


class StorvspDissector:
    """See :class:`vmbus.dissect.layers.ChannelDissector`."""

    def packet_untrusted(self, packet: RingPacket) -> list[Layer]:
        """Return ``vstor``, and ``scsi`` if it is a command or its answer. Cannot block.

        Raises:
            GuestProtocolError: It is no vstor packet.
        """
        payload = packet.payload[:PACKET_SIZE]
        vstor = parse_packet_untrusted(payload)
        name = OPERATION_NAMES.get(vstor.operation, f"operation {vstor.operation}")
        fields: dict[str, Any] = {
            "operation": name,
            "flags": vstor.flags,
            "status": vstor.status,
        }
        if packet.kind == COMPLETION:
            return self._answer_untrusted(packet, payload, name, fields)
        summary = name
        if vstor.operation == EXECUTE_SRB:
            srb = unpack_srb(whole_packet_untrusted(payload))
            return [Layer("vstor", name, fields), _command(srb)]
        if vstor.operation == QUERY_PROTOCOL_VERSION:
            version, _ = parse_protocol_version_untrusted(vstor.body)
            fields["version"] = f"{version >> 8}.{version & 0xFF}"
            summary += f" {fields['version']}"
        elif vstor.operation == CREATE_SUB_CHANNELS:
            fields["count"] = parse_sub_channels_untrusted(vstor.body)
            summary += f" {fields['count']}"
        return [Layer("vstor", summary, fields)]

    def _answer_untrusted(
        self, packet: RingPacket, payload: bytes, name: str, fields: dict[str, Any]
    ) -> list[Layer]:
        status = fields["status"]
        said = f", NTSTATUS {status:#010x}" if status else ""
        asked = packet.request
        if asked is None or int.from_bytes(asked[:4], "little") != EXECUTE_SRB:
            what = None if asked is None else int.from_bytes(asked[:4], "little")
            if what is not None:
                fields["request"] = OPERATION_NAMES.get(what, f"operation {what}")
                name += f" of {fields['request']}"
            return [Layer("vstor", name + said, fields)]
        reply = parse_reply_untrusted(payload.ljust(PACKET_SIZE, b"\0"))
        cdb = unpack_srb(whole_packet_untrusted(asked[:PACKET_SIZE])).cdb
        word = _STATUS.get(reply.scsi_status, f"status {reply.scsi_status:#04x}")
        found: dict[str, Any] = {
            "opcode": command_name(cdb),
            "status": word,
            "srb_status": reply.srb_status,
            "transfer_length": reply.transfer_length,
        }
        text = f"{found['opcode']} {word}"
        if reply.srb_status != SRB_SUCCESS:
            text += f", SRB {reply.srb_status:#04x}"
        if reply.srb_status & SRB_AUTOSENSE_VALID:
            sense = reply.sense[: reply.sense_length]
            found["sense"] = sense.hex()
            if len(sense) >= 14:
                key, asc, ascq = sense[2] & 0x0F, sense[12], sense[13]
                found |= {"sense_key": key, "asc": asc, "ascq": ascq}
                text += f", sense {key:X}/{asc:02X}/{ascq:02X}"
        elif reply.transfer_length:
            text += f", {reply.transfer_length} bytes"
        return [Layer("vstor", name + said, fields), Layer("scsi", text, found)]

    def memory_untrusted(self, data: bytes, total: int, request: bytes | None) -> list[Layer]:
        """Say which command it is of. Cannot block.

        Raises:
            GuestProtocolError: The request is no vstor packet.
        """
        if request is None or int.from_bytes(request[:4], "little") != EXECUTE_SRB:
            return []
        srb = unpack_srb(whole_packet_untrusted(request[:PACKET_SIZE]))
        return [
            Layer("scsi", f"data of {command_name(srb.cdb)}", {"opcode": command_name(srb.cdb)})
        ]


def _command(srb: Srb) -> Layer:
    cdb = srb.cdb[: srb.cdb_length]
    name = command_name(cdb)
    fields: dict[str, Any] = {
        "opcode": name,
        "cdb": cdb.hex(),
        "path": srb.path,
        "target": srb.target,
        "lun": srb.lun,
        "direction": _WAYS.get(srb.data_in, "none"),
        "transfer_length": srb.transfer_length,
    }
    text = f"{srb.path}:{srb.target}:{srb.lun} {name}"
    if cdb and cdb[0] in _TRANSFERS and len(cdb) >= (16 if cdb[0] >= 0x88 else 6):
        try:
            transfer = decode_transfer_untrusted(srb.cdb)
        except CheckCondition:
            pass
        else:
            fields |= {"lba": transfer.lba, "blocks": transfer.blocks}
            text += f" LBA {transfer.lba}, {transfer.blocks} blocks"
    if srb.transfer_length:
        text += f", {srb.transfer_length} bytes {fields['direction']}"
    return Layer("scsi", text, fields)
