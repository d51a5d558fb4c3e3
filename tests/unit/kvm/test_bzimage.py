"""Loading Linux: synthetic kernels, every refusal, and what is in memory afterwards."""

import contextlib
import struct

import pytest
from hypothesis import given, strategies as st

from vmbus.errors import ConfigError
from vmbus.kvm import acpi, bzimage
from vmbus.kvm.bzimage import load_linux, parse_bzimage

MIB = 1 << 20
GIB = 1 << 30
RAM = [(0, GIB)]

# offset, kind, value: a kernel of one setup sector (and the boot sector) and one MiB of payload.
FIELDS = {
    "setup_sects": (0x1F1, "B", 1),
    "syssize": (0x1F4, "I", MIB // 16),
    "boot_flag": (0x1FE, "H", 0xAA55),
    "jump": (0x200, "B", 0xEB),
    "jump_length": (0x201, "B", 0x6A),
    "magic": (0x202, "4s", b"HdrS"),
    "protocol": (0x206, "H", 0x20F),
    "kernel_version": (0x20E, "H", 0x100),
    "loadflags": (0x211, "B", 0x01),
    "initrd_addr_max": (0x22C, "I", 0x7FFFFFFF),
    "kernel_alignment": (0x230, "I", 2 * MIB),
    "relocatable_kernel": (0x234, "B", 1),
    "xloadflags": (0x236, "H", 0x01),
    "cmdline_size": (0x238, "I", 2047),
    "pref_address": (0x258, "Q", 16 * MIB),
    "init_size": (0x260, "I", 8 * MIB),
}
HEADER_END = 0x202 + 0x6A
PAYLOAD = bytes(range(256)) * (MIB // 256)


def kernel(*, payload=PAYLOAD, version=b"6.1.0-test (us@here) #1\0", **changes):
    """Return a kernel file; keyword arguments replace values of the header."""
    setup = bytearray(1024)
    setup[0x300 : 0x300 + len(version)] = version
    for name, (offset, kind, value) in FIELDS.items():
        struct.pack_into("<" + kind, setup, offset, changes.pop(name, value))
    assert not changes
    return bytes(setup) + payload


class Memory:
    """Sparse memory that knows what has been written to it."""

    def __init__(self):
        self.pieces = {}

    def write(self, gpa, data):
        for other, bytes_there in self.pieces.items():
            assert gpa + len(data) <= other or other + len(bytes_there) <= gpa, "pieces overlap"
        self.pieces[gpa] = bytes(data)

    def read(self, gpa, kind):
        page = self.pieces[gpa & ~0xFFF]
        return struct.unpack_from("<" + kind, page, gpa & 0xFFF)[0]


def load(image=None, *, memory=None, **options):
    memory = memory or Memory()
    options = {"cmdline": "console=ttyS0", "ram_regions": RAM, **options}
    return memory, load_linux(memory, image or kernel(), **options)


# -- the file --------------------------------------------------------------------------------------


def test_a_kernel_is_understood():
    image = parse_bzimage(kernel())
    assert image.protocol == 0x20F
    assert image.version == "6.1.0-test (us@here) #1"
    assert image.payload == PAYLOAD
    assert len(image.header) == HEADER_END - 0x1F1
    assert (image.relocatable, image.alignment) == (True, 2 * MIB)
    assert (image.pref_address, image.init_size) == (16 * MIB, 8 * MIB)
    assert (image.initrd_addr_max, image.cmdline_size) == (0x7FFFFFFF, 2047)


def test_no_setup_sectors_means_four():
    image = kernel(payload=bytes(3 * 512) + PAYLOAD, setup_sects=0)
    assert parse_bzimage(image).payload == PAYLOAD


def test_what_is_appended_to_a_kernel_is_loaded_as_far_as_there_is_room():
    assert parse_bzimage(kernel() + b"signature").payload == PAYLOAD + b"signature"
    image = parse_bzimage(kernel(init_size=MIB) + b"signature")
    assert image.payload == PAYLOAD


@pytest.mark.parametrize(
    ("offset", "text", "found"),
    [
        (0, b"unused", ""),
        (0x100, b"no end mark", "no end mark"),
        (0x100, b"\xffx\0", "\N{REPLACEMENT CHARACTER}x"),
        (0x1F0, b"", ""),
        (0xFFFF, b"", ""),
    ],
)
def test_a_version_is_found_wherever_it_may_be(offset, text, found):
    image = parse_bzimage(kernel(kernel_version=offset, version=text))
    assert image.version.rstrip("\0") == found


def test_a_version_does_not_reach_into_the_payload():
    image = kernel(kernel_version=0x1F0, version=b"", payload=b"X" * MIB)
    assert parse_bzimage(image[:0x3F0] + b"Y" * 16 + image[0x400:]).version == "Y" * 16


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"", "no setup header"),
        (b"\x7fELF" + bytes(2000), "no setup header"),
        (kernel()[:0x205], "no setup header"),
        (kernel(magic=b"HdrX"), "no setup header"),
        (kernel(boot_flag=0), "no boot flag"),
        (kernel(jump=0xE9), "no valid end"),
        (kernel(jump_length=0x80), "no valid end"),
        (kernel()[:0x220], "no valid end"),
        (kernel(protocol=0x20B), "speaks boot protocol 2.11; 2.12 or newer"),
        (kernel(jump_length=0x65), "shorter than its protocol version"),
        (kernel(loadflags=0), "zImage"),
        (kernel(xloadflags=0xFFFE), "32-bit kernel"),
        (kernel()[:-1], "cut short: 1049600 bytes by its header, 1049599 in the file"),
        (kernel(syssize=0), "cut short"),
        (kernel(syssize=0xFFFFFFFF), "cut short"),
        (kernel(kernel_alignment=0), "alignment"),
        (kernel(kernel_alignment=3 * MIB), "alignment"),
        (kernel(kernel_alignment=16), "alignment"),
        (kernel(init_size=MIB - 1), "less memory than it is long"),
        (kernel(pref_address=MIB - 1), "not between 1 MiB and 4 GiB"),
        (kernel(pref_address=0xFF900000), "not between 1 MiB and 4 GiB"),
    ],
)
def test_a_file_that_cannot_be_booted_is_refused_with_the_reason(image, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_bzimage(image)


@given(st.binary(max_size=2048))
def test_arbitrary_bytes_raise_only_config_error(data):
    for image in (data, kernel()[:0x1F1] + data, kernel()[:0x206] + data):
        with contextlib.suppress(ConfigError):
            parse_bzimage(image)


@given(st.binary(min_size=0x6A, max_size=0x6A), st.integers(0, 2**32 - 1), st.integers(0, GIB))
def test_a_kernel_with_any_header_is_refused_or_loaded_within_memory(header, scribble, size):
    """Whatever the header says, every piece lies in memory and none on another."""
    image = bytearray(kernel())
    # Keep what is checked first, so that the search gets beyond it.
    image[0x212:HEADER_END] = header[: HEADER_END - 0x212]
    image[0x236] |= 1
    struct.pack_into("<I", image, 0x230, 1 << 12 + scribble % 20)
    struct.pack_into("<Q", image, 0x258, scribble)
    regions = [(0, MIB + (size & ~0xFFF)), (4 * GIB, GIB)]
    memory = Memory()
    try:
        load(bytes(image), memory=memory, ram_regions=regions, initrd=b"i" * 5000)
    except ConfigError:
        assert not memory.pieces
        return
    for gpa, data in memory.pieces.items():
        assert any(start <= gpa and gpa + len(data) <= start + length for start, length in regions)


# -- what is in memory -----------------------------------------------------------------------------


def test_the_kernel_goes_where_it_prefers_to_be():
    memory, entry = load()
    assert memory.pieces[16 * MIB] == PAYLOAD
    assert entry.rip == 16 * MIB + 0x200


def test_the_first_processor_starts_as_the_protocol_says():
    memory, entry = load()
    assert entry.rsi == bzimage.ZERO_PAGE_GPA
    assert entry.cr0 & 0x80000001 == 0x80000001
    assert entry.cr4 & 0x20
    assert entry.efer == 0x500
    assert not entry.rflags & 1 << 9
    assert (entry.code_selector, entry.data_selector) == (0x10, 0x18)
    gdt = memory.pieces[entry.gdt_base]
    assert len(gdt) == entry.gdt_limit + 1
    code, data = struct.unpack_from("<QQ", gdt, 0x10)
    # Present, code, executable and readable, long; present, data, writable.
    assert code >> 40 & 0x9A == 0x9A
    assert code >> 53 & 3 == 1
    assert data >> 40 & 0x9A == 0x92
    assert code & 0xFFFF == data & 0xFFFF == 0xFFFF


@pytest.mark.parametrize(
    "address", [0, bzimage.ZERO_PAGE_GPA, 16 * MIB + 0x234567, GIB - 1, 3 * GIB + 5, 4 * GIB - 1]
)
def test_the_page_tables_map_the_first_4_gib_to_themselves(address):
    memory, entry = load()
    whole = memory.pieces[entry.cr3]

    def step(table, index):
        assert 0 <= table - entry.cr3 < len(whole)
        return struct.unpack_from("<Q", whole, table - entry.cr3 + 8 * index)[0]

    table = entry.cr3
    for shift in (39, 30):
        item = step(table, address >> shift & 511)
        assert item & 3 == 3
        assert not item & 0x80
        table = item & ~0xFFF
    page = step(table, address >> 21 & 511)
    assert page & 0x83 == 0x83
    assert (page & ~0x1FFFFF) | address & 0x1FFFFF == address
    # Beyond 4 GiB there is nothing.
    assert step(entry.cr3, 1) == 0
    assert step(step(entry.cr3, 0) & ~0xFFF, 4) == 0


def test_the_zero_page_carries_the_header_and_what_the_loader_adds():
    image = kernel()
    memory, entry = load(image)
    page = memory.pieces[entry.rsi]
    assert len(page) == 4096
    kept = bytearray(page[0x1F1:HEADER_END])
    for offset, length in ((0x210, 1), (0x228, 4)):
        start = offset - 0x1F1
        kept[start : start + length] = image[offset : offset + length]
    assert kept == image[0x1F1:HEADER_END]
    assert page[0x210] == 0xFF
    assert memory.read(entry.rsi + 0x228, "I") == bzimage.COMMAND_LINE_GPA
    assert memory.pieces[bzimage.COMMAND_LINE_GPA] == b"console=ttyS0\0"
    assert memory.read(entry.rsi + 0x218, "Q") == 0  # no initrd
    assert memory.read(entry.rsi + 0x0C0, "Q") == 0


def test_the_acpi_tables_are_there_and_pointed_to():
    memory, entry = load(vp_count=3)
    rsdp = memory.read(entry.rsi + 0x70, "Q")
    assert memory.pieces[rsdp].startswith(b"RSD PTR ")
    tables, where = acpi.build_tables(3, mmio=acpi.mmio_window(RAM))
    assert where == rsdp
    assert all(memory.pieces[gpa] == table for gpa, table in tables)


def memory_map(memory, entry):
    page = memory.pieces[entry.rsi]
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * each) for each in range(page[0x1E8])]


def test_the_memory_map_leaves_out_the_firmwares_part_of_the_first_mib():
    memory, entry = load(ram_regions=[(4 * GIB, GIB), (GIB, GIB), (0, GIB)])
    assert memory_map(memory, entry) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (MIB, 2 * GIB - MIB, 1),
        (4 * GIB, GIB, 1),
    ]
    for gpa, table in acpi.build_tables(254, mmio=acpi.mmio_window(RAM))[0]:
        assert gpa >= 0x9FC00
        assert gpa + len(table) <= MIB


def test_memory_may_end_with_the_first_mib_and_go_on_elsewhere():
    memory, entry = load(ram_regions=[(0, MIB), (16 * MIB, 64 * MIB)])
    assert memory_map(memory, entry)[2:] == [(16 * MIB, 64 * MIB, 1)]
    assert entry.rip == 16 * MIB + 0x200


def test_loading_again_after_a_reset_gives_the_same():
    first, entry = load(initrd=b"i" * 10000)
    second, again = load(initrd=b"i" * 10000)
    assert first.pieces == second.pieces
    assert entry == again


# -- placing ---------------------------------------------------------------------------------------


def test_the_initrd_is_as_high_as_it_may_be_and_page_aligned():
    initrd = b"initrd" * 1000
    for limit, top in ((0x7FFFFFFF, GIB), (0x37FFFFFF, 0x38000000), (0x37FFF123, 0x37FFF124)):
        memory, entry = load(kernel(initrd_addr_max=limit), initrd=initrd)
        where = memory.read(entry.rsi + 0x218, "I")
        assert where == (top - len(initrd)) & ~0xFFF
        assert memory.read(entry.rsi + 0x21C, "I") == len(initrd)
        assert memory.pieces[where] == initrd


def test_the_initrd_goes_below_the_kernel_if_there_is_no_room_above():
    memory, entry = load(initrd=b"i" * 5000, ram_regions=[(0, 24 * MIB)])
    assert memory.read(entry.rsi + 0x218, "I") == 16 * MIB - 8192


def test_the_initrd_goes_into_a_lower_piece_of_memory_if_the_higher_is_too_small():
    regions = [(0, 64 * MIB), (128 * MIB, 4096), (5 * GIB, GIB)]
    memory, entry = load(initrd=b"i" * 5000, ram_regions=regions)
    assert memory.read(entry.rsi + 0x218, "I") == 64 * MIB - 8192


def test_a_relocatable_kernel_goes_to_the_next_aligned_place_with_room():
    regions = [(0, 20 * MIB), (33 * MIB, 64 * MIB)]
    assert load(ram_regions=regions)[1].rip == 34 * MIB + 0x200
    _, entry = load(kernel(pref_address=17 * MIB), ram_regions=RAM)
    assert entry.rip == 18 * MIB + 0x200


def test_a_kernel_that_cannot_move_is_loaded_where_it_wants_or_not_at_all():
    fixed = kernel(relocatable_kernel=0, pref_address=17 * MIB)
    assert load(fixed)[1].rip == 17 * MIB + 0x200
    with pytest.raises(ConfigError, match=r"in one piece at 0x1100000$"):
        load(fixed, ram_regions=[(0, 20 * MIB), (33 * MIB, 64 * MIB)])


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cmdline": "x" * 2048}, "2048 bytes; the kernel takes 2047"),
        ({"cmdline": "a\0b"}, "NUL"),
        ({"vp_count": 0}, "0 processors"),
        ({"vp_count": 255}, "255 processors"),
        ({"ram_regions": []}, "first MiB"),
        ({"ram_regions": [(MIB, GIB)]}, "first MiB"),
        ({"ram_regions": [(0, MIB // 2), (MIB, GIB)]}, "first MiB"),
        ({"ram_regions": [(0, GIB), (GIB - 4096, GIB)]}, "overlap at 0x3ffff000"),
        ({"ram_regions": [(0, GIB + 1)]}, "whole pages"),
        ({"ram_regions": [(0, GIB), (GIB, 0)]}, "whole pages"),
        ({"ram_regions": [(-4096, GIB)]}, "whole pages"),
        ({"ram_regions": [(1, GIB)]}, "whole pages"),
        ({"ram_regions": [(0, 4 * GIB)]}, "between 0xfec00000 and 4 GiB"),
        ({"ram_regions": [(0, 20 * MIB)]}, "0x800000 bytes in one piece at 0x1000000 or above"),
        ({"ram_regions": [(0, 24 * MIB)], "initrd": bytes(15 * MIB + 1)}, "no[t]? enough memory"),
        (
            {"ram_regions": [(0, GIB)] + [(each * GIB, 4096) for each in range(4, 130)]},
            "129 pieces of memory",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(options, complaint):
    memory = Memory()
    with pytest.raises(ConfigError, match=complaint):
        load(memory=memory, **options)
    assert not memory.pieces


def test_a_command_line_ends_below_the_end_of_low_memory():
    generous = kernel(cmdline_size=0xFFFFFFFF)
    room = 0x9FC00 - bzimage.COMMAND_LINE_GPA - 1
    assert load(generous, cmdline="x" * room)
    with pytest.raises(ConfigError, match=f"takes {room}"):
        load(generous, cmdline="x" * (room + 1))
