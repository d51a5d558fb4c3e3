"""A disk as the guest's upper layers see it: blocks in and out, flush, unmap."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from storvsp.guest.adapter import StorvscAdapter
from storvsp.guest.replies import Result, ScsiError

_CDB_10 = struct.Struct(">BBIBHB")
_CDB_16 = struct.Struct(">BBQIBB")
_UNMAP_HEADER = struct.Struct(">HH4x")
_UNMAP_RANGE = struct.Struct(">QI4x")

READ_10, READ_16 = 0x28, 0x88
WRITE_10, WRITE_16 = 0x2A, 0x8A
SYNCHRONIZE_CACHE_10 = 0x35
WRITE_SAME_16 = 0x93
UNMAP = 0x42
_FUA = 0x08
_WRITE_SAME_UNMAP = 0x08


class GuestDisk:
    """One logical unit; made by :func:`storvsp.guest.scan.scan`.

    Args:
        adapter: Where it was found.
        path: Address of the unit.
        target: Address of the unit.
        lun: Address of the unit.
        inquiry: Its standard INQUIRY data, 36 bytes or more.
    """

    def __init__(
        self, adapter: StorvscAdapter, path: int, target: int, lun: int, inquiry: bytes
    ) -> None:
        self.adapter = adapter
        self.path = path
        self.target = target
        self.lun = lun
        self.inquiry = inquiry
        self.block_size = 0
        """Bytes; 0 if it has no medium."""
        self.block_count = 0

    def __repr__(self) -> str:
        return f"<GuestDisk {self.path}:{self.target}:{self.lun}, {self.size} bytes>"

    @property
    def device_type(self) -> int:
        """Peripheral device type: 0 disk, 5 CD (SPC-3 6.4.2)."""
        return self.inquiry[0] & 0x1F if self.inquiry else 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.block_size * self.block_count

    async def execute(
        self, cdb: bytes, *, write: bytes | None = None, read: int = 0, offset: int = 0
    ) -> Result:
        """Run any command on this unit; see :meth:`StorvscAdapter.execute`. A checkpoint."""
        return await self.adapter.execute(
            cdb,
            write=write,
            read=read,
            path=self.path,
            target=self.target,
            lun=self.lun,
            offset=offset,
        )

    async def command(
        self, what: str, cdb: bytes, *, write: bytes | None = None, read: int = 0
    ) -> bytes:
        """Run a command that has to succeed; return what was read. A checkpoint.

        Raises:
            ScsiError: It has failed.
        """
        result = await self.execute(cdb, write=write, read=read)
        if not result.good:
            raise ScsiError(what, result)
        return result.data

    def _cdb(self, short: int, long: int, flags: int, block: int, count: int) -> bytes:
        """Return a 10-byte command as long as the numbers fit, else one of 16 bytes."""
        if block + count <= 0xFFFF_FFFF and count <= 0xFFFF:
            return _CDB_10.pack(short, flags, block, 0, count, 0)
        return _CDB_16.pack(long, flags, block, count, 0, 0)

    def _blocks_per_request(self) -> int:
        # A drive without a medium has no block size; its answer to one block says why.
        return max(1, self.adapter.max_transfer // (self.block_size or 512))

    async def read(self, block: int, count: int) -> bytes:
        """Read ``count`` blocks, in as many requests as it takes. A checkpoint.

        Raises:
            ScsiError: A request has failed or come back short.
        """
        parts = []
        most = self._blocks_per_request()
        while count:
            some = min(count, most)
            size = some * self.block_size
            cdb = self._cdb(READ_10, READ_16, 0, block, some)
            result = await self.execute(cdb, read=size)
            if not result.good or result.transferred != size:
                raise ScsiError(f"READ of {some} blocks at {block}", result)
            parts.append(result.data)
            block += some
            count -= some
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, block: int, data: bytes, *, fua: bool = False) -> None:
        """Write whole blocks, in as many requests as it takes. A checkpoint.

        Args:
            block: First block.
            data: A multiple of the block size.
            fua: Not done until the data is on the medium.

        Raises:
            ValueError: ``data`` is no multiple of the block size.
            ScsiError: A request has failed or come back short.
        """
        if len(data) % self.block_size:
            raise ValueError(f"{len(data)} bytes are no whole blocks of {self.block_size}")
        step = self._blocks_per_request() * self.block_size
        flags = _FUA if fua else 0
        for start in range(0, len(data), step):
            part = data[start : start + step]
            some = len(part) // self.block_size
            cdb = self._cdb(WRITE_10, WRITE_16, flags, block, some)
            result = await self.execute(cdb, write=part)
            if not result.good or result.transferred != len(part):
                raise ScsiError(f"WRITE of {some} blocks at {block}", result)
            block += some

    async def flush(self) -> None:
        """Put everything written so far onto the medium. A checkpoint.

        Raises:
            ScsiError: It has failed.
        """
        await self.command("SYNCHRONIZE CACHE", _CDB_10.pack(SYNCHRONIZE_CACHE_10, 0, 0, 0, 0, 0))

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Give up ``(block, count)`` ranges. A checkpoint.

        Raises:
            ScsiError: It has failed.
        """
        body = b"".join(_UNMAP_RANGE.pack(block, count) for block, count in ranges)
        data = _UNMAP_HEADER.pack(len(body) + 6, len(body)) + body
        cdb = struct.pack(">B6xHx", UNMAP, len(data))
        await self.command("UNMAP", cdb, write=data)

    async def write_same(
        self, block: int, count: int, pattern: bytes, *, unmap: bool = False
    ) -> None:
        """Write one block's worth of ``pattern`` to ``count`` blocks. A checkpoint.

        Raises:
            ScsiError: It has failed.
        """
        flags = _WRITE_SAME_UNMAP if unmap else 0
        cdb = _CDB_16.pack(WRITE_SAME_16, flags, block, count, 0, 0)
        await self.command("WRITE SAME", cdb, write=pattern)
