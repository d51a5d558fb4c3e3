"""GPA ranges: (length, offset, list of page numbers), in GPADLs and in GPA-direct packets.

A range is ``byte_count`` u32, ``byte_offset`` u32, then one u64 page frame number per page that
the bytes touch: ``ceil((byte_offset + byte_count) / 4096)`` of them. The first page is entered at
``byte_offset`` (less than 4096), all others at 0. Source: linux/include/linux/hyperv.h
(``struct gpa_range``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

PAGE_SIZE = 4096
RANGE = struct.Struct("<II")
assert RANGE.size == 8


class GpaRange(NamedTuple):
    """One range of guest physical bytes."""

    byte_count: int
    byte_offset: int
    """Into the first page, 0 to 4095."""
    pfns: tuple[int, ...]
    """Page frame numbers, one per page touched."""


@lru_cache(maxsize=1024)
def pfn_list(count: int) -> struct.Struct:
    """Return the compiled layout of ``count`` page frame numbers."""
    return struct.Struct(f"<{count}Q")


def page_count(byte_offset: int, byte_count: int) -> int:
    """Pages touched by ``byte_count`` bytes that start ``byte_offset`` bytes into a page."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) // PAGE_SIZE


def parse_range_untrusted(
    data: bytes,
    start: int,
    end: int,
    *,
    allow_empty: bool = False,
    at_most: int | None = None,
) -> tuple[GpaRange, int]:
    """Parse one range from ``data[start:end]``. Cannot block.

    The time that it takes is that of the pages it returns; none are unpacked that are not.

    Args:
        data: A private copy.
        start: Byte offset of the range.
        end: Byte offset behind the last byte that may belong to it.
        allow_empty: Accept a length of 0, which Linux's NIC driver sends; such a range still has
            a page list if its offset is not 0.
        at_most: Bytes that are of use; what the range has beyond is left out. None: all are.

    Returns:
        The range, and the byte offset behind it in ``data``.

    Raises:
        GuestProtocolError: Truncated, empty, or with an offset of a page or more.
    """
    if end - start < RANGE.size:
        raise GuestProtocolError("GPA range: cut off before its page list", field="range")
    byte_count, byte_offset = RANGE.unpack_from(data, start)
    if byte_offset >= PAGE_SIZE:
        raise GuestProtocolError(
            f"GPA range: byte_offset {byte_offset} is not inside a page", field="byte_offset"
        )
    if not byte_count and not allow_empty:
        raise GuestProtocolError("GPA range: byte_count is 0", field="byte_count")
    count = (byte_offset + byte_count + 4095) >> 12
    start += RANGE.size
    after = start + count * 8
    if after > end:
        raise GuestProtocolError(
            f"GPA range: {byte_count} bytes at offset {byte_offset} need {count} page numbers, "
            f"{(end - start) // 8} are there",
            field="byte_count",
        )
    if at_most is not None and byte_count > at_most:
        byte_count = at_most
        count = (byte_offset + byte_count + 4095) >> 12
    return GpaRange(byte_count, byte_offset, pfn_list(count).unpack_from(data, start)), after


def build_range(byte_count: int, byte_offset: int, pfns: Sequence[int]) -> bytes:
    """Return the bytes of one range; the inverse of :func:`parse_range_untrusted`."""
    return RANGE.pack(byte_count, byte_offset) + pfn_list(len(pfns)).pack(*pfns)
