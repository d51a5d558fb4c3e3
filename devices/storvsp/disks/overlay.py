"""``overlay:SPEC``: copy on write over any other disk.

``overlay:raw:base.img`` keeps what is written in memory, ``overlay:[scratch=PATH]raw:base.img``
in a sparse scratch file. The disk below is only ever read: an image is opened like ``ro``, so any
number of overlays can share it, and nobody can write it meanwhile. Nothing survives closing: the
record of what was written lives in memory, so a scratch file is of no use afterwards. It therefore
gets no name for longer than it takes to open it: ``PATH`` is a directory, or a file that does not
exist yet.

How it works
------------
The scratch is a disk of the same size; a sector lives at the same offset in both. For every
cluster of 64 KiB one byte says where its sectors are: all below, all in the scratch, or mixed,
and for mixed ones a bit mask has one bit per sector. A request whose clusters agree goes to its
layer in one piece and inline if that layer can; only mixed ones are cut up.

A sector belongs to the scratch from the moment its write has completed. Trimmed and zeroed
sectors belong to the scratch too, where they take no space: the old data must not shine through.
"""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from storvsp.disk import (
    EXTENTS_AT_ONCE,
    Buffers,
    Disk,
    DiskInfo,
    DiskUnavailableError,
    Extent,
)
from storvsp.disks.buffers import check_range, merge_extents
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.specs import DiskSpec, open_disk
from vmbus.errors import ConfigError
from vmbus.memory import Cutter, total_length
from vmbus.plugins.options import Option
from vmbus.workers import shared_pool

CLUSTER = 1 << 16
"""Bytes tracked together while all of them are in one layer."""

RUNS_AT_ONCE: Final = 256
"""Places where the layer changes that a read looks at in one step. A guest can make every second
sector one."""
MARK_STEP: Final = 1 << 28
"""Bytes of which the clusters are marked in one step: 4096 clusters, each with a mask at worst."""

_SHIFT = 16
_BELOW, _MIXED, _SCRATCH = 0, 1, 2

OPTIONS = (
    Option(
        "scratch",
        "a directory, or a file that does not exist yet, for what is written until it is closed",
        "PATH",
        "in memory",
    ),
)


class OverlayDisk(Disk):
    """Two layers that look like one disk; the lower one is never written.

    Args:
        base: The lower layer.
        scratch: The upper layer: writable, all zeros, as large as ``base`` and with sectors no
            larger. The default is a :class:`~storvsp.disks.ram.RamDisk`.

    Both are owned from now on. The capacity is the one ``base`` has now.

    Raises:
        ConfigError: The layers do not fit.
    """

    def __init__(self, base: Disk, scratch: Disk | None = None) -> None:
        lower = base.info
        if scratch is None:
            scratch = RamDisk(lower.size, sector_size=lower.sector_size)
        upper = scratch.info
        if upper.read_only or upper.size < lower.size or lower.sector_size % upper.sector_size:
            raise ConfigError(
                f"the scratch has to be writable, with at least {lower.size} bytes in sectors of"
                f" {lower.sector_size} bytes or less"
            )
        self.base = base
        self.scratch = scratch
        self._info = dataclasses.replace(
            lower,
            read_only=False,
            supports_unmap=upper.supports_unmap,
            unmap_granularity=upper.unmap_granularity,
            unmapped_reads_zero=upper.unmapped_reads_zero,
            write_cache=upper.write_cache,
            # Beside its base in one guest, the overlay must not claim to be the same disk.
            identity=b"",
            serial="",
        )
        self._size = lower.size
        self._sector = lower.sector_size
        self._full = (1 << (CLUSTER // lower.sector_size)) - 1
        self._layers = {_BELOW: base, _SCRATCH: scratch}
        self._state = bytearray(-(-lower.size // CLUSTER))
        self._masks: dict[int, int] = {}
        self._turn = trio.Lock()

    @property
    def info(self) -> DiskInfo:
        return self._info

    @property
    def diverged(self) -> int:
        """Bytes that are served from the scratch, in whole clusters."""
        return (len(self._state) - self._state.count(_BELOW)) * CLUSTER

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        length = total_length(buffers)
        if offset + length > self._size:
            self._refuse(offset, length)
        layer = self._single_layer(offset, length)
        if layer is not None:
            return layer.try_readv(offset, buffers)
        runs = list(itertools.islice(self._runs(offset, length), RUNS_AT_ONCE + 1))
        if len(runs) > RUNS_AT_ONCE:
            return False  # the slow form does it in steps
        cutter = Cutter(buffers)
        for begin, size, upper in runs:
            layer = self.scratch if upper else self.base
            if not layer.try_readv(begin, cutter.take(size)):
                return False
        return True

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        length = total_length(buffers)
        if offset + length > self._size:
            self._refuse(offset, length)
        if not self.scratch.try_writev(offset, buffers, fua=fua):
            return False
        self._mark(offset, length)
        return True

    async def readv(self, offset: int, buffers: Buffers) -> None:
        length = total_length(buffers)
        if offset + length > self._size:
            self._refuse(offset, length)
        end = offset + length
        cutter = Cutter(buffers)
        while True:
            # Decided for some runs at a time: what completes while we wait may or may not be seen,
            # as on any disk.
            runs = list(itertools.islice(self._runs(offset, end - offset), RUNS_AT_ONCE))
            for begin, size, upper in runs:
                layer = self.scratch if upper else self.base
                piece = cutter.take(size)
                if not layer.try_readv(begin, piece):
                    await layer.readv(begin, piece)
                offset = begin + size
            if offset >= end:
                return
            async with self._turn:  # one step of all that is under way in a turn of the loop
                pass

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        length = total_length(buffers)
        if offset + length > self._size:
            self._refuse(offset, length)
        if not self.scratch.try_writev(offset, buffers, fua=fua):
            await self.scratch.writev(offset, buffers, fua=fua)
        self._mark(offset, length)

    async def flush(self) -> None:
        if self._size < 0:
            self._refuse(0, 0)
        await self.scratch.flush()

    async def unmap(self, offset: int, length: int) -> None:
        if offset + length > self._size:
            self._refuse(offset, length)
        if self._info.supports_unmap:
            for at, size in _steps(offset, length):
                await self.scratch.unmap(at, size)
                await self._mark_in_turn(at, size)

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        if sum(length for _, length in ranges) > MARK_STEP:
            await super().unmap_many(ranges)
            return
        for offset, length in ranges:
            if offset + length > self._size:
                self._refuse(offset, length)
        if self._info.supports_unmap:
            await self.scratch.unmap_many(ranges)
            async with self._turn:
                for offset, length in ranges:
                    self._mark(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        if offset + length > self._size:
            self._refuse(offset, length)
        for at, size in _steps(offset, length):
            await self.scratch.write_zeroes(at, size, may_unmap=may_unmap)
            await self._mark_in_turn(at, size)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if offset + length > self._size:
            self._refuse(offset, length)
        runs = list(itertools.islice(self._runs(offset, length), EXTENTS_AT_ONCE))
        # Each layer is asked once, about all that it has of these runs.
        said: dict[bool, list[Extent]] = {}
        for upper in {run[2] for run in runs}:
            mine = [run for run in runs if run[2] is upper]
            begin, end = mine[0][0], mine[-1][0] + mine[-1][1]
            said[upper] = await (self.scratch if upper else self.base).extents(begin, end - begin)
        return merge_extents(_pick(runs, said))

    async def aclose(self) -> None:
        self._size = -1  # every range is outside now, at no cost to an open disk
        try:
            await self.scratch.aclose()
        finally:
            await self.base.aclose()

    def _refuse(self, offset: int, length: int) -> None:
        if self._size < 0:
            raise DiskUnavailableError("the overlay is closed")
        check_range(offset, length, self._size)

    def _single_layer(self, offset: int, length: int) -> Disk | None:
        """The layer that holds a whole range, or None if it takes both or needs a closer look."""
        first = offset >> _SHIFT
        last = (offset + length - 1) >> _SHIFT
        if first == last:
            state = self._state[first]
            if state == _MIXED:
                wanted = (1 << length // self._sector) - 1
                found = self._masks[first] >> (offset % CLUSTER) // self._sector & wanted
                return self.scratch if found == wanted else None if found else self.base
            return self._layers[state]
        states = self._state[first : last + 1]
        if not states:  # an empty range on a cluster border
            return self.base
        state = states[0]
        if state == _MIXED or states.count(state) != len(states):
            return None
        return self._layers[state]

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cut a range where the layer changes: (offset, bytes, in the scratch)."""
        end = offset + length
        start, current = offset, False
        for begin, upper in self._changes(offset, end):
            if upper != current:
                if begin > start:
                    yield start, begin - start, current
                start, current = begin, upper
        if end > start:
            yield start, end - start, current

    def _changes(self, offset: int, end: int) -> Iterator[tuple[int, bool]]:
        """Places where the layer may change, and the layer from there on."""
        while offset < end:
            cluster = offset >> _SHIFT
            state = self._state[cluster]
            if state == _MIXED:
                mask = self._masks[cluster] >> (offset % CLUSTER) // self._sector
                stop = min(end, (cluster + 1) << _SHIFT)
                while offset < stop:
                    upper = bool(mask & 1)
                    yield offset, upper
                    # As many equal bits as there are, in one step.
                    run = (~mask if upper else mask) & -(~mask if upper else mask)
                    count = run.bit_length() - 1 if run else stop
                    mask >>= count
                    offset += count * self._sector
                offset = stop
            else:
                yield offset, state == _SCRATCH
                offset = self._next_other(cluster, state, end) << _SHIFT

    def _next_other(self, cluster: int, state: int, end: int) -> int:
        """The first cluster after ``cluster`` that is in another state, or one behind ``end``."""
        last = (end - 1) >> _SHIFT
        candidates = [
            found
            for other in (_BELOW, _MIXED, _SCRATCH)
            if other != state and (found := self._state.find(other, cluster, last + 1)) >= 0
        ]
        return min(candidates, default=last + 1)

    async def _mark_in_turn(self, offset: int, length: int) -> None:
        """As :meth:`_mark`, but one such step of all that is under way in a turn of the loop."""
        async with self._turn:
            self._mark(offset, length)

    def _mark(self, offset: int, length: int) -> None:
        """Record that a range of whole sectors is in the scratch.

        Takes the time of the clusters in the range, however many are mixed elsewhere.
        """
        if not length:
            return
        end = offset + length
        first = offset >> _SHIFT
        last = (end - 1) >> _SHIFT
        if first == last:
            self._mark_part(first, offset % CLUSTER, end - (first << _SHIFT))
            return
        self._mark_part(first, offset % CLUSTER, CLUSTER)
        self._mark_part(last, 0, end - (last << _SHIFT))
        if last - first > 1:
            cluster = self._state.find(_MIXED, first + 1, last)
            while cluster >= 0:
                del self._masks[cluster]
                cluster = self._state.find(_MIXED, cluster + 1, last)
            self._state[first + 1 : last] = bytes((_SCRATCH,)) * (last - first - 1)

    def _mark_part(self, cluster: int, begin: int, end: int) -> None:
        """Record part of a cluster, from byte ``begin`` to ``end`` of it."""
        if self._state[cluster] == _SCRATCH:
            return
        count = (end - begin) // self._sector
        mask = self._masks.get(cluster, 0) | ((1 << count) - 1) << begin // self._sector
        # The last cluster of a disk may be cut short: it is full when its sectors are there.
        present = min(CLUSTER, self._info.size - (cluster << _SHIFT)) // self._sector
        if mask == self._full >> (CLUSTER // self._sector - present):
            self._masks.pop(cluster, None)
            self._state[cluster] = _SCRATCH
        else:
            self._masks[cluster] = mask
            self._state[cluster] = _MIXED


def _steps(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range that a guest may choose as large as the disk."""
    for at in range(0, length, MARK_STEP):
        yield offset + at, min(MARK_STEP, length - at)


def _pick(
    runs: Iterable[tuple[int, int, bool]], said: Mapping[bool, Iterable[Extent]]
) -> Iterator[Extent]:
    """Take of each layer's extents what lies in its own runs, as far as they go.

    Args:
        runs: (offset, bytes, in the scratch), in order.
        said: The extents of each layer, in order; they begin with its first run or before, and
            may end early.
    """
    extents = {upper: iter(each) for upper, each in said.items()}
    current: dict[bool, Extent | None] = {
        upper: next(each, None) for upper, each in extents.items()
    }
    for begin, size, upper in runs:
        position, end = begin, begin + size
        while position < end:
            extent = current[upper]
            if extent is None:
                return
            stop = min(extent.offset + extent.length, end)
            if stop > position:
                yield Extent(position, stop - position, extent.mapped)
                position = stop
            if position < end:
                current[upper] = next(extents[upper], None)


def _make_scratch(place: str, size: int) -> int:
    """Open a nameless sparse file at ``place`` (a directory or a new name). Blocks."""
    if Path(place).is_dir():
        try:
            fd = os.open(place, os.O_RDWR | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise ConfigError(
                f"the file system of {place} has no nameless files; give scratch= a file name"
            ) from error
    else:
        try:
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise ConfigError(
                f"the scratch file {place} exists; give a new name, or a directory"
            ) from error
        os.unlink(place)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def open_scratch(place: str, base: DiskInfo) -> RawDisk:
    """Make a scratch file for an overlay. A checkpoint.

    Args:
        place: A directory, or the name of a file to be made; it gets no lasting name.
        base: The disk it is for.

    Raises:
        ConfigError: The file exists, or the file system will not have it.
        OSError: The file could not be made.
    """
    pool = shared_pool()
    try:
        fd = await pool.run(_make_scratch, place, base.size)
        try:
            return RawDisk(fd, sector_size=base.sector_size)
        except BaseException:
            os.close(fd)
            raise
    finally:
        await pool.aclose()


async def open_spec(spec: DiskSpec) -> OverlayDisk:
    """Open ``overlay:[scratch=PATH]SPEC``."""
    options = spec.reader()
    place = options.text("scratch")
    options.finish()
    async with contextlib.AsyncExitStack() as stack:
        base = await open_disk(dataclasses.replace(spec.inner(), base=True))
        stack.push_async_callback(base.aclose)
        scratch = await open_scratch(place, base.info) if place else None
        overlay = OverlayDisk(base, scratch)
        stack.pop_all()
    return overlay
