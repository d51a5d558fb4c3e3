"""The hard disk: all of its commands in one table, and the fast path of READ and WRITE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from storvsp.disk import Disk, NoSpaceError
from storvsp.scsi import disk_blocks, disk_provision, disk_verify, reserve_commands
from storvsp.scsi.base import COMMON
from storvsp.scsi.cdb import FIELDS_10, FIELDS_16, READ_10, READ_16, WRITE_10, WRITE_16
from storvsp.scsi.disk_core import DiskCore
from storvsp.scsi.gate import sections
from storvsp.scsi.removable import PREVENT_ALLOW
from storvsp.scsi.table import Table, make_table
from storvsp.scsi.unit import STATUS_GOOD, Command, DataDirection, Outcome, good_outcomes

_fields_10 = FIELDS_10.unpack_from
_fields_16 = FIELDS_16.unpack_from
_TENS = frozenset((READ_10, WRITE_10))
_SIXTEENS = frozenset((READ_16, WRITE_16))
_WRITES = frozenset((WRITE_10, WRITE_16))
_TO_GUEST = DataDirection.READ
_TO_DISK = DataDirection.WRITE

_PLAIN = make_table(
    (
        *COMMON,
        PREVENT_ALLOW,
        *disk_blocks.COMMANDS,
        *disk_verify.COMMANDS,
        *disk_provision.COMMANDS,
        *reserve_commands.COMMANDS,
    )
)
_THIN = Table(_PLAIN | make_table(disk_provision.THIN_COMMANDS))


class DiskUnit(DiskCore):
    """A direct-access block device (SBC-3) over a :class:`~storvsp.disk.Disk`.

    One instance may be attached to the controllers of several guests, as a shared disk: each
    guest is an initiator, and reservations, COMPARE AND WRITE and unit attentions work between
    them. Two instances over one disk know nothing of each other.

    Args:
        disk: The back-end; stays the caller's.
        luns: Returns the LUNs of the target this unit is part of, for REPORT LUNS.
        identity: What the unit is called if the disk has no identity of its own; empty: a random
            one for the life of the unit.
    """

    def __init__(
        self, disk: Disk, *, luns: Callable[[], Iterable[int]], identity: bytes = b""
    ) -> None:
        super().__init__(disk, luns=luns, identity=identity)
        self.table = _THIN if disk.info.supports_unmap else _PLAIN
        self._good = good_outcomes(self.sector_size)
        self._try_readv = disk.try_readv
        self._try_writev = disk.try_writev

    def try_execute(self, command: Command) -> Outcome | None:
        """Run a command that needs no waiting, as the base class says.

        READ and WRITE (10) and (16) that have nothing unusual about them are done here, with one
        unpacking and one call of the disk. Everything else goes through the table.
        """
        cdb = command.cdb
        opcode = cdb[0] if len(cdb) >= 10 else 0
        if opcode in _TENS:
            _, flags, lba, _, count, control = _fields_10(cdb)
        elif opcode in _SIXTEENS and len(cdb) >= 16:
            _, flags, lba, count, _, control = _fields_16(cdb)
        else:
            return super().try_execute(command)
        size = count * self._sector_size
        if (
            flags & 0xE1
            or control & 0x04
            or not count
            or command.length != size
            or lba + count > self.blocks
            or size > self.limit
        ):
            return super().try_execute(command)
        writing = opcode in _WRITES
        try:
            if writing:
                if command.initiator not in self.writers or command.direction != _TO_DISK:
                    return super().try_execute(command)
                fua = self.write_through or flags & 0x08 != 0
                if not self._try_writev(lba * self._sector_size, command.data, fua=fua):
                    command.plan = lba, count, flags & 0x08 != 0
                    return None
            else:
                if (
                    flags & 0x08
                    or command.initiator not in self.readers
                    or command.direction != _TO_GUEST
                ):
                    return super().try_execute(command)
                if not self._try_readv(lba * self._sector_size, command.data):
                    command.plan = lba, count, False
                    return None
        except Exception as error:
            if isinstance(error, NoSpaceError) and self.disk.no_space(error):
                return None
            return self.failed(command, error, writing=writing)
        good = self._good
        return good[count] if count < len(good) else Outcome(STATUS_GOOD, b"", size)

    async def execute(self, command: Command) -> Outcome:
        """Run any command, as the base class says.

        What :meth:`try_execute` has decoded and only found not at hand goes on from there, if
        nothing that was true then has changed: readers and writers are those initiators for whom
        no reservation, attention or lack of a medium is in the way.
        """
        if command.plan is None or self._closed:
            return await super().execute(command)
        writing = command.direction == _TO_DISK
        if not self._is_plain(command):
            return await super().execute(command)
        try:
            lba, count, _ = command.plan
            return await self.in_turn(
                command,
                partial(self._move, command),
                exclusive=False,
                where=sections(lba, count),
            )
        except Exception as error:
            return self.failed(command, error, writing=writing)

    def _is_plain(self, command: Command) -> bool:
        """Whether what :meth:`try_execute` has found out is true still."""
        assert command.plan is not None
        lba, count, _ = command.plan
        allowed = self.writers if command.direction == _TO_DISK else self.readers
        return command.initiator in allowed and lba + count <= self.blocks

    async def _move(self, command: Command) -> Outcome:
        """Move the data; the command has waited for its turn, and the medium may have changed."""
        writing = command.direction == _TO_DISK
        if not self._is_plain(command):
            return await (disk_blocks.write if writing else disk_blocks.read)(self, command)
        assert command.plan is not None
        lba, _, fua = command.plan
        if writing:
            fua = fua or self.write_through
            await self.disk.writev(lba * self._sector_size, command.data, fua=fua)
        else:
            await self.disk.readv(lba * self._sector_size, command.data)
        return Outcome(STATUS_GOOD, b"", command.length)
