"""``delay:[read=1ms,...]SPEC``: another disk with the manners of a slow one.

Each kind of operation takes at least the time given for it, on top of what the disk below needs;
many requests wait at the same time, so latency goes up but the number of requests in flight does
not go down. Operations without a delay keep their fast path. Times are trio's, so tests with a
:class:`trio.testing.MockClock` need not wait.
"""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

from collections.abc import Sequence

import trio

from storvsp.disk import Buffers, Disk
from storvsp.disks.specs import DiskSpec, open_disk
from storvsp.disks.wrapper import DiskWrapper
from vmbus.plugins.options import Option

OPTIONS = (
    Option("read", "how much longer a read takes", "TIME", "0"),
    Option("write", "how much longer a write takes, or writing zeros", "TIME", "0"),
    Option("flush", "how much longer a flush takes", "TIME", "0"),
    Option("unmap", "how much longer an unmap takes", "TIME", "0"),
)


class DelayDisk(DiskWrapper):
    """Delays the operations of another disk.

    Args:
        base: The disk below, owned from now on.
        read: Seconds that a read takes longer.
        write: The same for a write or write_zeroes.
        flush: The same for a flush.
        unmap: The same for an unmap.
    """

    def __init__(
        self,
        base: Disk,
        *,
        read: float = 0.0,
        write: float = 0.0,
        flush: float = 0.0,
        unmap: float = 0.0,
    ) -> None:
        super().__init__(base)
        self.read_delay = read
        self.write_delay = write
        self.flush_delay = flush
        self.unmap_delay = unmap

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return not self.read_delay and super().try_readv(offset, buffers)

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        return not self.write_delay and super().try_writev(offset, buffers, fua=fua)

    async def readv(self, offset: int, buffers: Buffers) -> None:
        await _pause(self.read_delay)
        await super().readv(offset, buffers)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        await _pause(self.write_delay)
        await super().writev(offset, buffers, fua=fua)

    async def flush(self) -> None:
        await _pause(self.flush_delay)
        await super().flush()

    async def unmap(self, offset: int, length: int) -> None:
        await _pause(self.unmap_delay)
        await super().unmap(offset, length)

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        await _pause(self.unmap_delay)  # it is one operation
        await super().unmap_many(ranges)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        await _pause(self.write_delay)
        await super().write_zeroes(offset, length, may_unmap=may_unmap)


async def _pause(seconds: float) -> None:
    if seconds:
        await trio.sleep(seconds)


async def open_spec(spec: DiskSpec) -> DelayDisk:
    """Open ``delay:[read=TIME,write=TIME,flush=TIME,unmap=TIME]SPEC``."""
    options = spec.reader()
    read = options.duration("read")
    write = options.duration("write")
    flush = options.duration("flush")
    unmap = options.duration("unmap")
    options.finish()
    base = await open_disk(spec.inner())
    return DelayDisk(base, read=read, write=write, flush=flush, unmap=unmap)
