"""A direct-access block device without its commands: state, checks and moving of data.

The command handlers are plain functions in :mod:`storvsp.scsi.disk_blocks`,
:mod:`storvsp.scsi.disk_verify`, :mod:`storvsp.scsi.disk_provision` and
:mod:`storvsp.scsi.reserve_commands`; :mod:`storvsp.scsi.disk_unit` puts them into one table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final

import trio

from storvsp.disk import Disk
from storvsp.scsi import sense
from storvsp.scsi.base import DispatchUnit
from storvsp.scsi.cdb import (
    Transfer,
    check_transfer_flags_untrusted,
    decode_transfer_untrusted,
)
from storvsp.scsi.inquiry import Identity, block_pages
from storvsp.scsi.medium import Medium
from storvsp.scsi.modes import (
    CACHING,
    CONTROL,
    SOFTWARE_WRITE_PROTECT,
    WRITE_CACHE_ENABLED,
    ModePages,
    disk_pages,
)
from storvsp.scsi.pace import step
from storvsp.scsi.removable import Tray
from storvsp.scsi.reservations import Reservations
from storvsp.scsi.sense import CheckCondition, Sense, invalid_cdb_field, out_of_range
from storvsp.scsi.table import Access
from storvsp.scsi.unit import STEP, Command, DataDirection, split
from vmbus.memory import window

CHUNK: Final = 1 << 20
"""Bytes of host memory a command that compares or repeats data works with at a time."""

BULK: Final = 8
"""Commands of one guest to a unit that hold :data:`CHUNK` bytes at the same time; it may have
thousands of requests under way."""

_DISK: Final = 0x00
_SBC_3: Final = 0x04C0


class DiskCore(DispatchUnit):
    """See :class:`storvsp.scsi.disk_unit.DiskUnit`."""

    def __init__(
        self, disk: Disk, *, luns: Callable[[], Iterable[int]], identity: bytes = b""
    ) -> None:
        info = disk.info
        self.disk = Medium(disk, self.refresh)
        self.tray = Tray()
        self.reservations = Reservations()
        self.blocks = info.size // info.sector_size
        """Capacity in logical blocks."""
        self._sector_size = info.sector_size
        self._read_only = info.read_only
        unique = info.identity or identity or os.urandom(16)
        self._identity = Identity(
            device_type=_DISK,
            product=b"Virtual Disk    ",
            removable=info.removable,
            unique=unique,
            serial=info.serial.encode("ascii", "replace") or unique.hex().encode(),
            standard=_SBC_3,
        )
        limit = min(info.max_transfer or STEP, STEP)
        self.limit = max(limit - limit % info.sector_size, info.sector_size)
        """Bytes handed to the back-end at once."""
        self.chunk = min(self.limit, CHUNK)
        """Bytes a command works on at a time in the host's memory."""
        self._bulk: dict[Hashable, trio.Semaphore] = {}
        self._turn = trio.Lock()
        self.readers: set[Hashable] = set()
        """Initiators whose reads nothing is in the way of."""
        self.writers: set[Hashable] = set()
        """Initiators whose writes nothing is in the way of."""
        self.write_through = False
        """Every write has to be durable, because the write cache is off."""
        super().__init__(luns, ModePages(disk_pages(write_cache=info.write_cache)))
        self._unwatch = disk.watch(self._resized)

    @property
    def name(self) -> str:
        """What operators call it."""
        return self.disk.name

    @name.setter
    def name(self, name: str) -> None:
        self.disk.name = name

    def identity(self) -> Identity:
        """Return who the unit is."""
        return self._identity

    def vital_pages(self) -> dict[int, bytes]:
        """Return the bodies of the VPD pages, except page 00."""
        return block_pages(self._identity, self.disk.info)

    def not_ready(self) -> Sense | None:
        """Return why the medium cannot be used: the guest ejected it, or it has no blocks."""
        if self.tray.open:
            return Sense(sense.NOT_READY, sense.MEDIUM_NOT_PRESENT_TRAY_OPEN)
        if not self.blocks:
            return Sense(sense.NOT_READY, sense.MEDIUM_NOT_PRESENT)
        return None

    def mode_header(self, *, wide: bool) -> tuple[int, bytes]:
        """Return WP and DPOFUA, and a block descriptor (SBC-3 6.4.2)."""
        specific = 0x10 | (0x80 if self.write_protection() is not None else 0)
        blocks = self.blocks
        if wide:
            return specific, blocks.to_bytes(8, "big") + self._sector_size.to_bytes(8, "big")
        short = min(blocks, 0xFFFFFFFF)
        return specific, short.to_bytes(4, "big") + self._sector_size.to_bytes(4, "big")

    @property
    def sector_size(self) -> int:
        """Bytes per logical block."""
        return self._sector_size

    @property
    def cached(self) -> bool:
        """Whether completed writes may still be volatile."""
        return bool(self.modes.current(CACHING)[2] & WRITE_CACHE_ENABLED)

    def bulk(self, command: Command) -> trio.Semaphore:
        """Return what a command holds that works in the host's memory.

        One of them for each guest: those of one that is paused stand still with it.
        """
        return self._bulk.setdefault(command.initiator, trio.Semaphore(BULK))

    def write_protection(self) -> int | None:
        """Return the ASC/ASCQ with which writes are refused, or None if they are not."""
        if self._read_only:
            return sense.WRITE_PROTECTED
        if self.modes.current(CONTROL)[4] & SOFTWARE_WRITE_PROTECT:
            return sense.SOFTWARE_WRITE_PROTECTED
        return None

    def refresh(self) -> None:
        """Recompute what the fast path relies on."""
        self.readers = set()
        self.writers = set()
        self.write_through = not self.cached and self.disk.info.write_cache
        if self.gate.closed or self.disk.stopped or self.not_ready() is not None:
            return
        writable = self.write_protection() is None
        for initiator in self.attentions:
            if self.attentions.pending(initiator):
                continue
            if not self.conflicts(initiator, Access.READ, b""):
                self.readers.add(initiator)
            if writable and not self.conflicts(initiator, Access.WRITE, b""):
                self.writers.add(initiator)

    def conflicts(self, initiator: Hashable, access: Access, cdb: bytes) -> bool:
        """Whether a reservation of somebody else is in the way of a command."""
        return self.reservations.conflicts(initiator, access, cdb)

    def reset(self) -> None:
        """Do a logical unit reset; also drops the RESERVE reservation and medium locks."""
        self.reservations.release_any()
        self.tray.unlock_all()
        super().reset()

    def describe(self) -> dict[str, Any]:
        """Return why the disk has been stopped, and how often it had no room."""
        return {"stopped": self.disk.stopped, "no_space": self.disk.full}

    def detach(self, initiator: Hashable) -> None:
        """Forget an initiator; see the base class."""
        self.reservations.release(initiator)
        self.tray.lock(initiator, prevent=False)
        self._bulk.pop(initiator, None)
        super().detach(initiator)

    def close(self) -> None:
        """Abort what is in progress and stop watching the disk."""
        super().close()
        self._unwatch()

    def _resized(self) -> None:
        blocks = self.disk.info.size // self._sector_size
        if blocks != self.blocks:
            self.blocks = blocks
            self.raise_attention(sense.CAPACITY_DATA_HAS_CHANGED)

    # Checks and data movement for the handlers.

    async def turn(self) -> None:
        """Wait for one's turn to do some work that takes a while without waiting. A checkpoint.

        One command of the unit has it in each turn of the loop: a guest may have thousands of them
        under way, and each may be ready to go on.
        """
        async with self._turn:
            return

    def check_ready(self) -> None:
        """Raise NOT READY if there is no medium."""
        reason = self.not_ready()
        if reason is not None:
            raise CheckCondition(reason)

    def check_writable(self) -> None:
        """Raise DATA PROTECT if the medium must not be written."""
        code = self.write_protection()
        if code is not None:
            raise CheckCondition(Sense(sense.DATA_PROTECT, code))

    def range_untrusted(self, command: Command, *, writing: bool) -> Transfer:
        """Decode and check the range of a command on the medium.

        Args:
            command: With a CDB of full length.
            writing: The command changes the medium.

        Returns:
            A range inside the disk. An empty range must begin inside it, too.

        Raises:
            CheckCondition: No medium, flags that do not exist, a write-protected medium or a
                range that is not inside the disk.
        """
        check_transfer_flags_untrusted(command.cdb)
        self.check_ready()
        transfer = decode_transfer_untrusted(command.cdb)
        if transfer.lba >= self.blocks or transfer.lba + transfer.blocks > self.blocks:
            raise out_of_range(transfer.lba, 2 if command.cdb[0] >> 5 else 1)
        if writing:
            self.check_writable()
        return transfer

    def data_out_untrusted(self, command: Command, size: int, byte: int) -> list[memoryview]:
        """Return the guest's buffers, exactly ``size`` bytes of them.

        Raises:
            CheckCondition: The guest brings less data than its CDB says; the sense data points
                at ``byte``, the length field.
        """
        if not size:
            return []
        if command.direction != DataDirection.WRITE or command.length < size:
            raise invalid_cdb_field(byte)
        return command.data if command.length == size else window(command.data, 0, size)

    async def read(self, offset: int, buffers: Sequence[memoryview], *, tried: bool = True) -> None:
        """Fill buffers from byte ``offset``, in as many steps as the back-end needs.

        With ``tried``, the first step is known to need waiting.

        Not a checkpoint unless the back-end makes it one or there is more than one step; a
        handler that calls this in a loop yields by itself.
        """
        for at, part in split(buffers, self.limit):
            if at:
                await step()
            if (at or not tried) and self.disk.try_readv(offset + at, part):
                continue
            await self.disk.readv(offset + at, part)

    async def write(
        self,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        fua: bool = False,
        tried: bool = True,
    ) -> None:
        """Write buffers at byte ``offset``; durable on return if asked for or uncached.

        A checkpoint under the same conditions as :meth:`read`.
        """
        fua = fua or self.write_through
        for at, part in split(buffers, self.limit):
            if at:
                await step()
            if (at or not tried) and self.disk.try_writev(offset + at, part, fua=fua):
                continue
            await self.disk.writev(offset + at, part, fua=fua)

    async def settle(self) -> None:
        """Make what was changed without ``write`` durable if the write cache is off."""
        if self.write_through:
            await self.disk.flush()
