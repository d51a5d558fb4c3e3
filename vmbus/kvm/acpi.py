r"""ACPI tables: what the guest is told about the machine.

Sources: ACPI 6.4 chapters 5 and 6; linux/drivers/hv/vmbus_drv.c for what a guest wants to know of
the VMBus device; QEMU's and Generation 2 virtual machines' tables for its identifiers.

Decisions:

* Ordinary fixed hardware (PM1a blocks and PM timer, :mod:`vmbus.kvm.power`), not the
  hardware-reduced profile. With that, Linux would forget that there are a PIC and a PIT, and
  without PIT and PM timer nothing measures the TSC. Guests get a power button too.
* \_S5 and the reset register at 0xCF9 are what guests try first for power-off and reset.
* The VMBus device has the identifiers that Generation 2 firmware gives it, ``MSFT1000`` and the
  compatible ``VMBus``: every guest driver knows one of the two. Its interrupt is of no use to
  Linux; others start only if there is one.
* The window of addresses for its devices is that of a module device around it, as on Hyper-V. Linux
  5.10 looks for it in all ancestors until it finds one, and oopses at the root of the tree.
* PCI, HPET and a keyboard controller are not there and not described.
* The 8254's interrupt 0 is on IOAPIC pin 2, as on every PC since the IOAPIC: the routing table that
  goes into ``KVM_SET_GSI_ROUTING`` must say the same.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmbus.errors import ConfigError
from vmbus.kvm import aml, chipset, cmos, power

TABLES_GPA = 0xE0000
"""Where guests also search for the RSDP by themselves (0xE0000 to 0xFFFFF)."""
TABLES_END = 0x100000
ALIGNMENT = 64

VMBUS_IRQ = 5
SERIAL_IRQ = 4
SCI_IRQ = 9
TIMER_PIN = 2
"""IOAPIC pin of the 8254, whose interrupt number is 0."""
LAPIC_GPA = 0xFEE00000
IOAPIC_GPA = 0xFEC00000
MAX_VPS = 254
"""Local APIC identifiers of one byte; 255 is everybody."""

MMIO_SIZE = 1 << 30
"""Bytes that devices of the bus may ask for addresses out of."""
MIN_MMIO_SIZE = 128 << 20

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_OEM_ID = b"VMBUS "
_OEM_TABLE_ID = b"REFVMM  "
_CREATOR = b"VMBS"
_REVISION = 1

_FADT_SIZE = 276
_SYSTEM_IO = 1
_BOOT_LEGACY_DEVICES = 1 << 0  # a serial port
_BOOT_NO_VGA = 1 << 2
# Not set: bit 1, a keyboard controller; bit 5, no CMOS clock.
_FLAG_WBINVD = 1 << 0
_FLAG_C1 = 1 << 2
_FLAG_NO_SLEEP_BUTTON = 1 << 5
_FLAG_RTC_NOT_IN_FIXED = 1 << 6
_FLAG_TIMER_32_BITS = 1 << 8
_FLAG_RESET_REGISTER = 1 << 10
# Not set: bit 4, the power button is not in the fixed registers.
_NO_C2 = 0xFFF
_NO_C3 = 0xFFF

_MADT_PC_AT = 1  # there is a PIC beside the APICs
_LEVEL_ACTIVE_HIGH = 0x0D


def mmio_window(ram_regions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose (address, size) of the device window: above 4 GiB and above all memory.

    Args:
        ram_regions: (guest physical address, size) of all memory, in bytes.
    """
    top = max([4 << 30, *(gpa + size for gpa, size in ram_regions)])
    return -(-top // MMIO_SIZE) * MMIO_SIZE, MMIO_SIZE


def _sum_to_zero(table: bytes, where: int, covered: int | None = None) -> bytes:
    """Set the byte at ``where`` so that the first ``covered`` bytes sum to 0."""
    checksum = -sum(table[:covered]) & 0xFF
    return table[:where] + bytes([checksum]) + table[where + 1 :]


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = _HEADER.pack(
        signature,
        _HEADER.size + len(body),
        revision,
        0,
        _OEM_ID,
        _OEM_TABLE_ID,
        _REVISION,
        _CREATOR,
        _REVISION,
    )
    return _sum_to_zero(header + body, 9)


def _dsdt(mmio: tuple[int, int]) -> bytes:
    vmbus = aml.device(
        "VMBS",
        aml.name("_HID", aml.string("MSFT1000")),
        aml.name("_CID", aml.string("VMBus")),
        aml.name("_DDN", aml.string("VMBUS")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_STA", aml.integer(0xF)),
        aml.name("_CRS", aml.resources(aml.irq(VMBUS_IRQ))),
    )
    module = aml.device(
        "VMOD",
        aml.name("_HID", aml.string("ACPI0004")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_STA", aml.integer(0xF)),
        aml.name("_CRS", aml.resources(aml.memory_window(*mmio))),
        vmbus,
    )
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_STA", aml.integer(0xF)),
        aml.name("_CRS", aml.resources(aml.io_ports(chipset.SERIAL_PORT, 8), aml.irq(SERIAL_IRQ))),
    )
    sleep_type = aml.integer(power.S5_SLEEP_TYPE)
    zero = aml.integer(0)
    s5 = aml.name("\\_S5", aml.package(sleep_type, sleep_type, zero, zero))
    # Revision 2: integers have 64 bits.
    return _table(b"DSDT", 2, aml.scope("\\_SB", module, com1) + s5)


def _facs() -> bytes:
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _io_register(port: int, size: int) -> bytes:
    """Return a generic address structure for ``size`` bytes of ports."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * size, 0, 0, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    event = power.PM_PORT + power.PM1_EVENT_OFFSET
    control = power.PM_PORT + power.PM1_CONTROL_OFFSET
    timer = power.PM_PORT + power.PM_TIMER_OFFSET
    table = bytearray(_FADT_SIZE)
    flags = (
        _FLAG_WBINVD
        | _FLAG_C1
        | _FLAG_NO_SLEEP_BUTTON
        | _FLAG_RTC_NOT_IN_FIXED
        | _FLAG_TIMER_32_BITS
        | _FLAG_RESET_REGISTER
    )
    for offset, kind, value in (
        (36, "I", facs),
        (40, "I", dsdt),
        (46, "H", SCI_IRQ),
        (48, "I", 0),  # SMI command: ACPI mode cannot be left
        (56, "I", event),
        (64, "I", control),
        (76, "I", timer),
        (88, "B", power.PM1_EVENT_SIZE),
        (89, "B", power.PM1_CONTROL_SIZE),
        (91, "B", power.PM_TIMER_SIZE),
        (96, "H", _NO_C2),
        (98, "H", _NO_C3),
        (108, "B", cmos.CENTURY),
        (109, "H", _BOOT_LEGACY_DEVICES | _BOOT_NO_VGA),
        (112, "I", flags),
        (128, "B", chipset.RESET_VALUE),
        (140, "Q", dsdt),
    ):
        struct.pack_into("<" + kind, table, offset, value)
    for offset, register in (
        (116, _io_register(chipset.RESET_PORT, 1)),
        (148, _io_register(event, power.PM1_EVENT_SIZE)),
        (172, _io_register(control, power.PM1_CONTROL_SIZE)),
        (208, _io_register(timer, power.PM_TIMER_SIZE)),
    ):
        table[offset : offset + len(register)] = register
    return _table(b"FACP", 6, bytes(table[_HEADER.size :]))


def _madt(vp_count: int) -> bytes:
    entries = [struct.pack("<II", LAPIC_GPA, _MADT_PC_AT)]
    entries += [struct.pack("<BBBBI", 0, 8, vp, vp, 1) for vp in range(vp_count)]
    entries += [
        struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_GPA, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, TIMER_PIN, 0),
        struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, _LEVEL_ACTIVE_HIGH),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),  # NMI on LINT1 of every processor
    ]
    return _table(b"APIC", 5, b"".join(entries))


def _rsdp(xsdt: int) -> bytes:
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0)
    # The first checksum covers what ACPI 1.0 knew.
    return _sum_to_zero(_sum_to_zero(rsdp, 8, 20), 32)


def build_tables(
    vp_count: int, *, mmio: tuple[int, int], gpa: int = TABLES_GPA
) -> tuple[list[tuple[int, bytes]], int]:
    """Build all tables for a machine.

    Args:
        vp_count: Processors; the local APIC of each has its VP index as identifier.
        mmio: (guest physical address, size) in bytes of the addresses that the VMBus device may
            give to devices; overlaps nothing. See :func:`mmio_window`.
        gpa: Where the tables begin; the guest must be told to keep off up to ``TABLES_END``.

    Returns:
        The tables, each with its guest physical address, and the address of the RSDP among them.

    Raises:
        ConfigError: A number of processors or a window that cannot be described.
    """
    if not 1 <= vp_count <= MAX_VPS:
        raise ConfigError(f"{vp_count} processors: 1 to {MAX_VPS} are possible")
    if mmio[0] < 0 or mmio[1] < MIN_MMIO_SIZE:
        raise ConfigError(f"the device window needs {MIN_MMIO_SIZE:#x} bytes at least")
    tables: list[tuple[int, bytes]] = []
    free = gpa

    def place(table: bytes) -> int:
        nonlocal free
        where = free
        tables.append((where, table))
        free = -(-(where + len(table)) // ALIGNMENT) * ALIGNMENT
        return where

    # The RSDP comes first and points at the last; its size is known.
    free += ALIGNMENT
    fadt = _fadt(place(_facs()), place(_dsdt(mmio)))
    listed = [place(fadt), place(_madt(vp_count))]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    tables.insert(0, (gpa, _rsdp(xsdt)))
    if free > TABLES_END:
        raise ConfigError(f"ACPI tables at {gpa:#x} do not fit below {TABLES_END:#x}")
    return tables, gpa
