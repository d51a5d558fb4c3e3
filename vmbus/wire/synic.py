"""The SynIC and hypercall interface in bytes and bits: slots, inputs, MSRs, CPUID, status codes.

A guest tells its host something by the hypercalls HvPostMessage (up to 240 bytes to a *connection
id*) and HvSignalEvent (one bit). A host tells a guest something through two pages per virtual
processor (VP): the SIM page with one 256-byte message slot per synthetic interrupt source (SINT),
and the SIEF page with 2048 event flags per SINT. VMBus uses SINT 2 of both.

Sources: TLFS 3 (hypercalls), 2 (CPUID, MSRs), 11 (synthetic interrupt controller);
linux/include/asm-generic/hyperv-tlfs.h and linux/arch/x86/include/asm/hyperv-tlfs.h.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from vmbus.errors import GuestProtocolError

PAGE_SIZE: Final = 4096
SINT_COUNT: Final = 16
"""Synthetic interrupt sources, message slots and event flag words per VP."""
VMBUS_SINT: Final = 2
"""The SINT that VMBus uses for messages and events."""

# ---------------------------------------------------------------------------------- SIM page

MESSAGE_SIZE: Final = 256
"""Bytes of one message slot; slot ``n`` is at byte ``256 * n`` of the SIM page."""
MAX_PAYLOAD: Final = 240
PAYLOAD_OFFSET: Final = 16
MESSAGE_HEADER: Final = struct.Struct("<IBBHQ")
"""type u32, payload size u8, flags u8, reserved u16, sender (port id) u64."""
assert MESSAGE_HEADER.size == PAYLOAD_OFFSET
MESSAGE_TAIL: Final = struct.Struct("<BBHQ")
"""The header without its type, from byte 4: written before the type is."""
assert MESSAGE_TAIL.size == PAYLOAD_OFFSET - 4
SIZE_OFFSET: Final = 4
FLAGS_OFFSET: Final = 5
FLAG_PENDING: Final = 1
"""Another message waits for this slot: write EOM after freeing it."""
MESSAGE_NONE: Final = 0
"""Type of a free slot."""
MESSAGE_HYPERVISOR: Final = 0x8000_0000
"""Types with this bit come from the hypervisor only; guests must not post them."""
MESSAGE_TIMER_EXPIRED: Final = 0x8000_0010

# --------------------------------------------------------------------------------- SIEF page

EVENT_FLAG_COUNT: Final = 2048
"""Event flags per SINT."""
EVENT_FLAGS_SIZE: Final = 256
"""Bytes of one SINT's flags; those of SINT ``n`` are at byte ``256 * n`` of the SIEF page."""

# -------------------------------------------------------------------------- hypercall inputs


class HypercallCode(enum.IntEnum):
    """Call codes (TLFS appendix A); only these two concern VMBus."""

    POST_MESSAGE = 0x5C
    SIGNAL_EVENT = 0x5D


INPUT_FAST: Final = 1 << 16
"""Register ("fast") form: RDX and R8 hold the parameters themselves."""
INPUT_RESERVED: Final = 0xF << 60 | 0xF << 44 | 0x1F << 27
"""Bits 63:60, 47:44 and 31:27 must be zero (bit 31 asks for a nested hypervisor's service)."""
POST_MESSAGE: Final = struct.Struct("<IIII")
"""Header of HvPostMessage's input: connection id, reserved, message type, payload size."""
POST_MESSAGE_SIZE: Final = 256
"""Bytes of HvPostMessage's input, always in memory."""
assert POST_MESSAGE.size + MAX_PAYLOAD == POST_MESSAGE_SIZE
SIGNAL_EVENT: Final = struct.Struct("<IHH")
"""HvSignalEvent's input: connection id, flag number, reserved; in memory or in RDX."""
SIGNAL_EVENT_SIZE: Final = 8
assert SIGNAL_EVENT.size == SIGNAL_EVENT_SIZE

CONNECTION_ID_LIMIT: Final = 1 << 24
"""Connection ids have 24 bits."""


class HvStatus(enum.IntEnum):
    """Hypercall results, ``HV_STATUS_*`` (TLFS appendix B)."""

    SUCCESS = 0x00
    INVALID_HYPERCALL_CODE = 0x02
    INVALID_HYPERCALL_INPUT = 0x03
    INVALID_ALIGNMENT = 0x04
    INVALID_PARAMETER = 0x05
    ACCESS_DENIED = 0x06
    INVALID_PARTITION_STATE = 0x07
    OPERATION_DENIED = 0x08
    INSUFFICIENT_MEMORY = 0x0B
    INVALID_PARTITION_ID = 0x0D
    INVALID_VP_INDEX = 0x0E
    INVALID_PORT_ID = 0x11
    INVALID_CONNECTION_ID = 0x12
    INSUFFICIENT_BUFFERS = 0x13
    NOT_ACKNOWLEDGED = 0x14
    ACKNOWLEDGED = 0x16
    INVALID_SYNIC_STATE = 0x18
    OBJECT_IN_USE = 0x19
    NO_DATA = 0x1B


# -------------------------------------------------------------------------------------- MSRs


class Msr(enum.IntEnum):
    """Synthetic MSRs (TLFS appendix F)."""

    GUEST_OS_ID = 0x4000_0000
    HYPERCALL = 0x4000_0001
    VP_INDEX = 0x4000_0002
    TIME_REF_COUNT = 0x4000_0020
    REFERENCE_TSC = 0x4000_0021
    TSC_FREQUENCY = 0x4000_0022
    APIC_FREQUENCY = 0x4000_0023
    VP_ASSIST_PAGE = 0x4000_0073
    SCONTROL = 0x4000_0080
    SVERSION = 0x4000_0081
    SIEFP = 0x4000_0082
    SIMP = 0x4000_0083
    EOM = 0x4000_0084
    SINT0 = 0x4000_0090
    """The first of 16."""
    SINT2 = 0x4000_0092
    SINT15 = 0x4000_009F
    STIMER0_CONFIG = 0x4000_00B0
    """The first of 8: config and count of four timers."""
    STIMER3_COUNT = 0x4000_00B7
    CRASH_P0 = 0x4000_0100
    CRASH_P4 = 0x4000_0104
    CRASH_CTL = 0x4000_0105
    TSC_INVARIANT_CONTROL = 0x4000_0118


STIMER_MSR_COUNT: Final = 8
CRASH_PARAMETER_COUNT: Final = 5

PAGE_ENABLE: Final = 1 << 0
"""HYPERCALL, SIMP, SIEFP, VP_ASSIST_PAGE and REFERENCE_TSC: the page in bits 63:12 is in use."""
PAGE_SHIFT: Final = 12
HYPERCALL_LOCKED: Final = 1 << 1
"""The hypercall page cannot be moved any more until the VM is reset."""
SCONTROL_ENABLE: Final = 1 << 0
SYNIC_VERSION: Final = 1
SINT_VECTOR: Final = 0xFF
SINT_MASKED: Final = 1 << 16
SINT_AUTO_EOI: Final = 1 << 17
SINT_POLLING: Final = 1 << 18
SINT_FIRST_VECTOR: Final = 16
"""Lower vectors are exceptions; only a masked SINT may name one."""
CRASH_CTL_NOTIFY: Final = 1 << 63
CRASH_CTL_MESSAGE: Final = 1 << 62
"""P3 and P4 are address and length of a text."""

# ------------------------------------------------------------------------------------- CPUID


class CpuidLeaf(enum.IntEnum):
    """Hypervisor CPUID leaves (TLFS 2.4)."""

    VENDOR = 0x4000_0000
    INTERFACE = 0x4000_0001
    VERSION = 0x4000_0002
    FEATURES = 0x4000_0003
    RECOMMENDATIONS = 0x4000_0004
    LIMITS = 0x4000_0005
    HARDWARE = 0x4000_0006
    CPU_MANAGEMENT = 0x4000_0007
    SVM = 0x4000_0008
    NESTED_FEATURES = 0x4000_0009
    NESTED_RECOMMENDATIONS = 0x4000_000A


HYPERVISOR_PRESENT: Final = 1 << 31
"""ECX of leaf 1: there are hypervisor leaves at all."""
VENDOR_MICROSOFT: Final = b"Microsoft Hv"
"""EBX, ECX, EDX of leaf 0x40000000; Linux accepts no other (linux/arch/x86/…/mshyperv.c)."""
INTERFACE_HV1: Final = int.from_bytes(b"Hv#1", "little")
"""EAX of leaf 0x40000001."""


class Privilege(enum.IntFlag):
    """EAX of leaf 0x40000003: MSRs that the guest may use."""

    VP_RUNTIME = 1 << 0
    TIME_REF_COUNT = 1 << 1
    SYNIC = 1 << 2
    SYNTHETIC_TIMERS = 1 << 3
    APIC = 1 << 4
    HYPERCALL = 1 << 5
    VP_INDEX = 1 << 6
    RESET = 1 << 7
    STATISTICS = 1 << 8
    REFERENCE_TSC = 1 << 9
    GUEST_IDLE = 1 << 10
    FREQUENCIES = 1 << 11
    REENLIGHTENMENT = 1 << 13
    TSC_INVARIANT = 1 << 15


class PartitionPrivilege(enum.IntFlag):
    """EBX of leaf 0x40000003: hypercalls that the guest may use."""

    CREATE_PARTITIONS = 1 << 0
    ACCESS_PARTITION_ID = 1 << 1
    POST_MESSAGES = 1 << 4
    SIGNAL_EVENTS = 1 << 5
    CPU_MANAGEMENT = 1 << 12
    """Linux takes itself for the root partition and starts no VMBus: never set."""
    EXTENDED_HYPERCALLS = 1 << 20
    ISOLATION = 1 << 22


class MiscFeature(enum.IntFlag):
    """EDX of leaf 0x40000003."""

    XMM_INPUT = 1 << 4
    FREQUENCY_MSRS = 1 << 8
    CRASH_MSRS = 1 << 10
    SINT_POLLING = 1 << 17
    DIRECT_TIMERS = 1 << 19


class Recommendation(enum.IntFlag):
    """EAX of leaf 0x40000004."""

    REMOTE_TLB_FLUSH = 1 << 2
    APIC_MSRS = 1 << 3
    RELAXED_TIMING = 1 << 5
    DEPRECATE_AUTO_EOI = 1 << 9
    CLUSTER_IPI = 1 << 10
    EX_PROCESSOR_MASKS = 1 << 11


NO_SPINLOCK_NOTIFICATION: Final = 0xFFFF_FFFF
"""EBX of leaf 0x40000004: never tell the hypervisor about spinning."""


# --------------------------------------------------------------------------------- functions


class HypercallInput(NamedTuple):
    """The control word of a hypercall (TLFS 3.6)."""

    code: int
    fast: bool
    variable_header: int
    """Units of 8 bytes."""
    rep_count: int
    rep_start: int


class PostMessageInput(NamedTuple):
    """What HvPostMessage carries."""

    connection_id: int
    message_type: int
    payload: bytes
    """At most 240 bytes."""


class SignalEventInput(NamedTuple):
    """What HvSignalEvent carries."""

    connection_id: int
    flag: int
    """Relative to the port's first flag; 0 in every known guest."""


class SlotMessage(NamedTuple):
    """One message slot."""

    message_type: int
    """0 if the slot is free."""
    pending: bool
    sender: int
    payload: bytes


def parse_hypercall_input_untrusted(value: int) -> HypercallInput:
    """Take a hypercall's control word (RCX) apart. Cannot block.

    Raises:
        GuestProtocolError: Reserved bits are set.
    """
    if value & INPUT_RESERVED or value >> 64:
        raise GuestProtocolError(f"hypercall {value:#x}: reserved bits are set", field="input")
    return HypercallInput(
        value & 0xFFFF,
        bool(value & INPUT_FAST),
        value >> 17 & 0x3FF,
        value >> 32 & 0xFFF,
        value >> 48 & 0xFFF,
    )


def build_hypercall_input(code: int, *, fast: bool = False) -> int:
    """Return the control word of a simple hypercall."""
    return code | (INPUT_FAST if fast else 0)


def parse_post_message_untrusted(data: bytes) -> PostMessageInput:
    """Parse HvPostMessage's input. Cannot block.

    The word at byte 4 is not looked at: guests leave what they like in it.

    Args:
        data: A private copy of the 256 bytes.

    Raises:
        GuestProtocolError: A wrong length, a payload of more than 240 bytes, or a message type
            that guests must not use (0, or one with bit 31).
    """
    if len(data) != POST_MESSAGE_SIZE:
        raise GuestProtocolError(f"HvPostMessage: input of {len(data)} bytes", field="input")
    connection_id, _reserved, message_type, size = POST_MESSAGE.unpack_from(data)
    if size > MAX_PAYLOAD:
        raise GuestProtocolError(f"HvPostMessage: payload of {size} bytes", field="payload_size")
    if message_type == MESSAGE_NONE or message_type & MESSAGE_HYPERVISOR:
        raise GuestProtocolError(
            f"HvPostMessage: type {message_type:#x} is not a guest's", field="message_type"
        )
    return PostMessageInput(connection_id, message_type, data[PAYLOAD_OFFSET:][:size])


def build_post_message(connection_id: int, message_type: int, payload: bytes) -> bytes:
    """Return HvPostMessage's input (256 bytes).

    Raises:
        ValueError: ``payload`` has more than 240 bytes.
    """
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a message of {len(payload)} bytes does not fit into {MAX_PAYLOAD}")
    header = POST_MESSAGE.pack(connection_id, 0, message_type, len(payload))
    return (header + payload).ljust(POST_MESSAGE_SIZE, b"\0")


def parse_signal_event_untrusted(data: bytes) -> SignalEventInput:
    """Parse HvSignalEvent's input; register forms are passed as the 8 bytes of RDX. Cannot block.

    The two bytes at 6 are not looked at, as in :func:`parse_post_message_untrusted`.

    Raises:
        GuestProtocolError: Not 8 bytes.
    """
    if len(data) != SIGNAL_EVENT_SIZE:
        raise GuestProtocolError(f"HvSignalEvent: input of {len(data)} bytes", field="input")
    connection_id, flag, _reserved = SIGNAL_EVENT.unpack(data)
    return SignalEventInput(connection_id, flag)


def build_signal_event(connection_id: int, flag: int = 0) -> bytes:
    """Return HvSignalEvent's input (8 bytes); as a little-endian integer, its register form."""
    return SIGNAL_EVENT.pack(connection_id, flag, 0)


def parse_message_slot_untrusted(data: bytes) -> SlotMessage:
    """Parse one message slot. Cannot block.

    Args:
        data: A private copy of the 256 bytes.

    Raises:
        GuestProtocolError: A wrong length, or a payload of more than 240 bytes.
    """
    if len(data) != MESSAGE_SIZE:
        raise GuestProtocolError(f"message slot: {len(data)} bytes", field="slot")
    message_type, size, flags, _reserved, sender = MESSAGE_HEADER.unpack_from(data)
    if size > MAX_PAYLOAD:
        raise GuestProtocolError(f"message slot: payload of {size} bytes", field="payload_size")
    pending = bool(flags & FLAG_PENDING)
    return SlotMessage(message_type, pending, sender, data[PAYLOAD_OFFSET:][:size])


def build_message(
    message_type: int, payload: bytes, *, pending: bool = False, sender: int = 0
) -> bytes:
    """Return a message as it stands in its slot (256 bytes).

    Raises:
        ValueError: ``payload`` has more than 240 bytes.
    """
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a message of {len(payload)} bytes does not fit into {MAX_PAYLOAD}")
    flags = FLAG_PENDING if pending else 0
    header = MESSAGE_HEADER.pack(message_type, len(payload), flags, 0, sender)
    return (header + payload).ljust(MESSAGE_SIZE, b"\0")


def message_slot(sint: int) -> slice:
    """Where the message slot of ``sint`` is in the SIM page, in bytes."""
    return slice(sint * MESSAGE_SIZE, (sint + 1) * MESSAGE_SIZE)


def event_flag_position(sint: int, flag: int) -> tuple[int, int]:
    """Return ``(byte, mask)`` of an event flag in the SIEF page."""
    return sint * EVENT_FLAGS_SIZE + flag // 8, 1 << flag % 8


def page_register(gpa: int) -> int:
    """Return a SIMP, SIEFP or HYPERCALL value that enables the page at ``gpa`` (page aligned)."""
    return gpa | PAGE_ENABLE
