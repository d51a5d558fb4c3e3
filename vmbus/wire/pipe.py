"""Pipe framing: the 8 bytes in front of each message of a channel in named pipe mode.

Ring packets are padded to 8 bytes, and the receiver cannot see how much is padding; a pipe message
says how long it is. Offers with flag NAMED_PIPE_MODE use it (hv_sock, integration components of
UEFI). Sources: linux/net/vmw_vsock/hyperv_transport.c (``struct vmpipe_proto_header``), mu_msvm's
VmbusPipe, the VMPIPE_PROTOCOL_HEADER of Microsoft's published headers.
"""

from __future__ import annotations

import struct

from vmbus.errors import GuestProtocolError

PIPE_HEADER = struct.Struct("<II")
"""type, size: bytes that follow the header."""
PIPE_HEADER_SIZE = 8
assert PIPE_HEADER.size == PIPE_HEADER_SIZE

PIPE_DATA = 1
PIPE_PARTIAL = 2
"""What a reader makes of a data packet that it has read in part, in its own ring; never sent."""
PIPE_SETUP_GPA_DIRECT = 3
PIPE_TEARDOWN_GPA_DIRECT = 4
PIPE_INDICATION_COMPLETE = 5
MAX_PIPE_MESSAGE = 16384
"""Bytes of one message that a peer has room for (HVS_MTU_SIZE)."""


def build_pipe_message(data: bytes, *, kind: int = PIPE_DATA) -> bytes:
    """Return the payload of a ring packet that carries ``data``. Cannot block.

    Raises:
        ValueError: Too long.
    """
    if len(data) > MAX_PIPE_MESSAGE:
        raise ValueError(f"a pipe message has at most {MAX_PIPE_MESSAGE} bytes, not {len(data)}")
    return PIPE_HEADER.pack(kind, len(data)) + data


def parse_pipe_message_untrusted(payload: bytes) -> bytes:
    """Return the message in the payload of a ring packet. Cannot block.

    Args:
        payload: A private copy, padding included.

    Returns:
        The data; empty at the end of a stream, as hv_sock says it (``hvs_shutdown_lock_held``).

    Raises:
        GuestProtocolError: No whole header, another type than data, or longer than what is there.
    """
    if len(payload) < PIPE_HEADER_SIZE:
        raise GuestProtocolError(f"pipe message of {len(payload)} bytes", field="length8")
    kind, size = PIPE_HEADER.unpack_from(payload)
    if kind != PIPE_DATA:
        raise GuestProtocolError(f"pipe message of type {kind}, not data", field="pkt_type")
    if size > min(len(payload) - PIPE_HEADER_SIZE, MAX_PIPE_MESSAGE):
        raise GuestProtocolError(
            f"pipe message: data_size {size} where {len(payload) - PIPE_HEADER_SIZE} bytes are",
            field="data_size",
        )
    return payload[PIPE_HEADER_SIZE : PIPE_HEADER_SIZE + size]
