"""Messages that lie anywhere: what is made of them does not depend on where they are cut."""

from __future__ import annotations

import itertools
import random
import struct
from functools import cache
from unittest import mock

import trio
from hypothesis import given, settings, strategies as st

from netvsp.control import MAX_PACKETS
from netvsp.frames.frame import HEADERS, Frame
from netvsp.messages import Messages
from netvsp.wire import ppi, rndis
from netvsp.wire.nvsp import NO_SECTION
from tests.support.net_frames import SHAPES, packet, uncut, without_sum
from tests.support.net_guest import message_of, plain_frame
from vmbus.errors import GuestProtocolError
from vmbus.ring import Packet
from vmbus.testing import channel_pair
from vmbus.wire.gpa import page_count
from vmbus.wire.packets import GPA_DIRECT, IN_BAND, RANGES_HEADER, build_packet


def made(shape, size: int, how: int) -> bytes:
    whole = packet(shape, bytes(size))
    if how == 2 and shape.protocol == "tcp" and size:
        left, items = uncut(shape, whole, 1000)
    elif how:
        left, items = without_sum(shape, whole)
    else:
        left, items = whole, shape.items()
    return message_of(left, b"".join(ppi.build_item(*each) for each in items.items()))


WHOLE = [made(shape, size, how) for shape in SHAPES for size, how in ((0, 0), (9, 1), (3000, 2))]
WHOLE += [message_of(plain_frame(size)) for size in (14, 255, 256, 257, 468, 469, 2000)]


def aligned(message: bytes) -> bytes:
    size = len(message) + 7 & ~7
    return struct.pack("<II", 1, size) + message[8:].ljust(size - 8, b"\0")


batches = st.lists(st.sampled_from(WHOLE), min_size=1, max_size=MAX_PACKETS).map(
    lambda some: b"".join([*map(aligned, some[:-1]), some[-1]])
)


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(batches))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, 11)) * 4
        value = draw(st.integers(0, 120) | st.integers(0, 0xFFFFFFFF))
        data[place : place + 4] = value.to_bytes(4, "little")
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


cuts = st.lists(st.integers(0, 600) | st.integers(0, 9000), min_size=1, max_size=6).map(sorted)


def pieces(data: bytes, places: list[int]) -> list[memoryview]:
    ends = [0, *[min(each, len(data)) for each in places], len(data)]
    view = memoryview(data)
    return [view[start:end] for start, end in itertools.pairwise(ends)]


def seen(frames: list[Frame]) -> list[tuple[object, ...]]:
    return [(each.tobytes(), each.offload, each.tci, each.flow) for each in frames]


@cache
def reader() -> Messages:
    async def make() -> Messages:
        channel, _guest = channel_pair(ring_pages=4, data_pages=8)
        channel.close_doorbell()
        return Messages(channel.memory)

    return trio.run(make)


@given(batches, cuts)
@settings(max_examples=300)
def test_messages_that_are_cut_anywhere_are_the_same_frames(data, places):
    whole = reader().frames_untrusted([data])
    assert 1 <= len(whole) <= MAX_PACKETS
    cut = reader().frames_untrusted(pieces(data, places))
    assert seen(cut) == seen(whole)
    for frame in cut:
        assert len(frame.head) == len(frame) or len(frame.head) >= HEADERS


@given(damaged() | st.binary(max_size=200), cuts)
@settings(max_examples=500)
def test_any_messages_are_frames_or_refused(data, places):
    found: list[list[tuple[object, ...]]] = []
    for each in ([data], pieces(data, places)):
        try:
            found.append(seen(reader().frames_untrusted(each)))
        except GuestProtocolError:
            continue
    if len(found) == 2:
        assert found[0] == found[1]
    elif found and data[:4] == b"\1\0\0\0":
        # Only headers that are far away make a difference: no driver's are.
        offsets = [frame for frame in offsets_of(data) if max(frame) > 256]
        assert offsets, "one way takes it, and the other does not"


def offsets_of(data: bytes) -> list[tuple[int, int]]:
    """Where frame and information end, or begin, of each message that can be read."""
    found = []
    while len(data) >= rndis.PACKET_HEADER_SIZE:
        where = rndis.parse_frame_untrusted(data)
        found.append((where.data_offset, where.info_offset + where.info_length))
        data = data[where.length :]
    return found


@given(
    st.sampled_from([NO_SECTION, NO_SECTION, NO_SECTION, 0, 9]) | st.integers(0, 0xFFFFFFFF),
    st.integers(0, 7000) | st.integers(0, 0xFFFFFFFF),
    st.lists(
        st.tuples(
            st.integers(0, 5000) | st.integers(0, 0xFFFFFFFF),
            st.integers(0, 5000),
            st.lists(st.integers(0, 15), max_size=3) | st.just([3, 1 << 52, (1 << 64) - 1]),
        ),
        max_size=4,
    ),
    st.sampled_from([1, 1, 2, 3, 4, 0, 0xFFFFFFFF]),
    st.sampled_from([GPA_DIRECT, GPA_DIRECT, IN_BAND]),
)
@settings(max_examples=300)
def test_any_pages_are_bytes_or_refused(section, length, ranges, count, kind):
    listed = b""
    exact = True
    for size, offset, pfns in ranges:
        wanted = page_count(offset, size)
        pages = (pfns * wanted)[:wanted] if pfns and wanted < 100 else pfns
        exact &= len(pages) == wanted
        listed += struct.pack(f"<II{len(pages)}Q", size, offset, *pages)
    header = RANGES_HEADER.pack(0, count) + listed if kind == GPA_DIRECT else b""
    raw = build_packet(kind, bytes(40), transaction_id=1, flags=1, header=header)
    given_packet = Packet(kind, 1, 1, raw, 16 + len(header))
    try:
        found = reader().pieces_untrusted(given_packet, section, length)
    except GuestProtocolError:
        return
    assert kind == GPA_DIRECT
    assert not exact or sum(map(len, found)) == sum(size for size, _offset, _pfns in ranges[:count])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 0, 0, 1, 100, 4000]),
            st.sampled_from([0, 1, 96, 96, 4096, 4096, 4096, 4097]),
            st.integers(0, 15) | st.just(1 << 40),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([0, 0, 0, 1, -1]),
)
@settings(max_examples=300)
def test_ranges_of_one_page_hold_what_any_ranges_hold(ranges, more):
    # _single_pages_untrusted against parse_gpa_ranges_untrusted and gather.
    listed = b"".join(struct.pack("<IIQ", size, offset, pfn) for offset, size, pfn in ranges)
    header = RANGES_HEADER.pack(0, len(ranges) + more) + listed
    raw = build_packet(GPA_DIRECT, bytes(40), transaction_id=1, flags=1, header=header)
    given_packet = Packet(GPA_DIRECT, 1, 1, raw, 16 + len(header))

    def read() -> bytes | None:
        try:
            return b"".join(reader().pieces_untrusted(given_packet, NO_SECTION, 0))
        except GuestProtocolError:
            return None

    for pfn in range(16):
        reader()._memory.page(pfn)[:] = random.Random(pfn).randbytes(4096)
    found = read()
    with mock.patch.object(Messages, "_single_pages_untrusted", return_value=None):
        assert found == read()
