"""Load Linux: the 64-bit boot protocol.

Source: linux/Documentation/arch/x86/boot.rst and zero-page.rst. The kernel's file is the
operator's, not the guest's, but it is checked as strictly: whatever is in it, either
:class:`vmbus.errors.ConfigError` says what is wrong or the guest gets exactly what the protocol
promises.

Guest memory after loading::

    0x00500  GDT
    0x07000  zero page ("boot_params")
    0x08000  stack (one page; Linux takes its own at once)
    0x09000  page tables: the first 4 GiB mapped to themselves
    0x20000  command line
    0x9FC00  end of low memory
    0xE0000  ACPI tables
    pref_address or above    the kernel, with init_size bytes to itself
    as high as it may be     the initrd
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmbus.errors import ConfigError
from vmbus.kvm import acpi

PAGE_SIZE = 4096
GDT_GPA = 0x500
ZERO_PAGE_GPA = 0x7000
STACK_TOP_GPA = 0x9000
PAGE_TABLES_GPA = 0x9000
COMMAND_LINE_GPA = 0x20000
LOW_MEMORY_END = 0x9FC00
HIGH_MEMORY = 0x100000
DEVICE_HOLE = 0xFEC00000
"""From here to 4 GiB are APICs and firmware, never memory."""
FOUR_GIB = 1 << 32

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
ENTRY_OFFSET = 0x200

# The setup header, by offset in the file and, the same, in the zero page.
_HEADER_START = 0x1F1
_HEADER_MIN_END = 0x268  # as far as protocol 2.12 goes
_JUMP = 0x200
_HEADER_BASE = 0x202
_SECTOR = 512
_DEFAULT_SETUP_SECTORS = 4
_MIN_PROTOCOL = 0x20C
_LOADED_HIGH = 0x01
_KERNEL_64 = 0x01
_VERSION_MAX = 256

_ACPI_RSDP = 0x070
_EXT_RAMDISK_IMAGE = 0x0C0
_EXT_RAMDISK_SIZE = 0x0C4
_E820_COUNT = 0x1E8
_TYPE_OF_LOADER = 0x210
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_E820_TABLE = 0x2D0
_E820_MAX = 128
_E820_RAM = 1
_E820_RESERVED = 2
_UNDEFINED_LOADER = 0xFF

_GDT = struct.pack(
    "<4Q",
    0,
    0,
    0x00AF9B000000FFFF,  # 64-bit code
    0x00CF93000000FFFF,  # flat data
)
_PRESENT_WRITABLE = 0x003
_LARGE_PAGE = 0x083
_LARGE_PAGE_SIZE = 2 << 20

_CR0 = 0x80000031  # paging, numeric errors, extension type, protected mode
_CR4_PAE = 0x20
_EFER_LONG_MODE = 0x500  # enabled and active
_RFLAGS = 0x2  # interrupts off


class Memory(Protocol):
    """What the loader needs of guest memory."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to guest physical address ``gpa``."""


@dataclass(frozen=True)
class EntryState:
    """How the first processor starts; the others wait for their start-up interrupt.

    All segments are flat: code 64 bit with ``code_selector``, DS, ES and SS with
    ``data_selector``. Addresses are guest physical and linear at once.
    """

    rip: int
    rsi: int
    """The zero page."""
    rsp: int
    cr3: int
    gdt_base: int = GDT_GPA
    gdt_limit: int = len(_GDT) - 1
    rflags: int = _RFLAGS
    cr0: int = _CR0
    cr4: int = _CR4_PAE
    efer: int = _EFER_LONG_MODE
    code_selector: int = CODE_SELECTOR
    data_selector: int = DATA_SELECTOR


@dataclass(frozen=True)
class BzImage:
    """A kernel file, checked."""

    protocol: int
    """Version of the boot protocol: 0x20C is 2.12."""
    version: str
    """What the kernel calls itself; empty if it does not say."""
    header: bytes
    """The setup header, from offset 0x1F1."""
    payload: memoryview
    """What is loaded."""
    relocatable: bool
    alignment: int
    """Bytes, a power of two: where a relocatable kernel may be."""
    pref_address: int
    init_size: int
    """Bytes that the kernel needs from its load address on, until it knows its memory map."""
    initrd_addr_max: int
    """Highest address of the last byte of the initrd."""
    cmdline_size: int
    """Bytes of command line, its end mark not counted."""


def parse_bzimage(image: bytes) -> BzImage:
    """Check a kernel file and find the values that loading needs.

    Raises:
        ConfigError: It is not a bzImage, is too old, is not 64 bit, is cut short, or says
            something about itself that cannot be.
    """
    if len(image) < _HEADER_BASE + 4 or image[0x202:0x206] != b"HdrS":
        raise ConfigError("the kernel is not a Linux bzImage: no setup header")
    if image[0x1FE:0x200] != b"\x55\xaa":
        raise ConfigError("the kernel is not a Linux bzImage: no boot flag")
    # The header ends where the short jump at its middle leads; a jump goes forward 127 at most.
    end = _HEADER_BASE + image[_JUMP + 1]
    if image[_JUMP] != 0xEB or end > _HEADER_BASE + 0x7F or end > len(image):
        raise ConfigError("the kernel's setup header has no valid end")
    (protocol,) = struct.unpack_from("<H", image, 0x206)
    if protocol < _MIN_PROTOCOL:
        raise ConfigError(
            f"the kernel speaks boot protocol {protocol >> 8}.{protocol & 0xFF:02}; "
            "2.12 or newer is needed (Linux 3.8)"
        )
    if end < _HEADER_MIN_END:
        raise ConfigError("the kernel's setup header is shorter than its protocol version says")
    setup_sectors = image[0x1F1] or _DEFAULT_SETUP_SECTORS
    (syssize,) = struct.unpack_from("<I", image, 0x1F4)
    loadflags = image[0x211]
    initrd_addr_max, alignment = struct.unpack_from("<II", image, 0x22C)
    relocatable = bool(image[0x234])
    xloadflags, cmdline_size = struct.unpack_from("<HI", image, 0x236)
    pref_address, init_size = struct.unpack_from("<QI", image, 0x258)

    if not loadflags & _LOADED_HIGH:
        raise ConfigError("the kernel is a zImage, to be loaded low; a bzImage is needed")
    if not xloadflags & _KERNEL_64:
        raise ConfigError("the kernel has no 64-bit entry point: it is a 32-bit kernel")
    setup_size = (setup_sectors + 1) * _SECTOR
    if syssize == 0 or setup_size + 16 * syssize > len(image):
        raise ConfigError(
            f"the kernel is cut short: {setup_size + 16 * syssize} bytes by its header, "
            f"{len(image)} in the file"
        )
    if alignment & (alignment - 1) or alignment < PAGE_SIZE:
        raise ConfigError(f"the kernel's alignment, {alignment:#x}, is not a power of two")
    if 16 * syssize > init_size:
        raise ConfigError("the kernel needs less memory than it is long")
    if pref_address < HIGH_MEMORY or pref_address + init_size > FOUR_GIB:
        raise ConfigError(
            f"the kernel wants to be at {pref_address:#x}: not between 1 MiB and 4 GiB"
        )
    return BzImage(
        protocol=protocol,
        version=_version(image, setup_size),
        header=bytes(image[_HEADER_START:end]),
        # Newer kernels round syssize down; what signing tools append does no harm.
        payload=memoryview(image)[setup_size : setup_size + init_size],
        relocatable=relocatable,
        alignment=alignment,
        pref_address=pref_address,
        init_size=init_size,
        initrd_addr_max=initrd_addr_max,
        cmdline_size=cmdline_size,
    )


def _version(image: bytes, setup_size: int) -> str:
    (offset,) = struct.unpack_from("<H", image, 0x20E)
    if offset == 0:
        return ""
    start = _JUMP + offset
    text = image[start : min(start + _VERSION_MAX, setup_size)]
    return bytes(text).partition(b"\0")[0].decode("ascii", "replace")


# -- placing ---------------------------------------------------------------------------------------


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _merge(ram_regions: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return memory as (start, end), sorted, neighbours joined. Raises ConfigError."""
    merged: list[tuple[int, int]] = []
    for gpa, size in sorted(ram_regions):
        end = gpa + size
        if gpa % PAGE_SIZE or size % PAGE_SIZE or gpa < 0 or size <= 0:
            raise ConfigError("memory regions must be whole pages")
        if merged and gpa < merged[-1][1]:
            raise ConfigError(f"memory regions overlap at {gpa:#x}")
        if gpa < FOUR_GIB and end > DEVICE_HOLE:
            raise ConfigError(f"no memory is possible between {DEVICE_HOLE:#x} and 4 GiB")
        if merged and gpa == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((gpa, end))
    if not merged or merged[0][0] != 0 or merged[0][1] < HIGH_MEMORY:
        raise ConfigError("the first MiB must be memory")
    return merged


def _place_kernel(image: BzImage, ram: list[tuple[int, int]]) -> int:
    """Return the load address: the preferred one, else the next that is free."""
    for start, end in ram:
        where = image.pref_address
        if image.relocatable:
            where = _align(max(where, start), image.alignment)
        if start <= where and where + image.init_size <= min(end, FOUR_GIB):
            return where
    raise ConfigError(
        f"not enough memory for the kernel: {image.init_size:#x} bytes in one piece at "
        f"{image.pref_address:#x}" + (" or above" if image.relocatable else "")
    )


def _place_initrd(size: int, image: BzImage, kernel: int, ram: list[tuple[int, int]]) -> int:
    """Return the highest address where the kernel may find it and not run over it."""
    limit = min(image.initrd_addr_max + 1, FOUR_GIB)
    for start, end in reversed(ram):
        low, high = max(start, HIGH_MEMORY), min(end, limit)
        # Above the kernel, then below it; one of the two when the kernel is elsewhere.
        for bottom, top in (
            (max(low, kernel + image.init_size), high),
            (low, min(high, kernel)),
        ):
            where = (top - size) // PAGE_SIZE * PAGE_SIZE
            if where >= bottom:
                return where
    raise ConfigError(f"not enough memory for an initrd of {size} bytes beside the kernel")


# -- loading ---------------------------------------------------------------------------------------


def _page_tables() -> bytes:
    """Return the tables for PAGE_TABLES_GPA: one of level 4, one of level 3, four of level 2."""
    level_3 = PAGE_TABLES_GPA + PAGE_SIZE
    level_2 = level_3 + PAGE_SIZE
    directories = FOUR_GIB >> 30
    return b"".join(
        (
            struct.pack("<Q", level_3 | _PRESENT_WRITABLE).ljust(PAGE_SIZE, b"\0"),
            struct.pack(
                f"<{directories}Q",
                *(level_2 + each * PAGE_SIZE | _PRESENT_WRITABLE for each in range(directories)),
            ).ljust(PAGE_SIZE, b"\0"),
            struct.pack(
                f"<{directories * 512}Q",
                *(each | _LARGE_PAGE for each in range(0, FOUR_GIB, _LARGE_PAGE_SIZE)),
            ),
        )
    )


def write_tables(memory: Memory) -> None:
    """Write what 64-bit mode begins with: the GDT, and the first 4 GiB mapped to themselves."""
    memory.write(GDT_GPA, _GDT)
    memory.write(PAGE_TABLES_GPA, _page_tables())


def _memory_map(ram: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (start, end, type): memory, with the firmware's part of the first MiB taken out."""
    entries = [
        (0, LOW_MEMORY_END, _E820_RAM),
        (LOW_MEMORY_END, HIGH_MEMORY, _E820_RESERVED),
    ]
    for start, end in ram:
        if end > HIGH_MEMORY:
            entries.append((max(start, HIGH_MEMORY), end, _E820_RAM))
    if len(entries) > _E820_MAX:
        raise ConfigError(f"{len(entries)} pieces of memory: the memory map holds {_E820_MAX}")
    return entries


def _zero_page(
    image: BzImage, initrd: tuple[int, int], rsdp: int, memory_map: list[tuple[int, int, int]]
) -> bytes:
    page = bytearray(PAGE_SIZE)
    page[_HEADER_START : _HEADER_START + len(image.header)] = image.header
    where, size = initrd
    for offset, kind, value in (
        (_ACPI_RSDP, "Q", rsdp),
        (_EXT_RAMDISK_IMAGE, "I", where >> 32),
        (_EXT_RAMDISK_SIZE, "I", size >> 32),
        (_E820_COUNT, "B", len(memory_map)),
        (_TYPE_OF_LOADER, "B", _UNDEFINED_LOADER),
        (_RAMDISK_IMAGE, "I", where & 0xFFFFFFFF),
        (_RAMDISK_SIZE, "I", size & 0xFFFFFFFF),
        (_CMD_LINE_PTR, "I", COMMAND_LINE_GPA),
    ):
        struct.pack_into("<" + kind, page, offset, value)
    for index, (start, end, kind_of_memory) in enumerate(memory_map):
        entry = struct.pack("<QQI", start, end - start, kind_of_memory)
        offset = _E820_TABLE + index * len(entry)
        page[offset : offset + len(entry)] = entry
    return bytes(page)


def load_linux(
    memory: Memory,
    kernel: bytes,
    *,
    cmdline: str,
    initrd: bytes = b"",
    ram_regions: Sequence[tuple[int, int]],
    vp_count: int = 1,
) -> EntryState:
    """Put a kernel and all it needs to start into guest memory. Also after a reset.

    Args:
        memory: Guest memory; covers ``ram_regions``.
        kernel: A bzImage.
        cmdline: The kernel's command line.
        initrd: The initial RAM disk; empty for none.
        ram_regions: (guest physical address, size) of all memory, in whole pages.
        vp_count: Processors, for the ACPI tables.

    Returns:
        Where and how the first processor starts.

    Raises:
        ConfigError: The kernel is not usable, or does not fit; nothing has been written.
    """
    image = parse_bzimage(kernel)
    ram = _merge(ram_regions)
    command = cmdline.encode()
    room = min(image.cmdline_size, LOW_MEMORY_END - COMMAND_LINE_GPA - 1)
    if len(command) > room:
        raise ConfigError(f"the command line has {len(command)} bytes; the kernel takes {room}")
    if b"\0" in command:
        raise ConfigError("the command line contains a NUL character")
    where = _place_kernel(image, ram)
    place = _place_initrd(len(initrd), image, where, ram) if initrd else 0
    memory_map = _memory_map(ram)
    tables, rsdp = acpi.build_tables(vp_count, mmio=acpi.mmio_window(ram_regions))

    memory.write(ZERO_PAGE_GPA, _zero_page(image, (place, len(initrd)), rsdp, memory_map))
    write_tables(memory)
    memory.write(COMMAND_LINE_GPA, command + b"\0")
    for gpa, table in tables:
        memory.write(gpa, table)
    memory.write(where, image.payload)
    if initrd:
        memory.write(place, initrd)
    return EntryState(
        rip=where + ENTRY_OFFSET, rsi=ZERO_PAGE_GPA, rsp=STACK_TOP_GPA, cr3=PAGE_TABLES_GPA
    )
