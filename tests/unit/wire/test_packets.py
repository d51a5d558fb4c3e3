"""Ring packets: golden bytes, limits and refusals."""

from __future__ import annotations

import struct

import pytest

from vmbus.errors import GuestProtocolError
from vmbus.wire import gpa, packets as p


def test_golden_in_band_packet():
    packet = p.build_packet(
        p.IN_BAND, b"hello", transaction_id=0xFFFFFFFFFFFFFFFD, flags=p.FLAG_COMPLETION_REQUESTED
    )
    assert packet == bytes.fromhex("0600 0200 0300 0100 fdffffffffffffff 68656c6c6f 000000")
    assert p.parse_descriptor_untrusted(packet) == (6, 16, 24, 1, 0xFFFFFFFFFFFFFFFD)


def test_golden_transfer_page_packet():
    header = struct.pack("<HBBI", 0xCAFE, 0, 0, 2) + struct.pack("<IIII", 90, 0, 1514, 4096)
    packet = p.build_packet(p.TRANSFER_PAGES, bytes(40), transaction_id=1, header=header)
    assert packet[:40] == bytes.fromhex(
        "0700 0500 0a00 0000 0100000000000000 feca 00 00 02000000"
        "5a000000 00000000 ea050000 00100000"
    )
    assert p.parse_transfer_pages_untrusted(packet, 40, max_ranges=2) == (
        0xCAFE,
        [(90, 0), (1514, 4096)],
    )


def test_golden_gpa_direct_packet():
    ranges = gpa.build_range(8192, 512, (5, 9, 7))
    packet = p.build_packet(
        p.GPA_DIRECT,
        b"\xaa" * 64,
        transaction_id=2,
        flags=1,
        header=struct.pack("<II", 0xDEADBEEF, 1) + ranges,
    )
    assert packet[:56] == bytes.fromhex(
        "0900 0700 0f00 0100 0200000000000000 efbeadde 01000000"
        "00200000 00020000 0500000000000000 0900000000000000 0700000000000000"
    )
    assert p.parse_gpa_ranges_untrusted(packet, 56, max_ranges=1) == [
        gpa.GpaRange(8192, 512, (5, 9, 7))
    ]


@pytest.mark.parametrize("size", range(17))
def test_packets_are_padded_to_eight_bytes_with_zeros(size):
    packet = p.build_packet(p.COMPLETION, b"\xff" * size)
    assert len(packet) == 16 + (size + 7) // 8 * 8
    assert packet[16:] == b"\xff" * size + bytes(-size % 8)


def test_the_longest_packet_is_what_length8_can_say():
    packet = p.build_packet(p.IN_BAND, bytes(p.MAX_PACKET - 16))
    assert p.parse_descriptor_untrusted(packet)[2] == p.MAX_PACKET == len(packet) == 524_280
    with pytest.raises(ValueError, match="too long"):
        p.build_packet(p.IN_BAND, bytes(p.MAX_PACKET - 15))


def test_a_header_is_a_multiple_of_eight_bytes():
    with pytest.raises(ValueError, match="multiple of 8"):
        p.build_packet(p.IN_BAND, b"", header=bytes(7))


def test_packet_types_have_names():
    assert set(p.PACKET_NAMES) == p.PACKET_TYPES == {6, 7, 8, 9, 11}


@pytest.mark.parametrize("size", [0, 15])
def test_a_descriptor_has_16_bytes(size):
    with pytest.raises(GuestProtocolError) as caught:
        p.parse_descriptor_untrusted(bytes(size))
    assert caught.value.field == "length8"
    packet = p.build_packet(p.IN_BAND, b"")
    with pytest.raises(GuestProtocolError):
        p.parse_descriptor_untrusted(bytes(size) + packet, size + 1)
    assert p.parse_descriptor_untrusted(bytes(size) + packet, size)[0] == p.IN_BAND


@pytest.mark.parametrize(
    ("offset8", "length8", "good"),
    [
        (2, 2, True),
        (2, 0xFFFF, True),
        (0xFFFF, 0xFFFF, True),
        (0, 0, False),
        (1, 1, False),
        (1, 2, False),
        (0, 3, False),
        (3, 2, False),
        (0xFFFF, 0xFFFE, False),
    ],
)
def test_the_payload_begins_behind_the_descriptor_and_not_behind_the_packet(offset8, length8, good):
    data = struct.pack("<HHHHQ", 6, offset8, length8, 0, 0)
    if good:
        assert p.parse_descriptor_untrusted(data) == (6, offset8 * 8, length8 * 8, 0, 0)
    else:
        with pytest.raises(GuestProtocolError) as caught:
            p.parse_descriptor_untrusted(data)
        assert caught.value.field == "data_offset8"


# -- GPA-direct ------------------------------------------------------------------------------------


def direct(count: int, ranges: bytes) -> bytes:
    return bytes(16) + struct.pack("<II", 0, count) + ranges


ONE = gpa.build_range(4096, 0, (1,))


@pytest.mark.parametrize("count", [0, 3, 0xFFFF_FFFF])
def test_the_number_of_ranges_is_limited_before_any_is_parsed(count):
    data = direct(count, ONE * 3)
    with pytest.raises(GuestProtocolError) as caught:
        p.parse_gpa_ranges_untrusted(data, len(data), max_ranges=2)
    assert caught.value.field == "range_count"


def test_ranges_stop_where_the_payload_begins():
    data = direct(2, ONE * 2)
    assert len(p.parse_gpa_ranges_untrusted(data, 24 + 32, max_ranges=2)) == 2
    for end in (24 + 31, 24 + 24, 24 + 23, 24 + 16, 24 + 7, 24):
        with pytest.raises(GuestProtocolError):
            p.parse_gpa_ranges_untrusted(data + bytes(64), end, max_ranges=2)


@pytest.mark.parametrize("end", [0, 16, 23])
def test_a_header_without_room_for_a_count_is_refused(end):
    for parse in (p.parse_gpa_ranges_untrusted, p.parse_transfer_pages_untrusted):
        with pytest.raises(GuestProtocolError) as caught:
            parse(direct(1, ONE), end, max_ranges=1)
        assert caught.value.field == "data_offset8"
        with pytest.raises(GuestProtocolError) as caught:
            parse(direct(1, ONE)[:end], 4096, max_ranges=1)
        assert caught.value.field == "data_offset8"


def test_a_header_that_claims_to_end_behind_the_packet_ends_with_it():
    data = direct(2, ONE)
    with pytest.raises(GuestProtocolError):
        p.parse_gpa_ranges_untrusted(data, 4096, max_ranges=2)


def test_linux_may_send_ranges_of_length_zero():
    data = direct(3, gpa.build_range(0, 0, ()) + gpa.build_range(0, 8, (4,)) + ONE)
    found = p.parse_gpa_ranges_untrusted(data, len(data), max_ranges=3, allow_empty=True)
    assert found == [gpa.GpaRange(0, 0, ()), gpa.GpaRange(0, 8, (4,)), gpa.GpaRange(4096, 0, (1,))]
    with pytest.raises(GuestProtocolError) as caught:
        p.parse_gpa_ranges_untrusted(data, len(data), max_ranges=3)
    assert caught.value.field == "byte_count"


# -- transfer pages --------------------------------------------------------------------------------


def transfer(count: int, ranges: bytes = b"") -> bytes:
    return bytes(16) + struct.pack("<HBBI", 5, 1, 0xEE, count) + ranges


def test_a_transfer_page_packet_may_have_no_range():
    assert p.parse_transfer_pages_untrusted(transfer(0), 24, max_ranges=0) == (5, [])


def test_transfer_ranges_have_to_fit_before_the_payload_and_into_the_limit():
    data = transfer(2, bytes(16))
    assert p.parse_transfer_pages_untrusted(data, 40, max_ranges=2) == (5, [(0, 0), (0, 0)])
    for end, limit in ((39, 2), (32, 2), (24, 2), (40, 1)):
        with pytest.raises(GuestProtocolError) as caught:
            p.parse_transfer_pages_untrusted(data, end, max_ranges=limit)
        assert caught.value.field == "range_count"
    with pytest.raises(GuestProtocolError):
        p.parse_transfer_pages_untrusted(transfer(0xFFFF_FFFF), 24, max_ranges=0xFFFF_FFFF)


def test_what_is_beyond_the_bytes_of_use_is_checked_and_left_out():
    data = direct(3, gpa.build_range(8192, 0, (1, 2)) + ONE + ONE)
    found = p.parse_gpa_ranges_untrusted(data, len(data), max_ranges=3, at_most=8192 + 100)
    assert found == [
        gpa.GpaRange(8192, 0, (1, 2)),
        gpa.GpaRange(100, 0, (1,)),
        gpa.GpaRange(0, 0, ()),
    ]
    with pytest.raises(GuestProtocolError):
        p.parse_gpa_ranges_untrusted(data, len(data) - 8, max_ranges=3, at_most=100)
