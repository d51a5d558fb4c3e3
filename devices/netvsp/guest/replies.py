"""What network drivers demand of an answer, as one set of checks.

Each check is a real driver's: where it would crash, hang, log an error or do without the device,
the guest crashes. Sources: linux/drivers/net/hyperv/netvsc.c (``netvsc_send_completion``,
``netvsc_init_buf``) and rndis_filter.c, freebsd/sys/dev/hyperv/netvsc/hn_nvs.c and hn_rndis.c,
openbsd/sys/dev/pv/if_hvn.c, dpdk/drivers/net/netvsc, MacHyperVSupport/Network, mu_msvm/MsvmPkg/
NetvscDxe and EmclDxe.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from netvsp.guest.habits import NetworkHabits
from netvsp.wire import ndis, nvsp, oids, rndis
from vmbus.errors import GuestProtocolError, VMBusError
from vmbus.guest import Incoming
from vmbus.guest.machine import Panic

P = ParamSpec("P")
R = TypeVar("R")

_OWN_SIZES = {
    nvsp.INIT_COMPLETE: 16,
    nvsp.SEND_RECEIVE_BUFFER_COMPLETE: 28,
    nvsp.SEND_SEND_BUFFER_COMPLETE: 12,
    nvsp.SUBCHANNEL: 12,
    nvsp.SEND_RNDIS_PACKET_COMPLETE: 8,
}
_QUERY_REPLY = struct.Struct("<IIIIII")
MAX_TABLE = 128
"""Entries of an indirection table; FreeBSD and DPDK do without scaling if there are more."""


class AttachError(VMBusError):
    """The driver and the device have no version in common, or it refuses a step."""


class RndisError(VMBusError):
    """The device has refused an RNDIS request.

    Args:
        what: Message and object.
        status: RNDIS status.
    """

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: RNDIS status {status:#010x}")
        self.status = status


def strictly(panic: Panic, parse: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what a parser returns, and crash where it refuses its bytes. Cannot block."""
    try:
        return parse(*args, **kwargs)
    except GuestProtocolError as error:
        _crash(panic, error)


def _crash(panic: Panic, error: GuestProtocolError) -> NoReturn:
    panic(str(error))


def name_of(oid: int) -> str:
    """Return an object's name for people."""
    return oids.NAMES.get(oid, f"{oid:#010x}")


# -- NVSP ------------------------------------------------------------------------------------------


def check_answer(packet: Incoming, kind: int, habits: NetworkHabits, panic: Panic) -> bytes:
    """See that a driver takes a completion as an answer of this type; return its payload.

    Args:
        packet: The completion.
        kind: Type of the answer that is due.
        habits: What the driver takes.
        panic: Called if it does not take it.
    """
    payload = packet.payload
    name = nvsp.MESSAGE_NAMES[kind]
    size = len(payload)
    room = habits.answer_room
    if room is not None and size > room:
        panic(f"NVSP {name}: {size} bytes, the driver has room for {room}")
    if size < 4:
        panic(f"NVSP {name}: a completion of {size} bytes where this answer was due")
    found = nvsp.parse_type_untrusted(payload)
    if found != kind:
        panic(f"NVSP: {nvsp.MESSAGE_NAMES.get(found, found)} where {name} was due")
    least = _OWN_SIZES[kind]
    if kind in (nvsp.INIT_COMPLETE, nvsp.SEND_RECEIVE_BUFFER_COMPLETE):
        least = max(least, habits.min_answer)
    elif kind == nvsp.SUBCHANNEL:
        least = max(least, habits.min_sub_channels)
    if size < least:
        panic(f"NVSP {name}: {size} bytes instead of {least}: the driver drops it and waits")
    return payload


def check_bare_completion(packet: Incoming, kind: int, habits: NetworkHabits, panic: Panic) -> None:
    """See that a driver takes the completion of a message that has no answer.

    Args:
        packet: The completion.
        kind: Type of the message that it completes.
        habits: What the driver takes.
        panic: Called if it does not take it.
    """
    size = len(packet.payload)
    name = nvsp.MESSAGE_NAMES[kind]
    # Linux ends its wait for SWITCH_DATA_PATH with nothing else (netvsc_send_completion).
    if size and (habits.empty_completions or kind == nvsp.SWITCH_DATA_PATH):
        panic(f"NVSP {name}: completed with {size} bytes, where there is no answer")
    if habits.answer_room is not None and size > habits.answer_room:
        panic(f"NVSP {name}: completed with {size} bytes, there is room for {habits.answer_room}")


def check_receive_section(
    payload: bytes, size: int, habits: NetworkHabits, panic: Panic
) -> nvsp.ReceiveSection:
    """Check the answer to SEND_RECEIVE_BUFFER; its status is the caller's matter.

    Args:
        payload: Of the answer, as long as it has to be.
        size: Bytes of the receive buffer.
        habits: What the driver takes.
        panic: Called if it does not take it.
    """
    section = strictly(panic, nvsp.parse_receive_buffer_complete_untrusted, payload)
    if section.status != nvsp.SUCCESS:
        return section
    if section.sections != 1 or section.offset:
        panic(f"receive buffer: {section.sections} sections, the first at {section.offset}")
    one, count = section.sub_alloc_size, section.sub_alloc_count
    if one < habits.min_section or not count:
        panic(f"receive buffer: {count} sub-allocations of {one} bytes")
    if one * count > size:
        panic(f"receive buffer: {count} sub-allocations of {one} bytes in {size}")
    return section


def check_send_section(
    payload: bytes, size: int, habits: NetworkHabits, panic: Panic
) -> tuple[int, int]:
    """Check the answer to SEND_SEND_BUFFER; return its status and the bytes of a section.

    Args:
        payload: Of the answer, as long as it has to be.
        size: Bytes of the send buffer.
        habits: What the driver takes.
        panic: Called if it does not take it.
    """
    status, section = strictly(panic, nvsp.parse_send_buffer_complete_untrusted, payload)
    if status == nvsp.SUCCESS and (
        section < habits.min_section or section % habits.section_multiple or section > size
    ):
        panic(f"send buffer: sections of {section} bytes in {size}")
    return status, section


# -- RNDIS -----------------------------------------------------------------------------------------


def check_query_reply(
    message: bytes, oid: int, room: int, habits: NetworkHabits, panic: Panic
) -> rndis.QueryReply:
    """Check the answer to a QUERY; its status is the caller's matter.

    Args:
        message: QUERY_CMPLT, as long as it says, with the right id.
        oid: What was asked.
        room: Bytes of data that the driver has room for.
        habits: What the driver takes.
        panic: Called if it does not take it.
    """
    what = f"QUERY {name_of(oid)}"
    if len(message) < _QUERY_REPLY.size:
        panic(f"{what}: an answer of {len(message)} bytes: rndis_filter_query_device fails")
    _kind, _length, number, status, size, offset = _QUERY_REPLY.unpack_from(message)
    # Linux looks at the offset of an empty answer, too.
    if offset < 16 or offset + size > len(message) - 8:
        panic(f"{what}: {size} bytes at offset {offset} of {len(message) - 8}")
    if habits.info_behind and size and offset != 16:
        panic(f"{what}: data at offset {offset}; the driver takes it from 16 on")
    if size > room:
        panic(f"{what}: {size} bytes, {room} were asked for")
    if status != rndis.STATUS_SUCCESS:
        return rndis.QueryReply(number, status, b"")
    return rndis.QueryReply(number, status, message[8 + offset : 8 + offset + size])


def check_address(address: bytes, panic: Panic) -> bytes:
    """See that a hardware address is one that a driver can use; return it."""
    if len(address) != 6:
        panic(f"hardware address of {len(address)} bytes: {address.hex()}")
    if address[0] & 1 or not any(address):
        panic(f"hardware address {address.hex(':')}: no station has it")
    return address


def check_word(oid: int, data: bytes, panic: Panic) -> int:
    """See that an object is one 32-bit number; return it."""
    if len(data) != 4:
        panic(f"QUERY {name_of(oid)}: {len(data)} bytes, not 4")
    return int.from_bytes(data, "little")


def check_offloads(data: bytes, revision: int, panic: Panic) -> ndis.OffloadCapabilities:
    """Check TCP_OFFLOAD_HARDWARE_CAPABILITIES.

    Args:
        data: The object.
        revision: That was asked for; the driver has room for no more.
        panic: Called if a driver does not take it.
    """
    capabilities = strictly(panic, ndis.parse_offload_capabilities_untrusted, data)
    kind, found, size = ndis.parse_object_untrusted(data)
    if found > revision or size > ndis.OFFLOAD_SIZES[revision] or len(data) < size:
        panic(
            f"offload capabilities: NDIS object {kind:#x}, revision {found}, of {size} bytes; "
            f"revision {revision} was asked for"
        )
    return capabilities


def check_scaling(data: bytes, panic: Panic) -> ndis.RssCapabilities:
    """Check GEN_RECEIVE_SCALE_CAPABILITIES as FreeBSD and DPDK do (hn_rndis_query_rsscaps)."""
    capabilities = strictly(panic, ndis.parse_rss_capabilities_untrusted, data)
    _kind, _revision, size = ndis.parse_object_untrusted(data)
    entries = capabilities.table_entries
    if size != len(data):
        panic(f"receive-side scaling capabilities: size {size} in {len(data)} bytes")
    if not capabilities.queues:
        panic("receive-side scaling capabilities: no queues")
    if not 0 < entries <= MAX_TABLE or entries & (entries - 1):
        panic(f"receive-side scaling capabilities: a table of {entries} entries")
    if not capabilities.flags & ndis.RSS_TOEPLITZ or not capabilities.flags & (
        ndis.RSS_TCP_IPV4 | ndis.RSS_TCP_IPV6
    ):
        panic(f"receive-side scaling capabilities: nothing to hash with, {capabilities.flags:#x}")
    return capabilities
