"""pcapng: blocks written and read, in both byte orders, and what is none."""

from __future__ import annotations

import io
import struct

import pytest

from vmbus.errors import TraceCutError, TraceError
from vmbus.trace import pcapng
from vmbus.trace.pcapng import (
    INBOUND,
    OUTBOUND,
    Block,
    blocks_untrusted,
    pack_interface,
    pack_packet,
    pack_section,
    parse_interface_untrusted,
    parse_packet_untrusted,
    parse_section_untrusted,
    parse_simple_untrusted,
    text_option,
)

SECTION = pack_section([text_option(pcapng.SECTION_HARDWARE, "alice")])
INTERFACE = pack_interface(147, [text_option(pcapng.INTERFACE_NAME, "vmbus:control")])


def blocks(data: bytes) -> list[Block]:
    return list(blocks_untrusted(io.BytesIO(data)))


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + length + body + length


def section(order: str, major: int = 1) -> bytes:
    body = struct.pack(f"{order}IHHQ", pcapng.BYTE_ORDER_MAGIC, major, 0, 2**64 - 1)
    return block(order, pcapng.SECTION, body)


@pytest.mark.parametrize("size", range(9))
@pytest.mark.parametrize("comment", [b"", b"c", b"comment", "grüße".encode()])
@pytest.mark.parametrize("flags", [0, INBOUND, OUTBOUND])
def test_a_packet_is_read_as_it_was_written(size, comment, flags):
    data = bytes(range(size))
    file = SECTION + INTERFACE + pack_packet(
        7, 0x123456789ABCDEF0, data, length=size + 5, flags=flags, comment=comment
    )  # fmt: skip
    _, _, found = blocks(file)
    packet = parse_packet_untrusted(found)
    assert tuple(packet) == (7, 0x123456789ABCDEF0, data, size + 5, flags, comment.decode())
    assert packet.direction == flags


def test_what_sections_and_interfaces_say_is_read_as_it_was_written():
    one, other = blocks(SECTION + INTERFACE)
    assert parse_section_untrusted(one) == {pcapng.SECTION_HARDWARE: "alice"}
    assert parse_interface_untrusted(other) == (147, "vmbus:control", "", 10**9, 0)
    assert other.position == len(SECTION)


def test_text_is_cut_where_a_character_ends():
    _, data = text_option(1, "ü" * pcapng.MAX_COMMENT)
    assert data.decode() == "ü" * (pcapng.MAX_COMMENT // 2)


@pytest.mark.parametrize("order", "<>")
def test_both_byte_orders_are_read(order):
    options = struct.pack(f"{order}HH4sHHB3xHHqHH", 2, 4, b"eth0", 9, 1, 6, 14, 8, -5, 0, 0)
    interface = struct.pack(f"{order}HHI", 1, 0, 0) + options
    packet = struct.pack(f"{order}IIIII4s", 0, 1, 2, 3, 60, b"abc\0")
    packet += struct.pack(f"{order}HHIHH", pcapng.PACKET_FLAGS, 4, OUTBOUND, 0, 0)
    simple = struct.pack(f"{order}I", 9) + b"123456789"
    file = b"".join((
        section(order), block(order, pcapng.INTERFACE, interface),
        block(order, pcapng.PACKET, packet), block(order, pcapng.SIMPLE_PACKET, simple),
    ))  # fmt: skip
    _, one, two, three = blocks(file)
    assert parse_interface_untrusted(one) == (1, "eth0", "", 10**6, -5)
    assert parse_packet_untrusted(two) == (0, 1 << 32 | 2, b"abc", 60, OUTBOUND, "")
    assert parse_simple_untrusted(three).data == b"123456789"


def test_the_byte_order_is_each_sections_own():
    file = section("<") + section(">") + section("<")
    assert [each.order for each in blocks(file)] == ["<", ">", "<"]


def test_times_may_count_in_powers_of_two():
    options = struct.pack("<HHB3xHH", 9, 1, 0x80 | 20, 0, 0)
    data = struct.pack("<HHI", 1, 0, 0) + options
    assert parse_interface_untrusted(Block(0, 1, "<", data)).ticks_per_second == 1 << 20


def test_blocks_that_are_of_no_use_are_skipped():
    foreign = block("<", 0xBAD, bytes(100))
    kinds = [each.kind for each in blocks(section("<") + foreign + section("<"))]
    assert kinds == [pcapng.SECTION, pcapng.SECTION]


@pytest.mark.parametrize("size", range(1, len(SECTION + INTERFACE)))
def test_a_file_that_ends_within_a_block_says_where(size):
    file = (SECTION + INTERFACE)[:size]
    if size == len(SECTION):
        assert len(blocks(file)) == 1
        return
    with pytest.raises(TraceCutError) as error:
        blocks(file)
    assert error.value.position == (0 if size < len(SECTION) else len(SECTION))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (bytes.fromhex("d4c3b2a1") + bytes(20), "older pcap format"),
        (b"\x1f\x8b" + bytes(20), "compressed"),
        (b"hello world!", "no pcapng file"),
        (block("<", 6, bytes(20)), "no pcapng file"),
        (block("<", pcapng.SECTION, bytes(16)), "without a byte order"),
        (SECTION + struct.pack("<II", 6, 11), "a block of 11 bytes"),
        (SECTION + struct.pack("<II", 6, 33), "a block of 33 bytes"),
        (SECTION + struct.pack("<II", 6, pcapng.MAX_BLOCK + 4), "are possible"),
        (SECTION + block("<", 6, bytes(20))[:-4] + b"\x24\0\0\0", "not so at its end"),
    ],
)
def test_what_is_no_block_is_said_with_its_position(data, text):
    with pytest.raises(TraceError, match=text) as error:
        blocks(data)
    assert error.value.position == (len(SECTION) if data.startswith(SECTION) else 0)


@pytest.mark.parametrize(
    ("parse", "data", "text"),
    [
        (parse_section_untrusted, bytes(12), "less than 16"),
        (parse_section_untrusted, section("<", major=2)[8:-4], "version 2"),
        (parse_interface_untrusted, bytes(7), "less than 8"),
        (parse_packet_untrusted, bytes(16), "less than 32"),
        (parse_packet_untrusted, struct.pack("<IIIII", 0, 0, 0, 9, 9) + bytes(8), "of 9 bytes"),
        (parse_simple_untrusted, bytes(3), "less than 16"),
    ],
)
def test_a_block_too_short_for_what_it_says_is_an_error(parse, data, text):
    with pytest.raises(TraceError, match=text) as error:
        parse(Block(77, 6, "<", data))
    assert error.value.position == 77


def test_options_behind_a_broken_one_are_not_looked_for():
    options = struct.pack("<HHIHH", pcapng.PACKET_FLAGS, 4, INBOUND, pcapng.COMMENT, 9999)
    packet = struct.pack("<IIIII", 0, 0, 0, 0, 0) + options + b"what"
    assert parse_packet_untrusted(Block(0, 6, "<", packet)).flags == INBOUND
