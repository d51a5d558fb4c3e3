"""GPADLs, the lists of guest pages that rings and shared buffers are made of.

A guest describes pages in one GPADL_HEADER and as many GPADL_BODY messages as it takes;
:class:`GpadlAssembly` puts them together, and the result is a :class:`Gpadl`.

What real guests taught:

* Only ``range_buflen`` and ``range_count`` say how much there is. UEFI posts 240 bytes whatever
  is in them and macOS posts 26 page numbers in every header; what is too much is junk.
* The message number of a body means nothing: macOS and FreeBSD leave it 0 in all of them.
* Every driver seen describes one range; several are legal.
* A header may announce 64 KiB of page list in 20 bytes, so memory is taken as bytes arrive and
  never because of an announcement.
"""

from __future__ import annotations

import dataclasses

from vmbus.errors import GuestProtocolError
from vmbus.memory import PAGE_SIZE, GuestMemory
from vmbus.wire.gpa import GpaRange, parse_range_untrusted

_SMALLEST_RANGE = 16
"""Bytes of a range of one page: 8 of header, one page number."""
_MIN_RING_PAGES = 2
"""A ring has a control page and at least one page of data."""


@dataclasses.dataclass(frozen=True, slots=True)
class Gpadl:
    """A complete list of guest pages. Holds numbers only, no memory of the guest."""

    handle: int
    """Chosen by the guest; unique within a channel."""
    ranges: tuple[GpaRange, ...]
    """At least one, none of them empty."""

    @property
    def page_count(self) -> int:
        """Pages in all ranges."""
        return sum(len(each.pfns) for each in self.ranges)

    @property
    def size(self) -> int:
        """Bytes in all ranges."""
        return sum(each.byte_count for each in self.ranges)

    @property
    def pages(self) -> tuple[int, ...]:
        """Page frame numbers of all ranges, in order."""
        return tuple(pfn for each in self.ranges for pfn in each.pfns)

    def views(self, memory: GuestMemory, *, write: bool = True) -> list[memoryview]:
        """Return the bytes it describes, neighbouring pages joined. Cannot block.

        Args:
            memory: The guest's memory. The views are borrowed from it.
            write: Insist on memory that may be written, as rings and receive buffers are.

        Raises:
            GuestProtocolError: A page is not memory, or not writable.
        """
        found: list[memoryview] = []
        for each in self.ranges:
            found += memory.gather(each.byte_offset, each.byte_count, each.pfns, write=write)
        return found

    def check(self, memory: GuestMemory) -> None:
        """Prove that all of it is memory that may be written. Cannot block.

        Raises:
            GuestProtocolError: A page is not memory, or not writable.
        """
        for each in self.ranges:
            memory.check_pages(each.pfns, write=True)

    def ring_pages(self, downstream_page_offset: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Split a ring GPADL into its two rings. Cannot block.

        Args:
            downstream_page_offset: Pages before the host-to-guest ring, from OPENCHANNEL. The
                rings need not have the same size, though they do in every driver seen.

        Returns:
            Page frame numbers of the incoming (guest-to-host) and of the outgoing ring, each with
            its control page first.

        Raises:
            GuestProtocolError: Not one range of whole pages, or a half with less than two pages.
        """
        if len(self.ranges) != 1:
            raise GuestProtocolError(
                f"ring GPADL {self.handle:#x}: has {len(self.ranges)} ranges, needs one",
                field="ring_gpadl",
            )
        only = self.ranges[0]
        if only.byte_offset or only.byte_count % PAGE_SIZE:
            raise GuestProtocolError(
                f"ring GPADL {self.handle:#x}: is not made of whole pages", field="ring_gpadl"
            )
        last = len(only.pfns) - _MIN_RING_PAGES
        if not _MIN_RING_PAGES <= downstream_page_offset <= last:
            raise GuestProtocolError(
                f"ring GPADL {self.handle:#x}: {len(only.pfns)} pages cannot be split at "
                f"{downstream_page_offset} into two rings of two pages or more",
                field="downstream_page_offset",
            )
        return only.pfns[:downstream_page_offset], only.pfns[downstream_page_offset:]


class GpadlAssembly:
    """A GPADL on its way in.

    Args:
        handle: The guest's handle.
        range_buflen: Bytes of all range data.
        range_count: How many ranges they make.

    Raises:
        GuestProtocolError: There cannot be that many ranges in so many bytes.
    """

    __slots__ = ("_data", "handle", "page_count", "range_buflen", "range_count")

    def __init__(self, handle: int, *, range_buflen: int, range_count: int) -> None:
        if range_count == 0:
            raise GuestProtocolError(f"GPADL {handle:#x}: has no range", field="range_count")
        if range_buflen % 8 or range_buflen < _SMALLEST_RANGE * range_count:
            raise GuestProtocolError(
                f"GPADL {handle:#x}: {range_count} ranges cannot be {range_buflen} bytes long",
                field="range_buflen",
            )
        self.handle = handle
        self.range_buflen = range_buflen
        self.range_count = range_count
        self.page_count = range_buflen // 8 - range_count
        """Pages announced; the finished GPADL has exactly so many. Nothing is held for them."""
        self._data = bytearray()

    def add_untrusted(self, data: bytes) -> Gpadl | None:
        """Take the range data of a header or body. Cannot block.

        Args:
            data: A private copy of what follows the fixed part of the message; junk may follow
                what belongs to the list.

        Returns:
            The GPADL once the data is complete, else None.

        Raises:
            GuestProtocolError: The data is complete, but does not make up the ranges announced.
        """
        # A message carries whole 64-bit words: 27 in a header, where 4 bytes remain of 240 that
        # UEFI posts as well, and 28 in a body.
        missing = self.range_buflen - len(self._data)
        self._data += data[: min(len(data) & ~7, missing)]
        if len(self._data) < self.range_buflen:
            return None
        whole = bytes(self._data)
        ranges = []
        position = 0
        for _ in range(self.range_count):
            found, position = parse_range_untrusted(whole, position, len(whole))
            ranges.append(found)
        if position != len(whole):
            raise GuestProtocolError(
                f"GPADL {self.handle:#x}: {len(whole) - position} bytes are left over behind "
                f"{self.range_count} ranges",
                field="range_buflen",
            )
        return Gpadl(self.handle, tuple(ranges))
