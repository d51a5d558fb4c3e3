"""GPA ranges: how many pages, and which are refused."""

from __future__ import annotations

import pytest

from vmbus.errors import GuestProtocolError
from vmbus.wire import gpa


@pytest.mark.parametrize(
    ("byte_count", "byte_offset", "pages"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 1),
        (1, 4095, 1),
        (2, 4095, 2),
        (4096, 0, 1),
        (4097, 0, 2),
        (4096, 1, 2),
        (8192, 4095, 3),
        (0xFFFF_FFFF, 4095, 0x10_0001),
    ],
)
def test_a_range_touches_so_many_pages(byte_count, byte_offset, pages):
    assert gpa.page_count(byte_offset, byte_count) == pages
    if pages > 100:
        return
    data = gpa.build_range(byte_count, byte_offset, range(pages))
    found, end = gpa.parse_range_untrusted(data, 0, len(data), allow_empty=True)
    assert found == gpa.GpaRange(byte_count, byte_offset, tuple(range(pages)))
    assert end == len(data) == 8 + 8 * pages
    if pages:
        with pytest.raises(GuestProtocolError):
            gpa.parse_range_untrusted(data, 0, len(data) - 1, allow_empty=True)


def test_a_range_of_4_gib_is_refused_without_making_a_list_for_it():
    data = gpa.RANGE.pack(0xFFFF_FFFF, 4095) + bytes(4096)
    with pytest.raises(GuestProtocolError, match="need 1048577 page numbers, 512 are there"):
        gpa.parse_range_untrusted(data, 0, len(data))


@pytest.mark.parametrize("byte_offset", [4096, 4097, 0xFFFF_FFFF])
def test_a_range_begins_inside_its_first_page(byte_offset):
    data = gpa.build_range(1, byte_offset, (1, 2, 3))
    with pytest.raises(GuestProtocolError) as caught:
        gpa.parse_range_untrusted(data, 0, len(data))
    assert caught.value.field == "byte_offset"


@pytest.mark.parametrize("size", [0, 7])
def test_a_range_needs_its_eight_bytes(size):
    with pytest.raises(GuestProtocolError) as caught:
        gpa.parse_range_untrusted(bytes(32), 32 - size, 32)
    assert caught.value.field == "range"


def test_page_numbers_of_64_bits_are_handed_on_unchecked():
    data = gpa.build_range(4096, 0, (0xFFFF_FFFF_FFFF_FFFF,))
    found, _end = gpa.parse_range_untrusted(data, 0, len(data))
    assert found.pfns == (0xFFFF_FFFF_FFFF_FFFF,)


@pytest.mark.parametrize(("at_most", "pages"), [
    (0, 1), (1, 1), (4086, 1), (4087, 2), (8191, 3), (8192, 3), (1 << 40, 3), (None, 3),
])  # fmt: skip
def test_pages_that_are_of_no_use_are_not_unpacked(at_most, pages):
    data = gpa.build_range(8192, 10, (5, 6, 7)) + b"rest"
    found, end = gpa.parse_range_untrusted(data, 0, len(data), at_most=at_most)
    wanted = 8192 if at_most is None else min(8192, at_most)
    assert found == gpa.GpaRange(wanted, 10, (5, 6, 7)[:pages])
    assert end == len(data) - 4, "behind all that the guest has listed"
    assert gpa.page_count(10, wanted) == pages
