"""The vstor protocol: what a storage driver and the controller say to each other over a channel.

Every message is one ``vstor_packet`` of 64 bytes: operation u32, flags u32, status u32 (NTSTATUS)
and a union of 52 bytes at byte 12. Up to protocol 4.2, and before a version is agreed on, many
drivers send the first 48 bytes only; the rest then counts as zero. **An answer has as many bytes as
its request**, because a driver receives into a buffer of the size that it sent: FreeBSD panics at
what does not fit (hv_storvsc_on_channel_callback), UEFI drops it. What nobody asked for has the
size of the version agreed on: 48 bytes for 2.0 and 4.2, 64 from 5.1 on.

These layouts are on the data path, so they are plain ``struct``; their construct twins in
``tests/reference`` prove them. Sources: linux/drivers/scsi/storvsc_drv.c (``struct vstor_packet``,
``struct vmscsi_request``), freebsd/sys/dev/hyperv/storvsc/hv_vstorage.h; storport.h of the WDK.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmbus.errors import STATUS_SUCCESS, GuestProtocolError

PACKET_SIZE = 64
SHORT_PACKET_SIZE = 48
"""Packets of protocol 4.2 and before, and of many drivers before a version is agreed on."""
BODY_SIZE = 52
HEADER_SIZE = 12
SRB_SIZE = 52
SHORT_SRB_SIZE = 36
"""SRB of a 48-byte packet: everything before the Windows 8 extension."""

# Operations (offset 0).
COMPLETE_IO = 1
"""Every answer carries this operation, whatever the request was."""
REMOVE_DEVICE = 2
EXECUTE_SRB = 3
RESET_LUN = 4
RESET_ADAPTER = 5
RESET_BUS = 6
BEGIN_INITIALIZATION = 7
END_INITIALIZATION = 8
QUERY_PROTOCOL_VERSION = 9
QUERY_PROPERTIES = 10
ENUMERATE_BUS = 11
FCHBA_DATA = 12
CREATE_SUB_CHANNELS = 13
EVENT_NOTIFICATION = 14

OPERATION_NAMES = {
    COMPLETE_IO: "COMPLETE_IO",
    REMOVE_DEVICE: "REMOVE_DEVICE",
    EXECUTE_SRB: "EXECUTE_SRB",
    RESET_LUN: "RESET_LUN",
    RESET_ADAPTER: "RESET_ADAPTER",
    RESET_BUS: "RESET_BUS",
    BEGIN_INITIALIZATION: "BEGIN_INITIALIZATION",
    END_INITIALIZATION: "END_INITIALIZATION",
    QUERY_PROTOCOL_VERSION: "QUERY_PROTOCOL_VERSION",
    QUERY_PROPERTIES: "QUERY_PROPERTIES",
    ENUMERATE_BUS: "ENUMERATE_BUS",
    FCHBA_DATA: "FCHBA_DATA",
    CREATE_SUB_CHANNELS: "CREATE_SUB_CHANNELS",
    EVENT_NOTIFICATION: "EVENT_NOTIFICATION",
}
FLAG_REQUEST_COMPLETION = 1
"""In ``flags``: the sender wants an answer."""

# Protocol versions, major << 8 | minor.
VERSION_2_0 = 0x0200
VERSION_4_2 = 0x0402
VERSION_5_1 = 0x0501
VERSION_6_0 = 0x0600
VERSION_6_1 = 0x0601
"""Asked for by Haiku only; no description of it is public, so hosts refuse it."""
VERSION_6_2 = 0x0602
SUPPORTED_VERSIONS = frozenset({VERSION_2_0, VERSION_4_2, VERSION_5_1, VERSION_6_0, VERSION_6_2})

# data_in of an SRB.
DATA_OUT = 0
"""From the guest to the device."""
DATA_IN = 1
DATA_NONE = 2

MAX_CDB = 16
MAX_SENSE = 20
SHORT_MAX_SENSE = 18
"""Sense bytes of protocol 4.2 and before."""

# SRB status codes.
SRB_PENDING = 0x00
"""Never to be sent: FreeBSD panics."""
SRB_SUCCESS = 0x01
SRB_ABORTED = 0x02
SRB_ABORT_FAILED = 0x03
"""Never to be sent: FreeBSD panics."""
SRB_ERROR = 0x04
SRB_BUSY = 0x05
SRB_INVALID_REQUEST = 0x06
SRB_INVALID_PATH_ID = 0x07
SRB_NO_DEVICE = 0x08
SRB_DATA_OVERRUN = 0x12
SRB_INVALID_LUN = 0x20
SRB_INVALID_TARGET_ID = 0x21
SRB_STATUS_MASK = 0x3F
SRB_QUEUE_FROZEN = 0x40
"""Flag bit beside a status code."""
SRB_AUTOSENSE_VALID = 0x80
"""Flag bit beside a status code: the sense bytes of the answer are valid."""

# SRB flags (offset 40 of the SRB).
SRB_FLAG_DATA_IN = 0x00000040
SRB_FLAG_DATA_OUT = 0x00000080

PROPERTY_MULTI_CHANNEL = 1
"""In ``flags`` of the properties: sub-channels can be created."""

HEADER = struct.Struct("<III")
"""operation, flags, status."""
REQUEST = struct.Struct("<III HBBBBBBBBBx I 16s4x 2xBBIII")
"""A whole EXECUTE_SRB packet as the guest writes it; fields in the order of :class:`Srb`."""
REPLY = struct.Struct("<III HBBBBBBBBBx I 20s 2xBBIII")
"""The same as the host answers it: the CDB's place holds up to 20 bytes of sense data."""
PROPERTIES = struct.Struct("<4xH2xII8x")
"""max_channel_count, flags, max_transfer_bytes."""
PROTOCOL_VERSION = struct.Struct("<HH")
"""major << 8 | minor, revision."""
SUB_CHANNELS = struct.Struct("<H")
FIBRE_CHANNEL = struct.Struct("<B3x8s8s8s8s")
"""primary_port_active, port name, node name, second port name, second node name."""
_PACKET = struct.Struct("<III52s")

assert HEADER.size == HEADER_SIZE
assert REQUEST.size == REPLY.size == _PACKET.size == PACKET_SIZE == HEADER_SIZE + BODY_SIZE
assert SHORT_PACKET_SIZE == HEADER_SIZE + SHORT_SRB_SIZE
assert PROPERTIES.size == 24
assert FIBRE_CHANNEL.size == 36


class Packet(NamedTuple):
    """Any vstor packet, its union undecoded."""

    operation: int
    flags: int
    status: int
    """NTSTATUS; 0 in every request and in answers to SCSI commands, also failed ones."""
    body: bytes
    """52 bytes."""


class Srb(NamedTuple):
    """An EXECUTE_SRB packet of the guest; fields in the order of :data:`REQUEST`."""

    operation: int
    flags: int
    status: int
    length: int
    """Bytes of the SRB, 52 or 36. Nobody looks at it."""
    srb_status: int
    scsi_status: int
    port: int
    path: int
    target: int
    lun: int
    cdb_length: int
    """1 to 16."""
    sense_length: int
    """Bytes of sense data the guest has room for; more than 20 do not fit whatever it says."""
    data_in: int
    """:data:`DATA_OUT`, :data:`DATA_IN` or :data:`DATA_NONE`."""
    transfer_length: int
    """Bytes."""
    cdb: bytes
    """16 bytes, of which ``cdb_length`` count."""
    queue_tag: int
    queue_action: int
    srb_flags: int
    timeout: int
    """Seconds."""
    sort_key: int


class SrbReply(NamedTuple):
    """A COMPLETE_IO packet that answers an EXECUTE_SRB; fields in the order of :data:`REPLY`."""

    operation: int
    flags: int
    status: int
    length: int
    srb_status: int
    scsi_status: int
    port: int
    path: int
    target: int
    lun: int
    cdb_length: int
    sense_length: int
    """Valid bytes in ``sense``, if :data:`SRB_AUTOSENSE_VALID` is set."""
    data_in: int
    transfer_length: int
    """Bytes moved."""
    sense: bytes
    """20 bytes."""
    queue_tag: int
    queue_action: int
    srb_flags: int
    timeout: int
    sort_key: int


class Properties(NamedTuple):
    """Answer to QUERY_PROPERTIES."""

    max_channel_count: int
    """Sub-channels, the primary not counted."""
    flags: int
    max_transfer_bytes: int


class FibreChannelData(NamedTuple):
    """Answer to FCHBA_DATA."""

    primary_port_active: int
    port_name: bytes
    node_name: bytes
    second_port_name: bytes
    second_node_name: bytes


def whole_packet_untrusted(
    data: bytes, start: int = 0, end: int | None = None, *, least: int = HEADER_SIZE
) -> bytes:
    """Return the 64 bytes of the packet in ``data[start:end]``, zero-filled. Cannot block.

    Args:
        data: A private copy.
        start: Byte offset of the packet.
        end: Byte offset behind it; None means the end of ``data``.
        least: Bytes that it has to have. A request without parameters may be a header only, an
            SRB has 48 (:data:`SHORT_PACKET_SIZE`).

    Raises:
        GuestProtocolError: Too short or too long.
    """
    part = data[start:end]
    size = len(part)
    if size == PACKET_SIZE:
        return part
    if not least <= size <= PACKET_SIZE:
        raise GuestProtocolError(
            f"vstor packet of {size} bytes; {least} to {PACKET_SIZE} are possible", field="length8"
        )
    return part.ljust(PACKET_SIZE, b"\0")


def unpack_packet(whole: bytes) -> Packet:
    """Unpack the 64 bytes of a packet without looking into its union. Cannot block."""
    return Packet._make(_PACKET.unpack(whole))


def unpack_srb(whole: bytes) -> Srb:
    """Unpack the 64 bytes of an EXECUTE_SRB packet; nothing is judged. Cannot block."""
    return Srb._make(REQUEST.unpack(whole))


def check_srb_untrusted(srb: Srb) -> None:
    """Judge the values of an SRB. Cannot block.

    Raises:
        GuestProtocolError: A CDB of 0 or more than 16 bytes, an unknown direction.
    """
    if not 0 < srb.cdb_length <= MAX_CDB:
        raise GuestProtocolError(
            f"SRB: cdb_length {srb.cdb_length} is not between 1 and {MAX_CDB}", field="cdb_length"
        )
    if srb.data_in > DATA_NONE:
        raise GuestProtocolError(f"SRB: data_in {srb.data_in} is no direction", field="data_in")


def parse_packet_untrusted(data: bytes, start: int = 0, end: int | None = None) -> Packet:
    """Parse a packet, as :func:`whole_packet_untrusted` and :func:`unpack_packet` do."""
    return unpack_packet(whole_packet_untrusted(data, start, end))


def parse_srb_untrusted(data: bytes, start: int = 0, end: int | None = None) -> Srb:
    """Parse and judge an EXECUTE_SRB packet, whose operation is not looked at."""
    srb = unpack_srb(whole_packet_untrusted(data, start, end, least=SHORT_PACKET_SIZE))
    check_srb_untrusted(srb)
    return srb


def parse_srb_reply_untrusted(data: bytes, start: int = 0, end: int | None = None) -> SrbReply:
    """Parse an answer to EXECUTE_SRB; the values are not judged. Cannot block."""
    whole = whole_packet_untrusted(data, start, end, least=SHORT_PACKET_SIZE)
    return SrbReply._make(REPLY.unpack(whole))


def parse_protocol_version_untrusted(body: bytes) -> tuple[int, ...]:
    """Return ``(version, revision)`` from the union of QUERY_PROTOCOL_VERSION. Cannot block.

    Raises GuestProtocolError for fewer than 4 bytes.
    """
    return _body(PROTOCOL_VERSION, body)


def parse_properties_untrusted(body: bytes) -> Properties:
    """Return the properties from the union of an answer to QUERY_PROPERTIES. Cannot block.

    Raises GuestProtocolError for fewer than 24 bytes.
    """
    return Properties._make(_body(PROPERTIES, body))


def parse_sub_channels_untrusted(body: bytes) -> int:
    """Return the number of sub-channels from the union of CREATE_SUB_CHANNELS. Cannot block.

    Raises GuestProtocolError for fewer than 2 bytes.
    """
    (count,) = _body(SUB_CHANNELS, body)
    return count


def parse_fibre_channel_untrusted(body: bytes) -> FibreChannelData:
    """Return the port names from the union of an answer to FCHBA_DATA. Cannot block.

    Raises GuestProtocolError for fewer than 36 bytes.
    """
    return FibreChannelData._make(_body(FIBRE_CHANNEL, body))


def _body(layout: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise GuestProtocolError(
            f"vstor union of {len(body)} bytes, needs {layout.size}", field="size"
        )
    return layout.unpack_from(body)


def build_packet(
    operation: int,
    body: bytes = b"",
    *,
    flags: int = FLAG_REQUEST_COMPLETION,
    status: int = STATUS_SUCCESS,
    size: int = PACKET_SIZE,
) -> bytes:
    """Return a packet of ``size`` bytes (48 to 64), ``body`` zero-filled. Cannot block.

    Raises:
        ValueError: ``body`` or ``size`` is too long, or ``size`` too short.
    """
    if not SHORT_PACKET_SIZE <= size <= PACKET_SIZE or HEADER_SIZE + len(body) > size:
        raise ValueError(f"{len(body)} bytes do not fit into a vstor packet of {size} bytes")
    return HEADER.pack(operation, flags, status) + body + bytes(size - HEADER_SIZE - len(body))


def build_completion(
    body: bytes = b"", *, status: int = STATUS_SUCCESS, size: int = PACKET_SIZE
) -> bytes:
    """Return a host's answer to anything but EXECUTE_SRB. Cannot block.

    Args:
        body: The union, zero-filled or cut off; a header-only request gets a header only.
        status: NTSTATUS.
        size: Bytes: those of the request, 12 to 64.
    """
    return (HEADER.pack(COMPLETE_IO, 0, status) + body).ljust(size, b"\0")[:size]


def build_properties(
    *, max_channel_count: int, max_transfer_bytes: int, multi_channel: bool
) -> bytes:
    """Return the 24 bytes of union that answer QUERY_PROPERTIES. Cannot block."""
    flags = PROPERTY_MULTI_CHANNEL if multi_channel else 0
    return PROPERTIES.pack(max_channel_count, flags, max_transfer_bytes)


def build_protocol_version(version: int, revision: int = 0) -> bytes:
    """Return the union of QUERY_PROTOCOL_VERSION, and of its answer. Cannot block."""
    return PROTOCOL_VERSION.pack(version, revision)


def build_sub_channels(count: int) -> bytes:
    """Return the union of CREATE_SUB_CHANNELS. Cannot block."""
    return SUB_CHANNELS.pack(count)


def build_fibre_channel(data: FibreChannelData) -> bytes:
    """Return the union that answers FCHBA_DATA. Cannot block."""
    return FIBRE_CHANNEL.pack(*data)


def build_srb(
    cdb: bytes,
    *,
    data_in: int,
    transfer_length: int,
    path: int = 0,
    target: int = 0,
    lun: int = 0,
    sense_length: int = MAX_SENSE,
    queue_tag: int = 0,
    queue_action: int = 0,
    srb_flags: int = 0,
    timeout: int = 60,
    size: int = PACKET_SIZE,
) -> bytes:
    """Return an EXECUTE_SRB packet of ``size`` bytes: 64, or 48 without the extension.

    Args:
        cdb: 1 to 16 bytes.
        data_in: :data:`DATA_OUT`, :data:`DATA_IN` or :data:`DATA_NONE`.
        transfer_length: Bytes.
        path: Called a channel by Linux.
        target: SCSI target.
        lun: Logical unit.
        sense_length: Room for sense data, in bytes.
        queue_tag: Tag of the request, if it has one.
        queue_action: Kind of tag.
        srb_flags: ``SRB_FLAG_*``.
        timeout: Seconds.
        size: Bytes of packet.

    Raises:
        ValueError: The CDB or ``size`` is out of range.
    """
    if not 0 < len(cdb) <= MAX_CDB:
        raise ValueError(f"a CDB has 1 to 16 bytes, not {len(cdb)}")
    if size not in (PACKET_SIZE, SHORT_PACKET_SIZE):
        raise ValueError(f"an EXECUTE_SRB packet has 48 or 64 bytes, not {size}")
    packet = REQUEST.pack(
        EXECUTE_SRB,
        FLAG_REQUEST_COMPLETION,
        STATUS_SUCCESS,
        size - HEADER_SIZE,
        0,
        0,
        0,
        path,
        target,
        lun,
        len(cdb),
        sense_length,
        data_in,
        transfer_length,
        cdb,
        queue_tag,
        queue_action,
        srb_flags,
        timeout,
        0,
    )
    return packet[:size]


def build_srb_reply(
    srb: Srb,
    *,
    srb_status: int,
    scsi_status: int = 0,
    transfer_length: int = 0,
    sense: bytes = b"",
    status: int = STATUS_SUCCESS,
    size: int = PACKET_SIZE,
) -> bytes:
    """Return the bytes that answer ``srb``. Cannot block.

    Addresses and tags are echoed; ``sense`` stands where the CDB was.

    Args:
        srb: The request.
        srb_status: ``SRB_*``, with :data:`SRB_AUTOSENSE_VALID` if there is sense data.
        scsi_status: SCSI status byte.
        transfer_length: Bytes moved; never more than were asked for.
        sense: Cut to what the guest has room for.
        status: NTSTATUS; 0 also where the command failed, as long as it could be executed.
        size: Bytes: those of the request, 48 to 64.
    """
    sense = sense[: min(srb.sense_length, MAX_SENSE)]
    return REPLY.pack(
        COMPLETE_IO,
        0,
        status,
        srb.length,
        srb_status,
        scsi_status,
        srb.port,
        srb.path,
        srb.target,
        srb.lun,
        srb.cdb_length,
        len(sense),
        srb.data_in,
        transfer_length,
        sense,
        srb.queue_tag,
        srb.queue_action,
        srb.srb_flags,
        srb.timeout,
        srb.sort_key,
    )[:size]
