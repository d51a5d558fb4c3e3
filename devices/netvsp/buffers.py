"""The receive and the send buffer: guest pages that the device may use for as long as it lives.

The guest shares each by a GPADL of up to 31 MB, whose pages may lie anywhere, and takes it back by
a REVOKE message, by GPADL_TEARDOWN, or by closing the channel, in any order: every driver has its
own. A buffer holds a lease (:mod:`vmbus.host.buffer`), so GPADL_TORNDOWN goes out when nothing of
it is used any more, and not before.

Thousands of pages are thousands of views, most of them never used: an idle adapter would hold
megabytes. So a view is made when its part of the buffer is used for the first time.
"""

from __future__ import annotations

from collections.abc import Sequence

from netvsp.frames.frame import Buffer
from vmbus.host.buffer import GpadlLease
from vmbus.memory import PAGE_SIZE, GuestMemory, window

_PAGE_MASK = PAGE_SIZE - 1


class SharedBuffer:
    """Guest pages, cut into parts of one size.

    Args:
        lease: The buffer's from here on.
        memory: The guest's.
        part_size: Bytes of each part.

    Attributes:
        gone: Whether the guest has taken it back; nothing is used any more.

    Raises:
        GuestProtocolError: Not all of it is memory that may be written.
    """

    def __init__(self, lease: GpadlLease, memory: GuestMemory, part_size: int) -> None:
        gpadl = lease.gpadl
        gpadl.check(memory)
        self.part_size = part_size
        self.size = gpadl.size
        """Bytes."""
        self.count = self.size // part_size
        """Parts."""
        self.gone = False
        self._lease = lease
        self._memory = memory
        # Every driver describes one range; the parts of another buffer are looked for slowly.
        only = gpadl.ranges[0] if len(gpadl.ranges) == 1 else None
        self._pfns = only.pfns if only is not None else ()
        self._base = only.byte_offset if only is not None else 0
        self.parts: dict[int, list[memoryview]] = {}
        """Those that have been used, by number; :meth:`part` has them all."""
        lease.on_teardown = self.release

    def part(self, index: int) -> list[memoryview]:
        """Return the bytes of a part, uncopied; the buffer's. Cannot block.

        Raises:
            GuestProtocolError: It is not memory any more.
        """
        found = self.parts.get(index)
        if found is None:
            found = self.parts[index] = self._views(index * self.part_size)
        return found

    def _views(self, offset: int) -> list[memoryview]:
        size = self.part_size
        if not self._pfns:
            return window(self._lease.views(), offset, size)
        start = self._base + offset
        first = start // PAGE_SIZE
        last = (start + size + _PAGE_MASK) // PAGE_SIZE
        return self._memory.gather(start & _PAGE_MASK, size, self._pfns[first:last], write=True)

    def release(self) -> None:
        """Give it back: nothing touches it from here on. Idempotent. Cannot block."""
        if not self.gone:
            self.gone = True
            for views in self.parts.values():
                for view in views:
                    view.release()
            self.parts.clear()
            self._lease.release()


class SendBuffer(SharedBuffer):
    """Where the guest puts small messages; the parts are its sections."""

    def read_untrusted(self, index: int, length: int) -> bytes:
        """Copy the first bytes of a section, once. Cannot block.

        Args:
            index: Below :attr:`count`; the caller has looked.
            length: Up to :attr:`part_size`.
        """
        views = self.part(index)
        if length <= len(views[0]):
            return bytes(views[0][:length])
        return b"".join(views)[:length]


class ReceiveBuffer(SharedBuffer):
    """Where the device puts messages for the guest; the parts are its sub-allocations.

    A part is the guest's from the packet that names it until the completion of that packet.
    """

    def __init__(self, lease: GpadlLease, memory: GuestMemory, part_size: int) -> None:
        super().__init__(lease, memory, part_size)
        # What was given back last is used first: it may be in a cache, and its views are made.
        self.free = list(range(self.count - 1, -1, -1))
        """Parts that are the device's."""

    def stored(self, ranges: Sequence[int]) -> list[memoryview]:
        """Return what a packet names, uncopied; the buffer's. Cannot block.

        Args:
            ranges: Length and offset of each part.
        """
        found: list[memoryview] = []
        for length, offset in zip(ranges[::2], ranges[1::2], strict=True):
            found += window(self.part(offset // self.part_size), 0, length)
        return found

    def write(self, index: int, data: Buffer) -> None:
        """Store a message at the start of a part. Cannot block.

        Args:
            index: A part that is the device's.
            data: Up to :attr:`part_size` bytes.
        """
        views = self.part(index)
        if len(data) <= len(views[0]):
            views[0][: len(data)] = data
            return
        position = 0
        for view in views:
            piece = data[position : position + len(view)]
            view[: len(piece)] = piece
            position += len(piece)
            if position >= len(data):
                break
