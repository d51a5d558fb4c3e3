"""Arbitrary frames, and arbitrary wishes about them: nothing breaks, and no byte gets lost."""

from __future__ import annotations

import struct

from hypothesis import given, settings, strategies as st

from netvsp import rss
from netvsp.frames import offload
from netvsp.frames.checksum import checksum, ones_sum, sum_pieces
from netvsp.frames.frame import HEADERS, NEEDS_CHECKSUM, Frame, Offload
from netvsp.wire import ppi
from tests.support.net_frames import SHAPES, from_guest, packet, pieces_of, uncut, without_sum
from vmbus.errors import GuestProtocolError

shapes = st.sampled_from(SHAPES)
WHOLE = [packet(shape, bytes(size)) for shape in SHAPES for size in (0, 5, 400)]


@st.composite
def damaged(draw) -> bytes:
    """A frame, of which some bytes are others, or missing."""
    frame = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 3))):
        frame[draw(st.integers(12, min(60, len(frame) - 1)))] = draw(st.integers(0, 255))
    return bytes(frame[: draw(st.integers(0, len(frame)) | st.just(len(frame)))])


frames = damaged() | st.binary(max_size=300)
large = st.builds(
    lambda mss, start, ipv6: ppi.pack_large_send(ppi.LargeSend(mss, start, ipv6)),
    st.integers(0, 200) | st.integers(0, 0xFFFFF),
    st.sampled_from([34, 38, 54, 58]) | st.integers(0, 1023),
    st.booleans(),
)
wishes = st.dictionaries(
    st.sampled_from([ppi.CHECKSUM, ppi.VLAN, ppi.HASH_VALUE, 77]), st.integers(0, 0xFFFFFFFF)
)


@given(
    frame=frames,
    tail=st.sampled_from([0, 0, 1, 3000, 65535]),
    wish=wishes,
    segment=st.none() | large,
)
@settings(max_examples=500)
def test_a_guest_may_wish_anything_of_any_frame(frame, tail, wish, segment):
    items = wish if segment is None else {**wish, ppi.LARGE_SEND: segment}
    whole = frame + bytes(tail)
    try:
        found = from_guest(whole, items, cut=HEADERS if len(whole) > HEADERS else None)
    except GuestProtocolError:
        return
    assert len(found) == len(whole)
    said = found.offload
    if said is not None:
        assert said.flags == NEEDS_CHECKSUM
        assert said.csum_start + said.csum_offset + 2 <= len(found.head)
        assert not said.gso_type or said.header_length < len(whole)
    for each in (found, found.tagged(), found.untagged()):
        offload.pack_virtio(each.offload)
        pieces = offload.complete(each)
        assert not any(piece.offload and piece.offload.gso_type for piece in pieces)
        headers = each.offload.header_length if each.offload else 0
        assert sum(len(piece) - headers for piece in pieces) == len(each) - headers
        for piece in pieces:
            offload.receive_value(piece)


words = st.integers(0, 80) | st.integers(0, 0xFFFF)
said_by_endpoints = st.builds(
    Offload,
    st.integers(0, 3) | st.integers(0, 255),
    st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84]) | st.integers(0, 255),
    words,
    st.just(50) | words,
    words,
    st.sampled_from([6, 16]) | words,
)


@given(frame=frames, said=said_by_endpoints, tci=st.none() | st.integers(0, 0xFFFF))
@settings(max_examples=500)
def test_an_endpoint_may_say_anything_of_any_frame(frame, said, tci):
    given_frame = Frame(frame, (), said, tci)
    for each in (given_frame, given_frame.tagged(), given_frame.untagged()):
        pieces = offload.complete(each)
        assert pieces
        for piece in pieces:
            offload.receive_value(piece)
            offload.pack_virtio(piece.offload)


@given(header=st.binary(min_size=12, max_size=12))
def test_any_virtio_header_is_read(header):
    found = offload.unpack_virtio(header)
    if found is not None:
        assert offload.unpack_virtio(struct.pack("<BBHHHH", *found)[:10] + bytes(2)) == found


@given(shape=shapes, payload=st.binary(max_size=600), cut=st.booleans())
def test_sums_that_we_fill_in_are_those_of_scapy(shape, payload, cut):
    whole = packet(shape, payload)
    left, items = without_sum(shape, whole)
    frame = from_guest(left, items, cut=HEADERS if cut and len(left) > HEADERS else None)
    assert offload.fill_checksum(frame).tobytes() == whole


@given(
    shape=shapes.filter(lambda each: each.protocol == "tcp"),
    payload=st.binary(min_size=49, max_size=600),
    mss=st.integers(48, 599),
    flags=st.sampled_from(["A", "PA", "FA", "CA", "CPFA", "UA"]),
)
def test_segments_that_we_cut_are_those_of_scapy(shape, payload, mss, flags):
    left, items = uncut(shape, packet(shape, payload, flags=flags), mss)
    pieces = offload.complete(from_guest(left, items))
    assert [each.tobytes() for each in pieces] == list(pieces_of(shape, payload, mss, flags=flags))


@given(pieces=st.lists(st.binary(max_size=9), max_size=9))
def test_sums_are_those_that_are_made_word_by_word(pieces):
    data = b"".join(pieces)
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert ones_sum(data) == sum_pieces(pieces) == total
    assert checksum(total) == ~total & 0xFFFF


@given(
    key=st.binary(max_size=40),
    kinds=st.integers(0, 0x3FFF),
    table=st.lists(st.integers(0, 7), min_size=1, max_size=128),
    head=frames,
)
def test_any_frame_has_a_hash(key, kinds, table, head):
    scaling = rss.Scaling(key, kinds, tuple(table))
    number = scaling.hash(head)
    assert 0 <= number <= 0xFFFFFFFF
    assert scaling.table == tuple(table)


@given(key=st.binary(min_size=40, max_size=40), data=st.binary(max_size=36))
def test_the_hash_is_microsofts_bit_by_bit(key, data):
    """The WDK's own description of it: for each bit that is set, 32 bits of the key."""
    window, result = int.from_bytes(key, "big"), 0
    for position in range(8 * len(data)):
        if data[position >> 3] & 0x80 >> (position & 7):
            result ^= window >> (320 - 32 - position) & 0xFFFFFFFF
    assert rss.Toeplitz(key).hash(data) == result
