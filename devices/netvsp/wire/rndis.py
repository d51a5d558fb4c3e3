"""RNDIS: frames and control requests, within SEND_RNDIS_PACKET of NVSP.

A message is its type, u32, its length in bytes, u32, that counts from the type, and a body. Offsets
in a body count from byte 8 of the message, which is the request id of every control message but
RESET. A control request has two answers: the completion of its packet, and the reply, which the
host sends in the receive buffer like a frame, with the request's id.

Sources: linux/include/linux/rndis.h and drivers/net/hyperv/hyperv_net.h (``struct rndis_*``);
freebsd/sys/net/rndis.h; [MS-RNDIS].
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

HEADER_SIZE = 8
"""Bytes of type and length; where offsets count from."""

# Message types.
PACKET = 0x00000001
INITIALIZE = 0x00000002
HALT = 0x00000003
QUERY = 0x00000004
SET = 0x00000005
RESET = 0x00000006
INDICATE_STATUS = 0x00000007
KEEPALIVE = 0x00000008
COMPLETE = 0x80000000
"""Set in the type of a reply."""

MESSAGE_NAMES = {
    PACKET: "PACKET",
    INITIALIZE: "INITIALIZE",
    HALT: "HALT",
    QUERY: "QUERY",
    SET: "SET",
    RESET: "RESET",
    INDICATE_STATUS: "INDICATE_STATUS",
    KEEPALIVE: "KEEPALIVE",
    INITIALIZE | COMPLETE: "INITIALIZE_CMPLT",
    QUERY | COMPLETE: "QUERY_CMPLT",
    SET | COMPLETE: "SET_CMPLT",
    RESET | COMPLETE: "RESET_CMPLT",
    KEEPALIVE | COMPLETE: "KEEPALIVE_CMPLT",
}

# Status of a reply, and of an indication.
STATUS_SUCCESS = 0x00000000
STATUS_FAILURE = 0xC0000001
STATUS_INVALID_DATA = 0xC0010015
STATUS_NOT_SUPPORTED = 0xC00000BB
STATUS_INVALID_LENGTH = 0xC0010014
STATUS_BUFFER_TOO_SHORT = 0xC0010016
STATUS_INVALID_OID = 0xC0010017
STATUS_BAD_VERSION = 0xC0010004
STATUS_MEDIA_CONNECT = 0x4001000B
STATUS_MEDIA_DISCONNECT = 0x4001000C
STATUS_LINK_SPEED_CHANGE = 0x40010013
STATUS_NETWORK_CHANGE = 0x40010018
STATUS_TASK_OFFLOAD_CURRENT_CONFIG = 0x40020006

MAJOR_VERSION = 1
MINOR_VERSION = 0
CONNECTIONLESS = 1
"""Device flags of INITIALIZE_CMPLT."""
MEDIUM_802_3 = 0

HEADER = struct.Struct("<II")
"""type, length."""
PACKET_HEADER = struct.Struct("<11I")
"""type, length, data_offset, data_length, oob_offset, oob_length, oob_count, info_offset,
info_length, vc_handle, reserved."""
PACKET_HEADER_SIZE = 44
_INITIALIZE = struct.Struct("<IIIIII")
_INITIALIZE_REPLY = struct.Struct("<13I")
_ID = struct.Struct("<III")
_REQUEST = struct.Struct("<IIIIIII")
"""type, length, id, oid, buffer length, buffer offset, VC handle: QUERY and SET."""
_QUERY_REPLY = struct.Struct("<IIIIII")
_STATUS_REPLY = struct.Struct("<IIII")
_INDICATE = struct.Struct("<IIIII")

REQUEST_SIZE = 28
"""Bytes of QUERY and SET before their buffer."""

assert PACKET_HEADER.size == PACKET_HEADER_SIZE
assert _INITIALIZE_REPLY.size == 52
assert _REQUEST.size == REQUEST_SIZE


class Initialize(NamedTuple):
    """INITIALIZE."""

    request_id: int
    major: int
    minor: int
    max_transfer: int
    """Bytes of a message from the device that the driver has room for."""


class InitializeReply(NamedTuple):
    """INITIALIZE_CMPLT."""

    request_id: int
    status: int
    major: int
    minor: int
    device_flags: int
    medium: int
    max_packets: int
    """Frames that the driver may put into one message."""
    max_transfer: int
    """Bytes of such a message."""
    alignment: int
    """Each of them begins at a multiple of this power of two."""


class Request(NamedTuple):
    """QUERY or SET."""

    request_id: int
    oid: int
    buffer: bytes


class QueryReply(NamedTuple):
    """QUERY_CMPLT."""

    request_id: int
    status: int
    buffer: bytes


class Indication(NamedTuple):
    """INDICATE_STATUS."""

    status: int
    buffer: bytes


class Frame(NamedTuple):
    """PACKET: where a frame is in its message, and where its per-packet information is."""

    length: int
    """Bytes of the message; the next one begins behind it."""
    data_offset: int
    """From the start of the message."""
    data_length: int
    info_offset: int
    """From the start of the message; 0 if there is none."""
    info_length: int


def parse_header_untrusted(message: bytes) -> tuple[int, int]:
    """Return type and length of a message. Cannot block.

    Raises GuestProtocolError if the length is less than 8, or more than there is.
    """
    if len(message) < HEADER_SIZE:
        raise GuestProtocolError(f"RNDIS message of {len(message)} bytes", field="msg_len")
    kind, length = HEADER.unpack_from(message)
    if not HEADER_SIZE <= length <= len(message):
        raise GuestProtocolError(
            f"RNDIS: msg_len {length} is not between 8 and {len(message)}", field="msg_len"
        )
    return kind, length


def parse_request_id_untrusted(message: bytes) -> int:
    """Return the id of a control message. Raises GuestProtocolError for fewer than 12 bytes."""
    return _unpack(_ID, message, "control message")[2]


def parse_initialize_untrusted(message: bytes) -> Initialize:
    """Return what INITIALIZE says. Raises GuestProtocolError if it is too short."""
    return Initialize._make(_unpack(_INITIALIZE, message, "INITIALIZE")[2:])


def parse_request_untrusted(message: bytes) -> Request:
    """Return what QUERY or SET says. Cannot block.

    Raises:
        GuestProtocolError: Too short, or its buffer is not in it.
    """
    _kind, _length, number, oid, length, offset, _vc = _unpack(_REQUEST, message, "request")
    return Request(number, oid, _buffer(message, offset, length, REQUEST_SIZE, "request"))


def parse_initialize_reply_untrusted(message: bytes) -> InitializeReply:
    """Return what INITIALIZE_CMPLT says. Raises GuestProtocolError if it is too short."""
    return InitializeReply._make(_unpack(_INITIALIZE_REPLY, message, "INITIALIZE_CMPLT")[2:11])


def parse_query_reply_untrusted(message: bytes) -> QueryReply:
    """Return what QUERY_CMPLT says. Cannot block.

    Raises:
        GuestProtocolError: Too short, or its buffer is not in it.
    """
    fields = _unpack(_QUERY_REPLY, message, "QUERY_CMPLT")
    _kind, _length, number, status, length, offset = fields
    return QueryReply(
        number, status, _buffer(message, offset, length, _QUERY_REPLY.size, "QUERY_CMPLT")
    )


def parse_status_reply_untrusted(message: bytes) -> tuple[int, int]:
    """Return id and status of SET_CMPLT or KEEPALIVE_CMPLT.

    Those of RESET_CMPLT, which has no id, are its status and whether the filter has to be set
    again. Raises GuestProtocolError if it is too short.
    """
    first, second = _unpack(_STATUS_REPLY, message, "reply")[2:]
    return first, second


def parse_indication_untrusted(message: bytes) -> Indication:
    """Return what INDICATE_STATUS says. Cannot block.

    Raises:
        GuestProtocolError: Too short, or its buffer is not in it.
    """
    _kind, _length, status, length, offset = _unpack(_INDICATE, message, "INDICATE_STATUS")
    return Indication(status, _buffer(message, offset, length, _INDICATE.size, "INDICATE_STATUS"))


def parse_frame_untrusted(message: bytes) -> Frame:
    """Return where things are in a PACKET message. Cannot block.

    Args:
        message: From its type on; it may be followed by other messages, and be there in part as
            long as its header is: what lies beyond is checked against its own length only.

    Raises:
        GuestProtocolError: Frame or information are not within its length.
    """
    if len(message) < PACKET_HEADER_SIZE:
        raise GuestProtocolError(f"RNDIS PACKET of {len(message)} bytes", field="msg_len")
    _kind, length, data, size, _oob, _oob_size, _count, info, info_size, _vc, _ = (
        PACKET_HEADER.unpack_from(message)
    )
    data += HEADER_SIZE
    if length < PACKET_HEADER_SIZE or data < PACKET_HEADER_SIZE or data + size > length:
        raise GuestProtocolError(
            f"RNDIS PACKET of {length} bytes: a frame of {size} bytes at byte {data}",
            field="data_offset",
        )
    if not info_size:
        return Frame(length, data, size, 0, 0)
    info += HEADER_SIZE
    if info < PACKET_HEADER_SIZE or info + info_size > length:
        raise GuestProtocolError(
            f"RNDIS PACKET of {length} bytes: {info_size} bytes of information at byte {info}",
            field="per_pkt_info_offset",
        )
    return Frame(length, data, size, info, info_size)


def _unpack(layout: struct.Struct, message: bytes, name: str) -> tuple[int, ...]:
    if len(message) < layout.size:
        raise GuestProtocolError(
            f"RNDIS {name} of {len(message)} bytes, needs {layout.size}", field="msg_len"
        )
    return layout.unpack_from(message)


def _buffer(message: bytes, offset: int, length: int, least: int, name: str) -> bytes:
    if not length:
        return b""
    start = offset + HEADER_SIZE
    if start < least or start + length > len(message):
        raise GuestProtocolError(
            f"RNDIS {name} of {len(message)} bytes: a buffer of {length} bytes at byte {start}",
            field="info_buf_offset",
        )
    return message[start : start + length]


def build_initialize(request_id: int, max_transfer: int) -> bytes:
    """Return INITIALIZE. Cannot block."""
    return _INITIALIZE.pack(
        INITIALIZE, _INITIALIZE.size, request_id, MAJOR_VERSION, MINOR_VERSION, max_transfer
    )


def build_initialize_reply(
    request_id: int, status: int, *, max_packets: int, max_transfer: int, alignment: int
) -> bytes:
    """Return the 52 bytes of INITIALIZE_CMPLT; see :class:`InitializeReply`. Cannot block."""
    return _INITIALIZE_REPLY.pack(
        INITIALIZE | COMPLETE,
        _INITIALIZE_REPLY.size,
        request_id,
        status,
        MAJOR_VERSION,
        MINOR_VERSION,
        CONNECTIONLESS,
        MEDIUM_802_3,
        max_packets,
        max_transfer,
        alignment,
        0,  # a list of address families, which an Ethernet has none of
        0,
    )


def build_id_message(kind: int, request_id: int) -> bytes:
    """Return HALT, RESET or KEEPALIVE. Cannot block."""
    return _ID.pack(kind, _ID.size, request_id)


def build_request(kind: int, request_id: int, oid: int, buffer: bytes = b"") -> bytes:
    """Return QUERY or SET. Cannot block."""
    length = REQUEST_SIZE + len(buffer)
    offset = REQUEST_SIZE - HEADER_SIZE
    return _REQUEST.pack(kind, length, request_id, oid, len(buffer), offset, 0) + buffer


def build_query_reply(request_id: int, status: int, buffer: bytes = b"") -> bytes:
    """Return QUERY_CMPLT. Cannot block.

    The offset of an empty buffer is that of the place where it would be: Linux refuses less than
    16 whatever the length (rndis_filter_query_device).
    """
    size = _QUERY_REPLY.size
    return (
        _QUERY_REPLY.pack(
            QUERY | COMPLETE, size + len(buffer), request_id, status, len(buffer), size - 8
        )
        + buffer
    )


def build_status_reply(kind: int, request_id: int, status: int) -> bytes:
    """Return SET_CMPLT or KEEPALIVE_CMPLT. Cannot block."""
    return _STATUS_REPLY.pack(kind | COMPLETE, _STATUS_REPLY.size, request_id, status)


def build_reset_reply(status: int, *, addressing_reset: bool) -> bytes:
    """Return RESET_CMPLT, which has no id. Cannot block."""
    return _STATUS_REPLY.pack(RESET | COMPLETE, _STATUS_REPLY.size, status, addressing_reset)


def build_indication(status: int, buffer: bytes = b"") -> bytes:
    """Return INDICATE_STATUS. Cannot block."""
    size = _INDICATE.size
    return (
        _INDICATE.pack(INDICATE_STATUS, size + len(buffer), status, len(buffer), size - 8) + buffer
    )


def build_packet_header(frame_length: int, information: bytes = b"") -> bytes:
    """Return what stands before a frame: the header of PACKET, and per-packet information.

    Cannot block.

    Args:
        frame_length: Bytes of the frame.
        information: As :mod:`netvsp.wire.ppi` builds it.
    """
    size = len(information)
    offset = PACKET_HEADER_SIZE + size - HEADER_SIZE
    return (
        PACKET_HEADER.pack(
            PACKET,
            PACKET_HEADER_SIZE + size + frame_length,
            offset,
            frame_length,
            0,
            0,
            0,
            PACKET_HEADER_SIZE - HEADER_SIZE if size else 0,
            size,
            0,
            0,
        )
        + information
    )


_PARAMETER = struct.Struct("<IIIII")
PARAMETER_STRING = 2
"""Type of a parameter whose value is text."""


def build_parameter(name: str, value: str) -> bytes:
    """Return the buffer of SET GEN_RNDIS_CONFIG_PARAMETER: a name and a text. Cannot block."""
    first, second = name.encode("utf-16-le"), value.encode("utf-16-le")
    size = _PARAMETER.size
    return (
        _PARAMETER.pack(size, len(first), PARAMETER_STRING, size + len(first), len(second))
        + first
        + second
    )


def parse_parameter_untrusted(buffer: bytes) -> tuple[str, str]:
    """Return name and value of a parameter; a value that is no text is empty. Cannot block.

    Raises:
        GuestProtocolError: Name or value are not in the buffer, too long, or no text.
    """
    fields = _unpack(_PARAMETER, buffer, "configuration parameter")
    name_offset, name_size, kind, value_offset, value_size = fields
    texts = []
    for offset, size in ((name_offset, name_size), (value_offset, value_size)):
        if offset + size > len(buffer) or size > _LONGEST_TEXT:
            raise GuestProtocolError(
                f"RNDIS parameter: {size} bytes at byte {offset} of {len(buffer)}",
                field="parameter_value_length",
            )
        try:
            texts.append(buffer[offset : offset + size].decode("utf-16-le"))
        except UnicodeDecodeError:
            raise GuestProtocolError(
                "RNDIS parameter: not UTF-16", field="parameter_name_offset"
            ) from None
        if kind != PARAMETER_STRING:
            texts.append("")
            break
    return texts[0], texts[1]


_LONGEST_TEXT = 512
