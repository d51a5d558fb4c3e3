"""Data buffers of requests: pages of guest RAM that stay with the driver between requests."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmbus.guest.ram import Ram
from vmbus.wire.gpa import PAGE_SIZE, RANGE, page_count
from vmbus.wire.packets import RANGES_HEADER

_ONE_RANGE = RANGES_HEADER.pack(0, 1)


class Buffer:
    """Some pages; contents and ownership are the taker's until given back to the pool.

    Made by :meth:`BufferPool.take`.

    Args:
        pfns: The pages, in the order of the buffer's bytes.
        views: Their bytes (format ``"B"``), pages in a row as one view; kept, not copied.
        give_back: Takes the buffer when it is released.
    """

    __slots__ = ("_page_numbers", "give_back", "pages", "views")

    def __init__(
        self, pfns: list[int], views: list[memoryview], give_back: Callable[[Buffer], None]
    ) -> None:
        self.pages = len(pfns)
        self.views = views
        self.give_back = give_back
        self._page_numbers = struct.pack(f"<{len(pfns)}Q", *pfns)

    def header(self, offset: int, length: int) -> bytes:
        """Return the GPA-direct header of one range of ``length`` bytes from ``offset`` on.

        Cannot block.
        """
        return _ONE_RANGE + self.range_at(offset, length)

    def range_at(self, offset: int, length: int) -> bytes:
        """Return the GPA range of ``length`` bytes from ``offset`` on, wherever that is.

        It may be one of several in a packet, and empty. Cannot block.
        """
        page, inside = divmod(offset, PAGE_SIZE)
        end = page + page_count(inside, length)
        return RANGE.pack(length, inside) + self._page_numbers[8 * page : 8 * end]

    def read(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes out of the pages, from ``offset`` on. Cannot block."""
        if len(self.views) == 1:
            return bytes(self.views[0][offset : offset + length])
        return b"".join(self._pieces(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        """Copy ``data`` into the pages, from ``offset`` on. Cannot block."""
        if len(self.views) == 1:
            self.views[0][offset : offset + len(data)] = data
            return
        done = 0
        for piece in self._pieces(offset, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def _pieces(self, offset: int, length: int) -> list[memoryview]:
        pieces = []
        for view in self.views:
            piece = view[offset : offset + length]
            offset = max(0, offset - len(view))
            length -= len(piece)
            pieces.append(piece)
        return pieces

    def release(self) -> None:
        """Give the buffer back to its pool, once, when the host is done with it. Cannot block."""
        self.give_back(self)


class BufferPool:
    """Buffers of a guest, reused by size.

    Args:
        ram: Gives pages; they stay with the pool.
        contiguous: False scatters the pages of each buffer over the RAM.
    """

    def __init__(self, ram: Ram, *, contiguous: bool) -> None:
        self._ram = ram
        self._contiguous = contiguous
        self._free: dict[int, list[Buffer]] = {}

    def take(self, size: int) -> Buffer:
        """Return a buffer of ``size`` bytes or more, with anything in it. Cannot block.

        Raises:
            MemoryError: The guest has no pages left.
        """
        pages = 1 << (-(-size // PAGE_SIZE) - 1).bit_length()
        free = self._free.setdefault(pages, [])
        if free:
            return free.pop()
        pfns = self._ram.allocate(pages, contiguous=self._contiguous)
        return Buffer(pfns, self._ram.views(pfns), self._give)

    def _give(self, buffer: Buffer) -> None:
        self._free[buffer.pages].append(buffer)
