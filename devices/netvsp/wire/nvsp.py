"""NVSP: what a network driver and the device say to each other in the packets of a channel.

A message is its type, u32, and a union behind it. Drivers send it whole: 28 bytes macOS, 32 UEFI
and the BSDs, 40 Linux and DPDK. How long an answer may be depends on who reads it. Linux drops one
with less than 28 bytes, because its checks fall through (netvsc_send_completion); UEFI has room for
as much as it has sent, 32 bytes, and gives the device up if there is more
(EmclSynchronousPacketCompletion); DPDK wants 40 bytes of the answer to SUBCHANNEL, which UEFI never
asks for (hn_nvs_execute). So answers of the handshake have 32 bytes, that one 40, zero-filled.

Sources: linux/drivers/net/hyperv/hyperv_net.h (``nvsp_*``) and netvsc.c;
freebsd/sys/dev/hyperv/netvsc/if_hnreg.h; openbsd/sys/dev/pv/if_hvnreg.h; dpdk/drivers/net/netvsc/
hn_nvs.h; mu_msvm/MsvmPkg/NetvscDxe/nvspprotocol.h.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

MESSAGE_SIZE = 40
"""Bytes of the longest message: of those that a driver of version 6 sends."""
ANSWER_SIZE = 32
"""Bytes of an answer in the handshake; that to SUBCHANNEL has :data:`MESSAGE_SIZE`."""

# Versions.
VERSION_1 = 0x00002
VERSION_2 = 0x30002
VERSION_4 = 0x40000
VERSION_5 = 0x50000
VERSION_6 = 0x60000
VERSION_6_1 = 0x60001
VERSIONS = (VERSION_1, VERSION_2, VERSION_4, VERSION_5, VERSION_6, VERSION_6_1)
VERSION_NAMES = {
    VERSION_1: "1",
    VERSION_2: "2",
    VERSION_4: "4",
    VERSION_5: "5",
    VERSION_6: "6",
    VERSION_6_1: "6.1",
}

# Message types.
INIT = 1
INIT_COMPLETE = 2
SEND_NDIS_VERSION = 100
SEND_RECEIVE_BUFFER = 101
SEND_RECEIVE_BUFFER_COMPLETE = 102
REVOKE_RECEIVE_BUFFER = 103
SEND_SEND_BUFFER = 104
SEND_SEND_BUFFER_COMPLETE = 105
REVOKE_SEND_BUFFER = 106
SEND_RNDIS_PACKET = 107
SEND_RNDIS_PACKET_COMPLETE = 108
SEND_NDIS_CONFIG = 125
SEND_VF_ASSOCIATION = 128
SWITCH_DATA_PATH = 129
OID_QUERY_EX = 131
OID_QUERY_EX_COMPLETE = 132
SUBCHANNEL = 133
SEND_INDIRECTION_TABLE = 134
PD_API = 135
"""PacketDirect, which only Windows asks for."""

MESSAGE_NAMES = {
    INIT: "INIT",
    INIT_COMPLETE: "INIT_COMPLETE",
    SEND_NDIS_VERSION: "SEND_NDIS_VERSION",
    SEND_RECEIVE_BUFFER: "SEND_RECEIVE_BUFFER",
    SEND_RECEIVE_BUFFER_COMPLETE: "SEND_RECEIVE_BUFFER_COMPLETE",
    REVOKE_RECEIVE_BUFFER: "REVOKE_RECEIVE_BUFFER",
    SEND_SEND_BUFFER: "SEND_SEND_BUFFER",
    SEND_SEND_BUFFER_COMPLETE: "SEND_SEND_BUFFER_COMPLETE",
    REVOKE_SEND_BUFFER: "REVOKE_SEND_BUFFER",
    SEND_RNDIS_PACKET: "SEND_RNDIS_PACKET",
    SEND_RNDIS_PACKET_COMPLETE: "SEND_RNDIS_PACKET_COMPLETE",
    SEND_NDIS_CONFIG: "SEND_NDIS_CONFIG",
    SEND_VF_ASSOCIATION: "SEND_VF_ASSOCIATION",
    SWITCH_DATA_PATH: "SWITCH_DATA_PATH",
    OID_QUERY_EX: "OID_QUERY_EX",
    OID_QUERY_EX_COMPLETE: "OID_QUERY_EX_COMPLETE",
    SUBCHANNEL: "SUBCHANNEL",
    SEND_INDIRECTION_TABLE: "SEND_INDIRECTION_TABLE",
    PD_API: "PD_API",
}

# Status of an answer.
SUCCESS = 1
FAILURE = 2
PROTOCOL_TOO_NEW = 3
PROTOCOL_TOO_OLD = 4
INVALID_RNDIS_PACKET = 5
BUSY = 6
PROTOCOL_UNSUPPORTED = 7

# SEND_RNDIS_PACKET.
CHANNEL_DATA = 0
"""Frames."""
CHANNEL_CONTROL = 1
"""All other RNDIS messages."""
NO_SECTION = 0xFFFFFFFF
"""The message is not in the send buffer."""

RECEIVE_BUFFER_ID = 0xCAFE
"""What most drivers call their receive buffer, and want to read in every packet that uses it.

OpenBSD and NetBSD call it 0x2409, UEFI 0x1981: it is the driver that gives the number.
"""

# Capabilities of a guest, SEND_NDIS_CONFIG.
CAPABILITY_VMQ = 1 << 0
CAPABILITY_CHIMNEY = 1 << 1
CAPABILITY_SRIOV = 1 << 2
CAPABILITY_8021Q = 1 << 3
CAPABILITY_CORRELATION_ID = 1 << 4
CAPABILITY_TEAMING = 1 << 5
"""Linux sets it to be told of changes of the link's speed."""
CAPABILITY_VSUBNET_ID = 1 << 6
CAPABILITY_RSC = 1 << 7
"""It takes a segment that is longer than the MTU in several sub-allocations."""

# SWITCH_DATA_PATH.
DATA_PATH_SYNTHETIC = 0
DATA_PATH_VF = 1

SUBCHANNEL_ALLOCATE = 1
SEND_TABLE_ENTRIES = 16

_TYPE = struct.Struct("<I")
_INIT = struct.Struct("<4xII")
_INIT_COMPLETE = struct.Struct("<IIII")
_NDIS_VERSION = struct.Struct("<4xII")
_NDIS_CONFIG = struct.Struct("<4xI4xQ")
_BUFFER = struct.Struct("<4xIH")
_REVOKE = struct.Struct("<4xH")
_RECEIVE_BUFFER_COMPLETE = struct.Struct("<IIIIIII")
_SEND_BUFFER_COMPLETE = struct.Struct("<III")
RNDIS_PACKET = struct.Struct("<IIII")
"""type, channel_type, section_index, section_size."""
RNDIS_PACKET_COMPLETE = struct.Struct("<II")
"""type, status."""
_DATA_PATH = struct.Struct("<4xI")
_SUBCHANNEL = struct.Struct("<4xII")
_SUBCHANNEL_COMPLETE = struct.Struct("<III")
_SEND_TABLE = struct.Struct("<III")
_SEND_TABLE_OFFSET = MESSAGE_SIZE
"""Where the table begins, counted from the message. With version 6 and before, Linux takes it from
byte 40 if the packet is long enough, whatever the message says (netvsc_send_table)."""


class NdisConfig(NamedTuple):
    """SEND_NDIS_CONFIG."""

    mtu: int
    """Bytes of the longest frame, with its Ethernet header and without a VLAN tag."""
    capabilities: int


class ReceiveSection(NamedTuple):
    """Answer to SEND_RECEIVE_BUFFER."""

    status: int
    sections: int
    """Always 1: no driver takes another number."""
    offset: int
    sub_alloc_size: int
    """Bytes of one sub-allocation."""
    sub_alloc_count: int
    end_offset: int


class RndisPacket(NamedTuple):
    """SEND_RNDIS_PACKET."""

    channel_type: int
    section_index: int
    """Which section of the send buffer the RNDIS message begins in, or :data:`NO_SECTION`."""
    section_size: int
    """Bytes of the message that are there."""


def parse_type_untrusted(payload: bytes) -> int:
    """Return the type of a message. Raises GuestProtocolError for fewer than 4 bytes."""
    (kind,) = _unpack(_TYPE, payload, "message")
    return kind


def parse_init_untrusted(payload: bytes) -> tuple[int, int]:
    """Return least and greatest version of INIT. Raises GuestProtocolError if it is too short."""
    least, greatest = _unpack(_INIT, payload, "INIT")
    return least, greatest


def parse_init_complete_untrusted(payload: bytes) -> tuple[int, int]:
    """Return version and status of INIT_COMPLETE. Raises GuestProtocolError if it is too short."""
    _kind, version, _chain, status = _unpack(_INIT_COMPLETE, payload, "INIT_COMPLETE")
    return version, status


def parse_ndis_version_untrusted(payload: bytes) -> tuple[int, int]:
    """Return major and minor NDIS version. Raises GuestProtocolError if it is too short."""
    major, minor = _unpack(_NDIS_VERSION, payload, "SEND_NDIS_VERSION")
    return major, minor


def parse_ndis_config_untrusted(payload: bytes) -> NdisConfig:
    """Return what SEND_NDIS_CONFIG says. Raises GuestProtocolError if it is too short."""
    return NdisConfig._make(_unpack(_NDIS_CONFIG, payload, "SEND_NDIS_CONFIG"))


def parse_buffer_untrusted(payload: bytes) -> tuple[int, int]:
    """Return GPADL handle and id of SEND_RECEIVE_BUFFER or SEND_SEND_BUFFER.

    Raises GuestProtocolError if it is too short.
    """
    handle, number = _unpack(_BUFFER, payload, "SEND_(RECEIVE|SEND)_BUFFER")
    return handle, number


def parse_revoke_untrusted(payload: bytes) -> int:
    """Return the id of REVOKE_RECEIVE_BUFFER or REVOKE_SEND_BUFFER.

    Raises GuestProtocolError if it is too short.
    """
    (number,) = _unpack(_REVOKE, payload, "REVOKE_(RECEIVE|SEND)_BUFFER")
    return number


def parse_receive_buffer_complete_untrusted(payload: bytes) -> ReceiveSection:
    """Return the answer to SEND_RECEIVE_BUFFER. Raises GuestProtocolError if it is too short."""
    fields = _unpack(_RECEIVE_BUFFER_COMPLETE, payload, "SEND_RECEIVE_BUFFER_COMPLETE")
    return ReceiveSection._make(fields[1:])


def parse_send_buffer_complete_untrusted(payload: bytes) -> tuple[int, int]:
    """Return status and section size in bytes. Raises GuestProtocolError if it is too short."""
    _kind, status, size = _unpack(_SEND_BUFFER_COMPLETE, payload, "SEND_SEND_BUFFER_COMPLETE")
    return status, size


def parse_rndis_packet_untrusted(payload: bytes) -> RndisPacket:
    """Return what SEND_RNDIS_PACKET says. Raises GuestProtocolError if it is too short."""
    return RndisPacket._make(_unpack(RNDIS_PACKET, payload, "SEND_RNDIS_PACKET")[1:])


def parse_rndis_packet_complete_untrusted(payload: bytes) -> int:
    """Return the status of a completed RNDIS packet. Raises GuestProtocolError if too short."""
    _kind, status = _unpack(RNDIS_PACKET_COMPLETE, payload, "SEND_RNDIS_PACKET_COMPLETE")
    return status


def parse_data_path_untrusted(payload: bytes) -> int:
    """Return the path of SWITCH_DATA_PATH. Raises GuestProtocolError if it is too short."""
    (path,) = _unpack(_DATA_PATH, payload, "SWITCH_DATA_PATH")
    return path


def parse_subchannel_untrusted(payload: bytes) -> tuple[int, int]:
    """Return operation and number of SUBCHANNEL. Raises GuestProtocolError if it is too short."""
    operation, count = _unpack(_SUBCHANNEL, payload, "SUBCHANNEL")
    return operation, count


def parse_subchannel_complete_untrusted(payload: bytes) -> tuple[int, int]:
    """Return status and number granted. Raises GuestProtocolError if it is too short."""
    _kind, status, count = _unpack(_SUBCHANNEL_COMPLETE, payload, "SUBCHANNEL")
    return status, count


def parse_send_table_untrusted(payload: bytes) -> tuple[int, ...]:
    """Return the channels of SEND_INDIRECTION_TABLE, the first one being 0.

    Raises GuestProtocolError if it is too short, or does not have 16 entries.
    """
    _kind, count, offset = _unpack(_SEND_TABLE, payload, "SEND_INDIRECTION_TABLE")
    if count != SEND_TABLE_ENTRIES or offset + 4 * count > len(payload):
        raise GuestProtocolError(
            f"SEND_INDIRECTION_TABLE: {count} entries at byte {offset} of {len(payload)}",
            field="offset",
        )
    return struct.unpack_from(f"<{count}I", payload, offset)


def _unpack(layout: struct.Struct, payload: bytes, name: str) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise GuestProtocolError(
            f"NVSP {name} of {len(payload)} bytes, needs {layout.size}", field="length8"
        )
    return layout.unpack_from(payload)


def build_init(least: int, greatest: int) -> bytes:
    """Return INIT. Cannot block."""
    return _message(INIT, least, greatest)


def build_init_complete(version: int, status: int) -> bytes:
    """Return the answer to INIT. Cannot block.

    Args:
        version: Agreed on, or asked for and refused.
        status: :data:`SUCCESS`, or why not.
    """
    # Most of a chain of MDLs that a guest may send; nobody looks at it.
    return _message(INIT_COMPLETE, version, 34, status, size=ANSWER_SIZE)


def build_ndis_version(major: int, minor: int) -> bytes:
    """Return SEND_NDIS_VERSION. Cannot block."""
    return _message(SEND_NDIS_VERSION, major, minor)


def build_ndis_config(mtu: int, capabilities: int) -> bytes:
    """Return SEND_NDIS_CONFIG; ``mtu`` counts the Ethernet header, too. Cannot block."""
    return _message(SEND_NDIS_CONFIG, mtu, 0, capabilities & 0xFFFFFFFF, capabilities >> 32)


def build_buffer(kind: int, handle: int, number: int) -> bytes:
    """Return SEND_RECEIVE_BUFFER or SEND_SEND_BUFFER. Cannot block."""
    return _message(kind, handle, number)


def build_revoke(kind: int, number: int) -> bytes:
    """Return REVOKE_RECEIVE_BUFFER or REVOKE_SEND_BUFFER. Cannot block."""
    return _message(kind, number)


def build_receive_buffer_complete(status: int, size: int = 0, count: int = 0) -> bytes:
    """Return the answer to SEND_RECEIVE_BUFFER. Cannot block.

    Args:
        status: :data:`SUCCESS`, or why not.
        size: Bytes of a sub-allocation.
        count: How many there are, from byte 0 of the buffer on.
    """
    words = (status, 1, 0, size, count, size * count)
    return _message(SEND_RECEIVE_BUFFER_COMPLETE, *words, size=ANSWER_SIZE)


def build_send_buffer_complete(status: int, section_size: int = 0) -> bytes:
    """Return the answer to SEND_SEND_BUFFER; ``section_size`` in bytes. Cannot block."""
    return _message(SEND_SEND_BUFFER_COMPLETE, status, section_size, size=ANSWER_SIZE)


def build_rndis_packet(
    channel_type: int, section_index: int = NO_SECTION, section_size: int = 0
) -> bytes:
    """Return SEND_RNDIS_PACKET. Cannot block."""
    return _message(SEND_RNDIS_PACKET, channel_type, section_index, section_size)


def build_rndis_packet_complete(status: int) -> bytes:
    """Return the 8 bytes that complete an RNDIS packet, either way. Cannot block."""
    return RNDIS_PACKET_COMPLETE.pack(SEND_RNDIS_PACKET_COMPLETE, status)


def build_data_path(path: int) -> bytes:
    """Return SWITCH_DATA_PATH. Cannot block."""
    return _message(SWITCH_DATA_PATH, path)


def build_subchannel(count: int) -> bytes:
    """Return SUBCHANNEL, which asks for sub-channels. Cannot block."""
    return _message(SUBCHANNEL, SUBCHANNEL_ALLOCATE, count)


def build_subchannel_complete(status: int, count: int) -> bytes:
    """Return the answer to SUBCHANNEL, with the number granted. Cannot block."""
    return _message(SUBCHANNEL, status, count)


def build_vf_association(*, allocated: bool, serial: int) -> bytes:
    """Return SEND_VF_ASSOCIATION. Cannot block."""
    return _message(SEND_VF_ASSOCIATION, allocated, serial)


def build_send_table(channels: tuple[int, ...]) -> bytes:
    """Return SEND_INDIRECTION_TABLE: which of its channels the guest sends a flow on.

    Raises ValueError if there are not 16 entries.
    """
    if len(channels) != SEND_TABLE_ENTRIES:
        raise ValueError(f"a send table has {SEND_TABLE_ENTRIES} entries, not {len(channels)}")
    header = _message(SEND_INDIRECTION_TABLE, SEND_TABLE_ENTRIES, _SEND_TABLE_OFFSET)
    return header + struct.pack(f"<{SEND_TABLE_ENTRIES}I", *channels)


def _message(kind: int, *words: int, size: int = MESSAGE_SIZE) -> bytes:
    return struct.pack(f"<I{len(words)}I", kind, *words).ljust(size, b"\0")


assert _RECEIVE_BUFFER_COMPLETE.size == 28
assert RNDIS_PACKET.size == _INIT_COMPLETE.size == 16


def build_oid_query_complete(status: int) -> bytes:
    """Return the answer to OID_QUERY_EX: an NDIS status, and nothing else. Cannot block."""
    return _message(OID_QUERY_EX_COMPLETE, status)
