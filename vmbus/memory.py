"""Guest physical memory as Python sees it.

Guest RAM is any number of regions, each a mapping of a file descriptor (a memfd as a rule). An
address range may cross from one region into the next; it is then handed out as several views.

Rules of shared memory, kept by everything that uses this module:

* Control words (ring indices, masks, flags) are read and written only through
  ``memoryview.cast("I")`` or ``cast("Q")`` items, which CPython turns into single aligned loads
  and stores. ``struct.pack_into`` first clears the bytes and then stores them: another processor
  can see the zeros (measured: 0.5 to 14 % of reads while writing).
* Bytes that a guest chose are copied once and then parsed; nothing is read twice.
* Views are borrowed. Whoever keeps one longer than a call keeps the region's mapping alive and
  must give it up when told (:meth:`GuestMemory.remove_region`).

A region whose file can be truncated by its owner would kill this process with SIGBUS at the next
access, so :meth:`GuestMemory.add_region` insists on a memfd sealed with ``F_SEAL_SHRINK`` unless
the caller says that it trusts the owner.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import itertools
import mmap
import operator
import os
import threading
from collections.abc import Iterable, Sequence

from vmbus.errors import ConfigError, GuestProtocolError

PAGE_SIZE = 4096
PAGE_SHIFT = 12

_fence_lock = threading.Lock()
_fence_acquire = _fence_lock.acquire
_fence_release = _fence_lock.release


def full_fence() -> None:
    """Order every earlier store before every later load, as seen by other processors.

    A ring writer stores its index and then reads the peer's interrupt mask; the peer does the
    reverse. Without a full fence both may read old values, and a wake-up is lost (the Dekker
    pattern; Intel SDM 3A, 8.2.3.4 allows the reordering). CPython offers no fence, but taking and
    releasing a lock executes locked instructions, which on x86-64 are full fences (SDM 3A,
    8.2.3.9); 73 ns measured. This is a property of x86-64: other architectures need a native
    helper, and the package does not claim to support them.

    The lock is never contended in a way that matters: a failed try-lock is a locked instruction
    just as well.
    """
    if _fence_acquire(False):
        _fence_release()


class Region:
    """One mapped run of guest physical addresses. Made by :meth:`GuestMemory.add_region`."""

    __slots__ = ("_mapping", "end", "gpa", "read_only", "size", "view")

    def __init__(self, gpa: int, size: int, fd: int, offset: int, *, read_only: bool) -> None:
        protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        self.gpa = gpa
        self.size = size
        self.end = gpa + size
        self.read_only = read_only
        self._mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
        # Where the machine gives shared memory huge pages to who asks for them
        # (/sys/kernel/mm/transparent_hugepage/shmem_enabled: advise); elsewhere it changes nothing.
        with contextlib.suppress(OSError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._mapping)

    def close(self) -> bool:
        """Unmap. Returns False if somebody still holds a view; may be called again."""
        try:
            self.view.release()
            self._mapping.close()
        except BufferError:
            return False
        return True


def is_sealed(fd: int) -> bool:
    """Tell whether ``fd`` is a memfd that its owner cannot shrink any more."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except (OSError, ValueError, OverflowError):  # the latter two: no descriptor at all
        return False


def _release(views: list[memoryview]) -> None:
    # Whoever keeps the exception keeps the frame that raised it; the frame must not keep the
    # guest's pages mapped.
    for view in views:
        view.release()


def _read_only(gpa: int) -> GuestProtocolError:
    return GuestProtocolError(f"address {gpa:#x} is read-only memory", field="gpa")


_ONE_FURTHER = (1).__ne__
"""Whether the next page is not the neighbour; from the difference of their numbers."""


def _pieces(region: Region, pfns: Sequence[int], starts: list[int]) -> list[memoryview]:
    """Views of runs of pages of one region. Apart, for the closure makes its caller slower."""
    view, base = region.view, region.gpa >> PAGE_SHIFT
    return [
        view[(page := pfns[first] - base) << PAGE_SHIFT : page + end - first << PAGE_SHIFT]
        for first, end in itertools.pairwise(starts)
    ]


def _are_neighbours(pfns: Sequence[int]) -> bool:
    """Whether pages follow each other. A loop over them would take ten times as long."""
    count = len(pfns)
    if not count or pfns[-1] - pfns[0] != count - 1:
        return False
    return tuple(pfns) == tuple(range(pfns[0], pfns[0] + count))


class GuestMemory:
    """The guest physical address space: non-overlapping regions, page granular.

    All methods that take addresses chosen by a guest raise :class:`GuestProtocolError` for ranges
    that are not wholly backed by memory, and nothing else. None blocks.
    """

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._starts: list[int] = []
        self._last: Region | None = None
        self._dying: list[Region] = []

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, by address."""
        return tuple(self._regions)

    @property
    def size(self) -> int:
        """Sum of all regions, in bytes."""
        return sum(region.size for region in self._regions)

    def add_region(
        self,
        gpa: int,
        size: int,
        fd: int,
        offset: int = 0,
        *,
        read_only: bool = False,
        trusted: bool = False,
    ) -> Region:
        """Map ``size`` bytes of ``fd`` from ``offset`` at guest physical address ``gpa``.

        The descriptor is only borrowed: the mapping keeps its own reference.

        Args:
            gpa: Guest physical address in bytes, page aligned.
            size: Bytes, a multiple of the page size, not 0.
            fd: A memfd; anything else only with ``trusted``.
            offset: Bytes into the file, page aligned.
            read_only: The guest's ROM: we never write there.
            trusted: Accept a file that its owner could still truncate under us.

        Raises:
            ConfigError: Misaligned, overlapping, beyond 2**52, not sealed, or not mappable.
        """
        if gpa % PAGE_SIZE or size % PAGE_SIZE or offset % PAGE_SIZE or size <= 0:
            raise ConfigError("memory region: gpa, size and offset must be whole pages")
        if gpa < 0 or offset < 0 or gpa + size > 1 << 52:
            raise ConfigError("memory region: addresses beyond 2**52 do not exist on x86-64")
        index = bisect.bisect_left(self._starts, gpa)
        if (index and self._regions[index - 1].end > gpa) or (
            index < len(self._regions) and self._regions[index].gpa < gpa + size
        ):
            raise ConfigError(f"memory region: {gpa:#x}+{size:#x} overlaps one that is mapped")
        if not trusted and not is_sealed(fd):
            raise ConfigError("memory region: the descriptor is not a memfd with F_SEAL_SHRINK")
        try:
            if os.fstat(fd).st_size < offset + size:
                raise ConfigError("memory region: the file is shorter than offset + size")
            region = Region(gpa, size, fd, offset, read_only=read_only)
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"memory region: cannot be mapped: {error}") from error
        self._regions.insert(index, region)
        self._starts.insert(index, gpa)
        self._last = region
        return region

    def remove_region(self, gpa: int, size: int) -> Region:
        """Take a region out of the map; new requests for its pages fail from now on.

        The mapping itself goes away when the last borrowed view does; see :meth:`drained`.

        Returns:
            What was taken out, to ask :meth:`drained` about.

        Raises:
            ConfigError: No region has exactly this address and size.
        """
        found = [each for each in self._regions if (each.gpa, each.size) == (gpa, size)]
        if not found:
            raise ConfigError(f"memory region: nothing is mapped as {gpa:#x}+{size:#x}")
        region = found[0]
        self._regions.remove(region)
        self._starts.remove(gpa)
        self._last = None
        if not region.close():
            self._dying.append(region)
        return region

    def drained(self, regions: Iterable[Region] | None = None) -> bool:
        """Whether removed regions are unmapped by now: these, or all there ever were.

        Cannot block.
        """
        self._dying = [region for region in self._dying if not region.close()]
        if regions is None:
            return not self._dying
        return not any(region in self._dying for region in regions)

    def close(self) -> None:
        """Remove all regions. Idempotent."""
        for region in tuple(self._regions):
            self.remove_region(region.gpa, region.size)

    def _find(self, gpa: int) -> Region:
        region = self._last
        if region is not None and region.gpa <= gpa < region.end:
            return region
        index = bisect.bisect_right(self._starts, gpa) - 1
        if index >= 0:
            region = self._regions[index]
            if gpa < region.end:
                self._last = region
                return region
        raise GuestProtocolError(f"guest physical address {gpa:#x} is not memory", field="gpa")

    def views(self, gpa: int, length: int, *, write: bool = False) -> list[memoryview]:
        """Return the bytes ``gpa .. gpa + length - 1`` as views, in order; one per region.

        Args:
            gpa: Bytes, any alignment.
            length: Bytes, 0 gives an empty list.
            write: The caller is going to store there: read-only regions are refused.

        Raises:
            GuestProtocolError: Part of the range is not memory, or not writable.
        """
        found: list[memoryview] = []
        try:
            while length > 0:
                region = self._find(gpa)
                if write and region.read_only:
                    raise _read_only(gpa)
                start = gpa - region.gpa
                piece = region.view[start : start + length]
                found.append(piece)
                gpa += len(piece)
                length -= len(piece)
        except GuestProtocolError:
            _release(found)
            raise
        return found

    def page(self, pfn: int, *, write: bool = True) -> memoryview:
        """Return guest page ``pfn`` (4096 bytes). Raises GuestProtocolError."""
        return self.views(pfn << PAGE_SHIFT, PAGE_SIZE, write=write)[0]

    def contains(self, gpa: int, length: int, *, write: bool = False) -> bool:
        """Whether the whole range is memory (writable memory, with ``write``)."""
        try:
            self.views(gpa, length, write=write)
        except GuestProtocolError:
            return False
        return True

    def check_pages(self, pfns: Sequence[int], *, write: bool = False) -> None:
        """Prove that pages, in any order, are memory; in a tenth of the time of :meth:`gather`.

        Raises:
            GuestProtocolError: One is not memory, or not writable.
        """
        if not pfns:
            return
        region = self._find(min(pfns) << PAGE_SHIFT)
        if max(pfns) << PAGE_SHIFT < region.end:
            if write and region.read_only:
                raise _read_only(min(pfns) << PAGE_SHIFT)
            return
        ordered = sorted(pfns)
        done = 0
        while done < len(ordered):
            region = self._find(ordered[done] << PAGE_SHIFT)
            if write and region.read_only:
                raise _read_only(ordered[done] << PAGE_SHIFT)
            done = bisect.bisect_left(ordered, region.end >> PAGE_SHIFT, done)

    def gather(
        self, byte_offset: int, byte_count: int, pfns: Sequence[int], *, write: bool = False
    ) -> list[memoryview]:
        """Turn a GPA range (offset into the first page, length, page list) into views.

        Neighbouring pages are joined into one view. The caller has checked that ``pfns`` has
        exactly as many entries as the range touches (:mod:`vmbus.wire.gpa`).

        Raises:
            GuestProtocolError: A page is not memory, or not writable.
        """
        count = len(pfns)
        if count == 1 or _are_neighbours(pfns):
            # The common cases, 4 KiB and a buffer in one piece: one look-up.
            gpa = (pfns[0] << PAGE_SHIFT) + byte_offset
            region = self._last
            if region is None or not region.gpa <= gpa < region.end:
                region = self._find(gpa)
            if gpa + byte_count <= region.end:
                if write and region.read_only:
                    raise _read_only(gpa)
                start = gpa - region.gpa
                return [region.view[start : start + byte_count]]
        found: list[memoryview] = []
        if not count:
            return found
        broken = map(_ONE_FURTHER, map(operator.sub, pfns[1:], pfns))
        starts = [0, *itertools.compress(range(1, count), broken), count]
        region = self._find(min(pfns) << PAGE_SHIFT)
        excess = (count << PAGE_SHIFT) - byte_offset - byte_count
        if max(pfns) << PAGE_SHIFT < region.end and 0 <= excess < PAGE_SIZE:
            # All in one region: a guest chooses how many pieces there are, so each must be cheap.
            if write and region.read_only:
                raise _read_only(pfns[0] << PAGE_SHIFT)
            found = _pieces(region, pfns, starts)
            if byte_offset:
                found[0] = found[0][byte_offset:]
            if excess:
                found[-1] = found[-1][:-excess]
            return found
        try:
            for first, end in itertools.pairwise(starts):
                if byte_count <= 0:
                    break
                gpa = (pfns[first] << PAGE_SHIFT) + byte_offset
                length = min(((end - first) << PAGE_SHIFT) - byte_offset, byte_count)
                region = self._last
                if region is not None and region.gpa <= gpa and gpa + length <= region.end:
                    if write and region.read_only:
                        raise _read_only(gpa)
                    start = gpa - region.gpa
                    found.append(region.view[start : start + length])
                else:
                    found += self.views(gpa, length, write=write)
                byte_count -= length
                byte_offset = 0
        except GuestProtocolError:
            _release(found)
            raise
        return found

    def read(self, gpa: int, length: int) -> bytes:
        """Copy ``length`` bytes out of guest memory. Raises GuestProtocolError."""
        return b"".join(self.views(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into guest memory; not for control words. Raises GuestProtocolError."""
        source = memoryview(data).cast("B")
        for view in self.views(gpa, len(source), write=True):
            view[:] = source[: len(view)]
            source = source[len(view) :]


def total_length(views: Sequence[memoryview]) -> int:
    """Sum of the lengths of byte views, in bytes."""
    return len(views[0]) if len(views) == 1 else sum(map(len, views))


def window(views: Iterable[memoryview], start: int, length: int) -> list[memoryview]:
    """Return the part of a scatter list from byte ``start``, ``length`` bytes long, uncopied.

    Returns:
        Views of the same memory; shorter in total if the list ends before.
    """
    pieces: list[memoryview] = []
    for view in views:
        size = len(view)
        if start >= size:
            start -= size
            continue
        if length <= 0:
            break
        piece = view[start : start + length] if start or length < size else view
        pieces.append(piece)
        length -= len(piece)
        start = 0
    return pieces


class Cutter:
    """Cuts a scatter list into parts, from front to back, uncopied, going through it once.

    :func:`window` would begin at the front for each part: a guest chooses thousands of both.

    Args:
        views: The list; it must stay as it is meanwhile.
    """

    __slots__ = ("_index", "_start", "_views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._index = 0
        self._start = 0

    def take(self, length: int) -> list[memoryview]:
        """Return the next ``length`` bytes, or as many as there are. Cannot block."""
        views, index, start = self._views, self._index, self._start
        pieces: list[memoryview] = []
        while length > 0 and index < len(views):
            view = views[index]
            left = len(view) - start
            if left <= length:
                pieces.append(view[start:] if start else view)
                length -= left
                index += 1
                start = 0
            else:
                pieces.append(view[start : start + length])
                start += length
                length = 0
        self._index, self._start = index, start
        return pieces


# -- memory that this process makes itself ---------------------------------------------------------


def create_memfd(name: str, size: int) -> int:
    """Return a new memfd of ``size`` zero bytes that can neither shrink nor grow any more.

    Args:
        name: Shown in ``/proc/PID/maps``.
        size: Bytes, a multiple of the page size, not 0.

    Returns:
        A file descriptor that the caller owns. It is closed on ``exec``.

    Raises:
        ConfigError: ``size`` is not a number of pages.
        OSError: The system would not make it.
    """
    if size <= 0 or size % PAGE_SIZE:
        raise ConfigError(f"memory of {size} bytes: must be whole pages")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def allocate_memory(*sizes: int) -> GuestMemory:
    """Return guest memory that begins at address 0, one region (and memfd) per size, gapless.

    Args:
        *sizes: Bytes of each region, multiples of the page size.

    Raises:
        ConfigError: A size is not a number of pages.
        OSError: The system would not make it.
    """
    memory = GuestMemory()
    gpa = 0
    try:
        for size in sizes:
            fd = create_memfd("vmbus-guest-memory", size)
            try:
                memory.add_region(gpa, size, fd)
            finally:
                os.close(fd)
            gpa += size
    except BaseException:
        memory.close()
        raise
    return memory
