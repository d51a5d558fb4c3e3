"""GPADL assembly and what can be read from a GPADL."""

from __future__ import annotations

import pytest

from tests.support.engine import make_memory
from vmbus.errors import GuestProtocolError
from vmbus.gpadl import Gpadl, GpadlAssembly
from vmbus.wire.gpa import GpaRange, build_range

PAGE = 4096


def one_range(pages: int, first: int = 10) -> bytes:
    return build_range(pages * PAGE, 0, list(range(first, first + pages)))


def test_a_short_list_is_complete_with_its_header() -> None:
    data = one_range(3)
    assembly = GpadlAssembly(7, range_buflen=len(data), range_count=1)
    gpadl = assembly.add_untrusted(data)
    assert gpadl == Gpadl(7, (GpaRange(3 * PAGE, 0, (10, 11, 12)),))
    assert (gpadl.page_count, gpadl.size, gpadl.pages) == (3, 3 * PAGE, (10, 11, 12))
    assert assembly.page_count == 3


def test_the_largest_buffer_of_any_guest_takes_283_bodies() -> None:
    # FreeBSD and DPDK: 31 MiB, range_buflen 63496.
    data = one_range(7936)
    assert len(data) == 63496
    assembly = GpadlAssembly(1, range_buflen=len(data), range_count=1)
    assert assembly.add_untrusted(data[:216]) is None
    bodies = [data[start : start + 224] for start in range(216, len(data), 224)]
    assert len(bodies) == 283
    results = [assembly.add_untrusted(body) for body in bodies]
    assert results[:-1] == [None] * 282
    assert results[-1] is not None
    assert results[-1].pages == tuple(range(10, 7946))


def test_junk_behind_the_list_and_odd_bytes_behind_its_words_are_not_looked_at() -> None:
    """Checklist row 31: UEFI posts 240 bytes always, macOS 26 page numbers always."""
    data = one_range(40)
    assembly = GpadlAssembly(1, range_buflen=len(data), range_count=1)
    # 27 words fit into a header, and 4 bytes remain.
    assert assembly.add_untrusted(data[:216] + b"junk") is None
    gpadl = assembly.add_untrusted(data[216:] + bytes([0xFF]) * 50)
    assert gpadl is not None
    assert gpadl.pages == tuple(range(10, 50))


def test_an_empty_body_changes_nothing() -> None:
    data = one_range(2)
    assembly = GpadlAssembly(1, range_buflen=len(data), range_count=1)
    assert assembly.add_untrusted(b"") is None
    assert assembly.add_untrusted(data) is not None


def test_several_ranges_are_accepted() -> None:
    data = build_range(PAGE, 0, [5]) + build_range(100, 4090, [6, 7])
    gpadl = GpadlAssembly(1, range_buflen=len(data), range_count=2).add_untrusted(data)
    assert gpadl is not None
    assert (gpadl.page_count, gpadl.size, gpadl.pages) == (3, PAGE + 100, (5, 6, 7))
    with pytest.raises(GuestProtocolError, match="2 ranges, needs one"):
        gpadl.ring_pages(2)


@pytest.mark.parametrize(
    ("buflen", "count", "field"),
    [
        (0, 0, "range_count"),
        (24, 0, "range_count"),
        (0, 1, "range_buflen"),
        (8, 1, "range_buflen"),
        (25, 1, "range_buflen"),
        (24, 2, "range_buflen"),
        (65528, 65535, "range_buflen"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused_at_once(buflen, count, field) -> None:
    with pytest.raises(GuestProtocolError) as caught:
        GpadlAssembly(1, range_buflen=buflen, range_count=count)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("data", "count", "field"),
    [
        (build_range(0, 0, []) + bytes(8), 1, "byte_count"),
        (build_range(PAGE, PAGE, [1]), 1, "byte_offset"),
        (build_range(2 * PAGE, 0, [1]), 1, "byte_count"),
        (build_range(0xFFFFFFFF, 0, [1]), 1, "byte_count"),
        (build_range(PAGE, 0, [1, 2]), 1, "range_buflen"),
        (build_range(PAGE, 0, [1, 0, 3]), 2, "byte_count"),
    ],
)
def test_ranges_that_do_not_make_up_the_announced_bytes_are_refused(data, count, field) -> None:
    assembly = GpadlAssembly(1, range_buflen=len(data), range_count=count)
    with pytest.raises(GuestProtocolError) as caught:
        assembly.add_untrusted(data)
    assert caught.value.field == field


def test_views_join_neighbouring_pages() -> None:
    memory = make_memory(64)
    memory.write(10 * PAGE, b"A" * PAGE + b"B" * PAGE)
    memory.write(20 * PAGE, b"C" * PAGE)
    gpadl = Gpadl(1, (GpaRange(3 * PAGE, 0, (10, 11, 20)), GpaRange(2, 5, (20,))))
    views = gpadl.views(memory)
    assert [len(view) for view in views] == [2 * PAGE, PAGE, 2]
    assert b"".join(views) == b"A" * PAGE + b"B" * PAGE + b"C" * (PAGE + 2)
    for view in views:
        view.release()


def test_views_of_what_is_not_memory_are_refused() -> None:
    memory = make_memory(8)
    for pfn in (8, 1 << 40, 1 << 52, (1 << 64) - 1):
        with pytest.raises(GuestProtocolError):
            Gpadl(1, (GpaRange(2 * PAGE, 0, (1, pfn)),)).views(memory)


def test_a_ring_is_split_at_the_downstream_offset_into_unequal_halves() -> None:
    gpadl = Gpadl(1, (GpaRange(7 * PAGE, 0, tuple(range(7))),))
    assert gpadl.ring_pages(2) == ((0, 1), (2, 3, 4, 5, 6))
    assert gpadl.ring_pages(5) == ((0, 1, 2, 3, 4), (5, 6))


@pytest.mark.parametrize("offset", [0, 1, 6, 7, 8, 0xFFFFFFFF])
def test_a_ring_needs_two_pages_on_each_side(offset) -> None:
    gpadl = Gpadl(1, (GpaRange(7 * PAGE, 0, tuple(range(7))),))
    with pytest.raises(GuestProtocolError) as caught:
        gpadl.ring_pages(offset)
    assert caught.value.field == "downstream_page_offset"


@pytest.mark.parametrize(("offset", "length"), [(8, 6 * PAGE), (0, 6 * PAGE + 8)])
def test_a_ring_is_made_of_whole_pages(offset, length) -> None:
    gpadl = Gpadl(1, (GpaRange(length, offset, tuple(range(7))),))
    with pytest.raises(GuestProtocolError, match="whole pages"):
        gpadl.ring_pages(3)
