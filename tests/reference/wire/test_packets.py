"""Ring packets and GPA ranges, declared a second time in ``construct``."""

from __future__ import annotations

import construct as c
import pytest
from hypothesis import given, strategies as st

from vmbus.errors import GuestProtocolError
from vmbus.ring import completion
from vmbus.wire import gpa, packets as p

DESCRIPTOR = c.Struct(
    "type" / c.Int16ul,
    "data_offset8" / c.Int16ul,
    "length8" / c.Int16ul,
    "flags" / c.Int16ul,
    "transaction_id" / c.Int64ul,
)
PACKET = c.Struct(
    "descriptor" / DESCRIPTOR,
    "header" / c.Bytes((c.this.descriptor.data_offset8 - 2) * 8),
    "payload" / c.Bytes((c.this.descriptor.length8 - c.this.descriptor.data_offset8) * 8),
)
TRAILER = c.Struct(c.Const(0, c.Int32ul), "start" / c.Int32ul)
TRANSFER_RANGE = c.Struct("byte_count" / c.Int32ul, "byte_offset" / c.Int32ul)
TRANSFER_HEADER = c.Struct(
    "set_id" / c.Int16ul,
    "sender_owns" / c.Int8ul,
    c.Padding(1),
    "ranges" / c.PrefixedArray(c.Int32ul, TRANSFER_RANGE),
)
GPA_RANGE = c.Struct(
    "byte_count" / c.Int32ul,
    "byte_offset" / c.Int32ul,
    "pfns" / c.Array(lambda this: -(-(this.byte_offset + this.byte_count) // 4096), c.Int64ul),
)
DIRECT_HEADER = c.Struct(c.Padding(4), "ranges" / c.PrefixedArray(c.Int32ul, GPA_RANGE))

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, (1 << 64) - 1)
words = st.integers(0, 12).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))


@st.composite
def gpa_ranges(draw, *, smallest: int = 1) -> gpa.GpaRange:
    byte_count = draw(st.integers(smallest, 5 * 4096))
    byte_offset = draw(st.integers(0, 4095))
    pages = -(-(byte_count + byte_offset) // 4096)
    return gpa.GpaRange(
        byte_count, byte_offset, tuple(draw(st.lists(u64, min_size=pages, max_size=pages)))
    )


def as_twin(each: gpa.GpaRange) -> dict[str, object]:
    return {
        "byte_count": each.byte_count,
        "byte_offset": each.byte_offset,
        "pfns": list(each.pfns),
    }


@given(st.binary(min_size=16, max_size=16))
def test_both_declarations_of_a_descriptor_read_the_same(data):
    twin = DESCRIPTOR.parse(data)
    if 2 <= twin.data_offset8 <= twin.length8:
        assert p.parse_descriptor_untrusted(data) == (
            twin.type,
            twin.data_offset8 * 8,
            twin.length8 * 8,
            twin.flags,
            twin.transaction_id,
        )
    else:
        with pytest.raises(GuestProtocolError):
            p.parse_descriptor_untrusted(data)
    assert DESCRIPTOR.build(twin) == data == p.DESCRIPTOR.pack(*p.DESCRIPTOR.unpack(data))


@given(u16, st.binary(max_size=100), u64, u16, words)
def test_a_built_packet_reads_in_the_twin(kind, payload, transaction_id, flags, header):
    data = p.build_packet(kind, payload, transaction_id=transaction_id, flags=flags, header=header)
    twin = PACKET.parse(data)
    assert PACKET.build(twin) == data
    assert twin.descriptor.type == kind
    assert twin.descriptor.flags == flags
    assert twin.descriptor.transaction_id == transaction_id
    assert twin.header == header
    assert twin.payload == payload + bytes(-len(payload) % 8)


@given(u64, st.binary(max_size=100))
def test_a_completion_is_a_packet_of_type_11_without_flags(transaction_id, payload):
    data = completion(transaction_id, payload)
    assert data == p.build_packet(p.COMPLETION, payload, transaction_id=transaction_id)
    assert PACKET.parse(data).descriptor.flags == 0


@given(st.integers(0, 1 << 20))
def test_both_declarations_of_a_trailer_agree(start):
    assert TRAILER.build({"start": start}) == p.TRAILER.pack(start << 32)


@given(gpa_ranges(smallest=0))
def test_both_declarations_of_a_range_agree(each):
    data = gpa.build_range(*each)
    assert data == GPA_RANGE.build(as_twin(each))
    assert gpa.parse_range_untrusted(data, 0, len(data), allow_empty=True) == (each, len(data))
    twin = GPA_RANGE.parse(data)
    assert gpa.GpaRange(twin.byte_count, twin.byte_offset, tuple(twin.pfns)) == each


@given(st.lists(gpa_ranges(), min_size=1, max_size=5), st.binary(max_size=64))
def test_a_gpa_direct_header_of_the_twin_is_read(ranges, payload):
    header = DIRECT_HEADER.build({"ranges": [as_twin(each) for each in ranges]})
    data = p.build_packet(p.GPA_DIRECT, payload, header=header)
    assert p.parse_gpa_ranges_untrusted(data, 16 + len(header), max_ranges=5) == ranges


@given(u16, st.lists(st.tuples(u32, u32), max_size=8), st.binary(max_size=64), st.integers(0, 255))
def test_a_transfer_page_header_of_the_twin_is_read(set_id, ranges, payload, owns):
    header = TRANSFER_HEADER.build(
        {
            "set_id": set_id,
            "sender_owns": owns,
            "ranges": [{"byte_count": size, "byte_offset": where} for size, where in ranges],
        }
    )
    data = p.build_packet(p.TRANSFER_PAGES, payload, header=header)
    assert p.parse_transfer_pages_untrusted(data, 16 + len(header), max_ranges=8) == (
        set_id,
        ranges,
    )


@given(u16, st.lists(st.tuples(u32, u32), max_size=8), st.binary(max_size=64), u64)
def test_a_built_transfer_page_packet_reads_in_the_twin(set_id, ranges, payload, transaction_id):
    data = p.build_transfer_pages(payload, ranges, set_id=set_id, transaction_id=transaction_id)
    twin = PACKET.parse(data)
    assert (twin.descriptor.type, twin.descriptor.flags) == (p.TRANSFER_PAGES, 1)
    assert twin.descriptor.transaction_id == transaction_id
    assert twin.payload == payload + bytes(-len(payload) % 8)
    header = TRANSFER_HEADER.parse(twin.header)
    assert (header.set_id, header.sender_owns) == (set_id, 0)
    assert [(each.byte_count, each.byte_offset) for each in header.ranges] == ranges


@given(st.binary(min_size=24, max_size=200), st.integers(1, 8))
def test_both_declarations_accept_the_same_gpa_direct_bytes(data, limit):
    try:
        twin = DIRECT_HEADER.parse(data[16:])
        expected = [
            gpa.GpaRange(each.byte_count, each.byte_offset, tuple(each.pfns))
            for each in twin.ranges
        ]
    except c.ConstructError:
        expected = []
    sensible = 0 < len(expected) <= limit and all(
        each.byte_offset < 4096 and each.byte_count for each in expected
    )
    if sensible:
        assert p.parse_gpa_ranges_untrusted(data, len(data), max_ranges=limit) == expected
    else:
        with pytest.raises(GuestProtocolError):
            p.parse_gpa_ranges_untrusted(data, len(data), max_ranges=limit)
