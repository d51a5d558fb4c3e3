"""KVM's ioctls and structures for x86-64.

All numbers and layouts are from linux/include/uapi/linux/kvm.h and
linux/arch/x86/include/uapi/asm/kvm.h; what they do is in linux/Documentation/virt/kvm/api.rst.
Structures go to the kernel as bytearrays, which it may change in place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from vmbus.errors import ConfigError

API_VERSION: Final = 12


def _io(number: int) -> int:
    return 0xAE00 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | 0xAE00 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | 0xAE00 | number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0xAE00 | number


# -------------------------------------------------------------------------------- structures

MEMORY_REGION: Final = struct.Struct("<IIQQQ")
"""slot, flags, guest address, bytes, address here."""
IRQ_LEVEL: Final = struct.Struct("<II")
"""gsi, level."""
PIT_CONFIG: Final = struct.Struct("<I60x")
"""flags."""
IRQFD: Final = struct.Struct("<iIIi16x")
"""eventfd, gsi, flags, resample eventfd."""
ROUTING_HEADER: Final = struct.Struct("<II")
"""entries, flags."""
ROUTING_ENTRY: Final = struct.Struct("<IIII 32s")
"""gsi, type, flags, pad, and one of the following."""
ROUTE_IRQCHIP: Final = struct.Struct("<II")
"""chip, pin."""
ROUTE_MSI: Final = struct.Struct("<III")
"""address low, address high, data."""
ROUTE_HV_SINT: Final = struct.Struct("<II")
"""VP index, SINT."""
SIGNAL_MSI: Final = struct.Struct("<IIIII12x")
"""address low, address high, data, flags, device id."""
HYPERV_EVENTFD: Final = struct.Struct("<IiI12x")
"""connection id, eventfd, flags."""
ENABLE_CAP: Final = struct.Struct("<II4Q64x")
"""capability, flags, four arguments."""
CPUID_HEADER: Final = struct.Struct("<II")
"""entries, pad."""
CPUID_ENTRY: Final = struct.Struct("<7I12x")
"""function, index, flags, eax, ebx, ecx, edx."""
MSR_HEADER: Final = struct.Struct("<II")
"""entries, pad."""
MSR_ENTRY: Final = struct.Struct("<IIQ")
"""index, reserved, value."""
MSR_FILTER: Final = struct.Struct("<II384s")
"""flags, pad, 16 ranges."""
MSR_FILTER_RANGE: Final = struct.Struct("<IIIIQ")
"""flags, MSRs, first MSR, pad, address of a bitmap."""
REGS: Final = struct.Struct("<18Q")
SEGMENT: Final = struct.Struct("<QIH8Bx1x")
"""base, limit, selector, type, present, dpl, db, s, l, g, avl; then unusable and a pad byte."""
SREGS_SIZE: Final = 312
DTABLE: Final = struct.Struct("<QH6x")
"""base, limit."""

assert ROUTING_ENTRY.size == 48
assert ENABLE_CAP.size == 104
assert CPUID_ENTRY.size == 40
assert MSR_FILTER.size == 392
assert SEGMENT.size == 24

# ------------------------------------------------------------------------------------ ioctls

GET_API_VERSION: Final = _io(0x00)
CREATE_VM: Final = _io(0x01)
CHECK_EXTENSION: Final = _io(0x03)
GET_VCPU_MMAP_SIZE: Final = _io(0x04)
GET_SUPPORTED_CPUID: Final = _iowr(0x05, CPUID_HEADER.size)
CREATE_VCPU: Final = _io(0x41)
SET_USER_MEMORY_REGION: Final = _iow(0x46, MEMORY_REGION.size)
SET_TSS_ADDR: Final = _io(0x47)
SET_IDENTITY_MAP_ADDR: Final = _iow(0x48, 8)
CREATE_IRQCHIP: Final = _io(0x60)
IRQ_LINE: Final = _iow(0x61, IRQ_LEVEL.size)
SET_GSI_ROUTING: Final = _iow(0x6A, ROUTING_HEADER.size)
IRQFD_IOCTL: Final = _iow(0x76, IRQFD.size)
CREATE_PIT2: Final = _iow(0x77, PIT_CONFIG.size)
RUN: Final = _io(0x80)
GET_REGS: Final = _ior(0x81, REGS.size)
SET_REGS: Final = _iow(0x82, REGS.size)
GET_SREGS: Final = _ior(0x83, SREGS_SIZE)
SET_SREGS: Final = _iow(0x84, SREGS_SIZE)
GET_MSRS: Final = _iowr(0x88, MSR_HEADER.size)
SET_MSRS: Final = _iow(0x89, MSR_HEADER.size)
SET_CPUID2: Final = _iow(0x90, CPUID_HEADER.size)
GET_TSC_KHZ: Final = _io(0xA3)
ENABLE_CAP_IOCTL: Final = _iow(0xA3, ENABLE_CAP.size)
SIGNAL_MSI_IOCTL: Final = _iow(0xA5, SIGNAL_MSI.size)
HYPERV_EVENTFD_IOCTL: Final = _iow(0xBD, HYPERV_EVENTFD.size)
GET_SUPPORTED_HV_CPUID: Final = _iowr(0xC1, CPUID_HEADER.size)
X86_SET_MSR_FILTER: Final = _iow(0xC6, MSR_FILTER.size)

# ------------------------------------------------------------------------------ capabilities

CAP_IRQCHIP: Final = 0
CAP_TSC_DEADLINE_TIMER: Final = 72
CAP_IRQFD_RESAMPLE: Final = 82
CAP_HYPERV_SYNIC2: Final = 148
CAP_HYPERV_EVENTFD: Final = 154
CAP_X86_USER_SPACE_MSR: Final = 188
CAP_X86_MSR_FILTER: Final = 189
CAP_SYS_HYPERV_CPUID: Final = 191

MSR_EXIT_REASON_UNKNOWN: Final = 1 << 1
MSR_EXIT_REASON_FILTER: Final = 1 << 2
MSR_FILTER_READ: Final = 1 << 0
MSR_FILTER_WRITE: Final = 1 << 1
MSR_FILTER_RANGES: Final = 16

IRQFD_DEASSIGN: Final = 1 << 0
IRQFD_RESAMPLE: Final = 1 << 1
HYPERV_EVENTFD_DEASSIGN: Final = 1 << 0
PIT_SPEAKER_DUMMY: Final = 1 << 0
ROUTING_IRQCHIP: Final = 1
ROUTING_MSI: Final = 2
ROUTING_HV_SINT: Final = 4
CHIP_PIC_MASTER: Final = 0
CHIP_PIC_SLAVE: Final = 1
CHIP_IOAPIC: Final = 2

# -------------------------------------------------------------------- the shared page, kvm_run

RUN_IMMEDIATE_EXIT: Final = 1
RUN_EXIT_REASON: Final = 8
RUN_UNION: Final = 32
RUN_IO: Final = struct.Struct("<BBHIQ")
"""direction, size, port, count, offset of the data in the page."""
RUN_MMIO: Final = struct.Struct("<Q8sIB")
"""address, data, length, is a write."""
RUN_MSR: Final = struct.Struct("<B7xIIQ")
"""error (out), reason, index, value (in or out). An error makes KVM inject #GP."""
RUN_MSR_ERROR: Final = RUN_UNION
RUN_MSR_DATA: Final = RUN_UNION + 16
RUN_SYSTEM_EVENT: Final = struct.Struct("<I")
RUN_FAIL_ENTRY: Final = struct.Struct("<Q")
RUN_INTERNAL_ERROR: Final = struct.Struct("<I")
RUN_HYPERV_TYPE: Final = struct.Struct("<I")
RUN_HYPERV_SYNIC: Final = struct.Struct("<I4xQQQ")
"""MSR, then SCONTROL, SIEFP and SIMP as they are now."""
RUN_HYPERV_HCALL: Final = struct.Struct("<QQQQ")
"""input value, result (out), first and second parameter."""
RUN_HYPERV_BODY: Final = RUN_UNION + 8
RUN_HYPERV_RESULT: Final = RUN_HYPERV_BODY + 8

IO_IN: Final = 0
HYPERV_EXIT_SYNIC: Final = 1
HYPERV_EXIT_HCALL: Final = 2
SYSTEM_EVENT_SHUTDOWN: Final = 1
SYSTEM_EVENT_RESET: Final = 2
SYSTEM_EVENT_CRASH: Final = 3


class Exit:
    """Values of ``exit_reason``."""

    IO: Final = 2
    HLT: Final = 5
    MMIO: Final = 6
    IRQ_WINDOW_OPEN: Final = 7
    SHUTDOWN: Final = 8
    FAIL_ENTRY: Final = 9
    INTR: Final = 10
    INTERNAL_ERROR: Final = 17
    SYSTEM_EVENT: Final = 24
    HYPERV: Final = 27
    X86_RDMSR: Final = 29
    X86_WRMSR: Final = 30


# --------------------------------------------------------------------------------- functions


class Ioctl(Protocol):
    """``fcntl.ioctl``, or something in its place."""

    def __call__(self, fd: int, request: int, arg: int | bytearray = 0, /) -> int:
        """Return what the system call returns; changes a bytearray in place. Raises OSError."""


class CpuidEntry(NamedTuple):
    """One leaf of CPUID."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def ioctl(fd: int, request: int, arg: int | bytearray = 0, /) -> int:
    """Call the kernel. Integers have to fit an ``int``; bytearrays may be changed.

    The GIL is released meanwhile. A signal ends it with InterruptedError.
    """
    result: int = fcntl.ioctl(fd, request, arg)
    return result


def set_tss_address(vm: int, address: int) -> None:
    """Give KVM three pages for Intel processors that cannot run real mode by themselves.

    Their place is just below 4 GiB, a number that ``fcntl.ioctl`` does not take.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(vm, ctypes.c_ulong(SET_TSS_ADDR), ctypes.c_ulong(address)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"KVM_SET_TSS_ADDR: {os.strerror(code)}")


def open_kvm(path: str = "/dev/kvm", *, call: Ioctl = ioctl) -> int:
    """Open KVM and return its descriptor, owned by the caller.

    Raises:
        ConfigError: There is none that could be used.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; see vmbus doctor for what is missing"
        ) from error
    try:
        version = call(fd, GET_API_VERSION)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"{path} is not KVM: {error.strerror}") from error
    if version != API_VERSION:
        os.close(fd)
        raise ConfigError(f"{path}: KVM's API has version {version}, not {API_VERSION}")
    return fd


def pack_cpuid(entries: Sequence[CpuidEntry]) -> bytearray:
    """Return ``struct kvm_cpuid2``."""
    data = bytearray(CPUID_HEADER.pack(len(entries), 0))
    for entry in entries:
        data += CPUID_ENTRY.pack(*entry)
    return data


def unpack_cpuid(data: bytes | bytearray) -> list[CpuidEntry]:
    """Read ``struct kvm_cpuid2``."""
    count, _ = CPUID_HEADER.unpack_from(data)
    start = CPUID_HEADER.size
    return [
        CpuidEntry(*CPUID_ENTRY.unpack_from(data, start + number * CPUID_ENTRY.size))
        for number in range(count)
    ]


def read_cpuid(fd: int, request: int, *, call: Ioctl = ioctl) -> list[CpuidEntry]:
    """Ask for leaves: GET_SUPPORTED_CPUID or GET_SUPPORTED_HV_CPUID."""
    room = 64
    while True:
        data = bytearray(CPUID_HEADER.pack(room, 0) + bytes(room * CPUID_ENTRY.size))
        try:
            call(fd, request, data)
        except OSError as error:
            if error.errno != errno.E2BIG or room > 4096:
                raise
            room *= 2
        else:
            return unpack_cpuid(data)


def pack_msrs(values: Mapping[int, int]) -> bytearray:
    """Return ``struct kvm_msrs``."""
    data = bytearray(MSR_HEADER.pack(len(values), 0))
    for index, value in values.items():
        data += MSR_ENTRY.pack(index, 0, value)
    return data


class FilterRange(NamedTuple):
    """MSRs that exit to user space instead of being carried out."""

    first: int
    number: int
    flags: int
    """MSR_FILTER_READ, MSR_FILTER_WRITE or both."""


def pack_msr_filter(ranges: Iterable[FilterRange]) -> tuple[bytearray, list[Any]]:
    """Return ``struct kvm_msr_filter`` that denies these ranges and allows the rest.

    Returns:
        The structure, and what has to stay alive while the kernel reads it.
    """
    keep: list[Any] = []
    packed = b""
    for each in ranges:
        # A bit of 0 denies.
        bitmap = ctypes.create_string_buffer((each.number + 7) // 8)
        keep.append(bitmap)
        packed += MSR_FILTER_RANGE.pack(
            each.flags, each.number, each.first, 0, ctypes.addressof(bitmap)
        )
    if len(packed) > MSR_FILTER_RANGES * MSR_FILTER_RANGE.size:
        raise ValueError(f"KVM has room for {MSR_FILTER_RANGES} ranges of MSRs only")
    return bytearray(MSR_FILTER.pack(0, 0, packed)), keep
