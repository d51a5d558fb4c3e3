"""A CD/DVD-ROM drive (MMC-6) over optical disks that come and go."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Any, Final

from storvsp.disk import Disk, DiskError
from storvsp.scsi import cdb as op, cdrom_data as mmc, sense
from storvsp.scsi.base import COMMON, DispatchUnit
from storvsp.scsi.cdb import Transfer, decode_transfer_untrusted
from storvsp.scsi.inquiry import Identity, identity_pages
from storvsp.scsi.medium import Medium
from storvsp.scsi.modes import (
    CAPABILITIES,
    TRAY_CAPABILITIES,
    TRAY_LOCKED,
    ModePages,
    cdrom_pages,
)
from storvsp.scsi.pace import step
from storvsp.scsi.removable import PREVENT_ALLOW, Tray
from storvsp.scsi.sense import CheckCondition, Sense, invalid_cdb_field, out_of_range
from storvsp.scsi.table import Access, Spec, make_table, usage
from storvsp.scsi.unit import (
    GOOD,
    STATUS_GOOD,
    STEP,
    Command,
    LogicalUnit,
    Outcome,
    data_in_untrusted,
    fill,
    split,
)
from vmbus.errors import ConfigError

_CDROM: Final = 0x05
_MMC_4: Final = 0x03A0


class CdromUnit(DispatchUnit):
    """A CD/DVD-ROM drive with a tray that the guest can open and lock.

    Args:
        disk: The medium to begin with, or None; stays the caller's.
        luns: Returns the LUNs of the target this unit is part of, for REPORT LUNS.
        identity: Name of the drive; empty: a random one for the life of the unit. The medium's
            identity is not used, because the drive stays when the medium goes.

    Raises:
        ConfigError: The medium does not have sectors of 2048 bytes.
    """

    why_fixed = "an empty drive"

    replaced = (sense.MEDIUM_MAY_HAVE_CHANGED,)  # what guests look out for with drives

    def __init__(
        self,
        disk: Disk | None = None,
        *,
        luns: Callable[[], Iterable[int]],
        identity: bytes = b"",
    ) -> None:
        self.table = TABLE
        self.tray = Tray()
        self._unwatch: Callable[[], None] = lambda: None
        self.disk: Medium | None = None
        """The medium, also while the guest has the tray open."""
        self.blocks = 0
        """Sectors of the medium; 0 without one."""
        self.event = mmc.EVENT_NONE
        """Media event that GET EVENT STATUS NOTIFICATION has to report."""
        unique = identity or os.urandom(16)
        self._identity = Identity(
            device_type=_CDROM,
            product=b"Virtual DVD-ROM ",
            removable=True,
            unique=unique,
            serial=unique.hex().encode(),
            standard=_MMC_4,
        )
        super().__init__(luns, ModePages(cdrom_pages()))
        if disk is not None:
            self.insert(disk)
            self.event = mmc.EVENT_NONE

    def insert(self, disk: Disk) -> Disk | None:
        """Put in a medium and close the tray. Cannot block.

        Args:
            disk: Stays the caller's.

        Returns:
            The medium that was there before.

        Raises:
            ConfigError: The medium does not have sectors of 2048 bytes.
        """
        self.check_medium(disk)
        old = self.disk
        self.abort()
        self._unwatch()
        self._unwatch = disk.watch(self._resized)
        self.disk = Medium(disk)
        self.tray.open = False
        self._new_medium()
        return old.disk if old is not None else None

    @staticmethod
    def check_medium(disk: Disk) -> None:
        """Raise ConfigError if a disk does not fit into the drive."""
        if disk.info.sector_size != mmc.SECTOR:
            raise ConfigError(
                f"a CD-ROM medium has sectors of {mmc.SECTOR} bytes, not {disk.info.sector_size}"
            )

    def eject(self, *, force: bool = True) -> Disk | None:
        """Take the medium out, from the host's side. Cannot block.

        Args:
            force: Take it even if the guest has locked the tray. If False, the guest of a locked
                drive is only asked to let go, as if somebody had pushed the button.

        Returns:
            The medium, or None if there is none or the tray is locked.
        """
        if self.tray.locked and not force:
            self.event = mmc.EVENT_EJECT_REQUEST
            return None
        disk, self.disk = self.disk, None
        if disk is not None:
            self._unwatch()
            self._unwatch = lambda: None
            self.abort()
            self.blocks = 0
            self.tray.unlock_all()
            self.event = mmc.EVENT_MEDIA_REMOVAL
            self.refresh()
        return disk.disk if disk is not None else None

    def introduce(self, initiator: Hashable, *, replaces: type[LogicalUnit] | None) -> None:
        """Raise what news there is; see the base class."""
        if replaces and self.disk is not None:
            self.event = mmc.EVENT_NEW_MEDIA
        super().introduce(initiator, replaces=replaces)

    def move_tray(self, *, opened: bool) -> None:
        """Open or close the tray for the guest; a medium on it goes or comes with it."""
        if self.tray.open == opened:
            return
        if opened:
            self.tray.check_unlocked()
        self.tray.open = opened
        if self.disk is not None:
            if opened:
                self.event = mmc.EVENT_MEDIA_REMOVAL
            else:
                self._new_medium()

    async def look_again(self) -> None:
        """Find out whether the medium has grown or shrunk. May be a checkpoint, never raises."""
        if self.disk is not None:
            with contextlib.suppress(DiskError):  # which a read will report
                await self.disk.look_again()

    def _resized(self) -> None:
        # A download that goes on, a session that was added: for guests that is another medium, and
        # none at all while the image is being written anew.
        if self.tray.open:
            return
        self._measure()
        if self.blocks:
            self._new_medium()
        else:
            self.event = mmc.EVENT_MEDIA_REMOVAL

    def _measure(self) -> None:
        assert self.disk is not None
        self.blocks = min(self.disk.info.size // mmc.SECTOR, 0xFFFFFFFF)

    def _new_medium(self) -> None:
        self._measure()
        self.event = mmc.EVENT_NEW_MEDIA
        self.raise_attention(sense.MEDIUM_MAY_HAVE_CHANGED)

    @property
    def sector_size(self) -> int:
        """Bytes per sector."""
        return mmc.SECTOR

    @property
    def present(self) -> bool:
        """Whether there is a medium the guest can use."""
        return bool(self.blocks) and not self.tray.open

    def identity(self) -> Identity:
        """Return who the drive is."""
        return self._identity

    def vital_pages(self) -> dict[int, bytes]:
        """Return the bodies of the VPD pages, except page 00."""
        return identity_pages(self._identity)

    def not_ready(self) -> Sense | None:
        """Return why there is nothing to read, or None."""
        if self.present:
            return None
        if self.tray.open:
            return Sense(sense.NOT_READY, sense.MEDIUM_NOT_PRESENT_TRAY_OPEN)
        return Sense(sense.NOT_READY, sense.MEDIUM_NOT_PRESENT_TRAY_CLOSED)

    def mode_header(self, *, wide: bool) -> tuple[int, bytes]:
        """Return an empty header: drives have no block descriptors (MMC-6 6.8)."""
        del wide
        return 0, b""

    def refresh(self) -> None:
        """Show the lock in mode page 2A."""
        locked = TRAY_LOCKED if self.tray.locked else 0
        self.modes.store(CAPABILITIES, 6, TRAY_CAPABILITIES | locked)

    def describe(self) -> dict[str, Any]:
        """Return what the drive is, whatever is in it, and the state of its tray."""
        return {
            "kind": "CD-ROM drive",
            "read_only": True,
            "tray": "open" if self.tray.open else "closed",
            "locked": self.tray.locked,
        }

    def close(self) -> None:
        """Abort what is in progress and stop watching the medium."""
        super().close()
        self._unwatch()

    def reset(self) -> None:
        """Do a logical unit reset; also unlocks the tray."""
        self.tray.unlock_all()
        super().reset()

    def detach(self, initiator: Hashable) -> None:
        """Forget an initiator; see the base class."""
        self.tray.lock(initiator, prevent=False)
        super().detach(initiator)

    def medium(self) -> Medium:
        """Return the medium, or raise NOT READY."""
        reason = self.not_ready()
        if reason is not None:
            raise CheckCondition(reason)
        assert self.disk is not None
        return self.disk

    def check_range(self, transfer: Transfer) -> None:
        """Raise ILLEGAL REQUEST 21/00 if a range is not on the medium."""
        if transfer.lba >= self.blocks or transfer.lba + transfer.blocks > self.blocks:
            raise out_of_range(transfer.lba, 2)


def _plan_untrusted(
    unit: CdromUnit, command: Command
) -> tuple[Disk, int, Sequence[memoryview], int]:
    """Return the medium, byte offset, buffers and the bytes the guest gets."""
    disk = unit.medium()
    cdb = command.cdb
    decode = _read_cd_untrusted if cdb[0] == op.READ_CD else decode_transfer_untrusted
    transfer = decode(cdb)
    unit.check_range(transfer)
    size = transfer.blocks * mmc.SECTOR
    buffers = data_in_untrusted(command, size, mmc.SECTOR, transfer.count_byte)
    return disk, transfer.lba * mmc.SECTOR, buffers, min(size, command.length)


def _read_cd_untrusted(cdb: bytes) -> Transfer:
    """Decode READ CD (MMC-6 6.15), of which only the user data of mode 1 sectors exists.

    Raises:
        CheckCondition: Other sector types or parts of a sector are asked for.
    """
    expected = cdb[1] >> 2 & 0x07
    lba = int.from_bytes(cdb[2:6], "big")
    blocks = int.from_bytes(cdb[6:9], "big")
    if cdb[10] & 0x07:  # sub-channel data
        raise invalid_cdb_field(10, 2)
    if not cdb[9] & 0xF8:  # no part of the sectors at all
        return Transfer(lba, 0, 0, 6)
    if expected not in {0, 2} or cdb[9] & 0xFE != 0x10:
        raise CheckCondition(Sense(sense.ILLEGAL_REQUEST, sense.ILLEGAL_MODE_FOR_THIS_TRACK))
    return Transfer(lba, blocks, 0, 6)


def _limit(disk: Disk) -> int:
    """Return the bytes handed to the back-end at once, a multiple of the sector size."""
    return min(disk.info.max_transfer // mmc.SECTOR * mmc.SECTOR or STEP, STEP)


def read_now(unit: CdromUnit, command: Command) -> Outcome | None:
    """READ(10), (12), (16) and READ CD, if the data is at hand."""
    disk, offset, buffers, size = _plan_untrusted(unit, command)
    if buffers and (size > _limit(disk) or not disk.try_readv(offset, buffers)):
        return None
    return Outcome(STATUS_GOOD, b"", size)


async def read(unit: CdromUnit, command: Command) -> Outcome:
    """READ from the back-end."""
    disk, offset, buffers, size = _plan_untrusted(unit, command)
    for at, part in split(buffers, _limit(disk)):
        if part:
            if at:
                await step()
            await disk.readv(offset + at, part)
    return Outcome(STATUS_GOOD, b"", size)


def read_capacity(unit: CdromUnit, command: Command) -> Outcome:
    """READ CAPACITY, MMC-6 6.14."""
    unit.medium()
    return fill(command, struct.pack(">II", unit.blocks - 1, mmc.SECTOR), 8)


def start_stop(unit: CdromUnit, command: Command) -> Outcome:
    """START STOP UNIT, MMC-6 6.43: with LOEJ the tray moves, otherwise nothing does."""
    flags = command.cdb[4]
    if not flags & 0xF0 and flags & 0x02:
        unit.move_tray(opened=not flags & 0x01)
    return GOOD


def read_toc(unit: CdromUnit, command: Command) -> Outcome:
    """READ TOC/PMA/ATIP."""
    unit.medium()
    return fill(command, mmc.toc_untrusted(command.cdb, unit.blocks), _size_at_7(command))


def get_configuration(unit: CdromUnit, command: Command) -> Outcome:
    """GET CONFIGURATION."""
    blocks = unit.blocks if unit.present else 0
    return fill(command, mmc.configuration_untrusted(command.cdb, blocks), _size_at_7(command))


def get_event_status(unit: CdromUnit, command: Command) -> Outcome:
    """GET EVENT STATUS NOTIFICATION; an event is reported once."""
    cdb = command.cdb
    payload = mmc.event_status_untrusted(
        cdb, event=unit.event, tray_open=unit.tray.open, present=unit.present
    )
    outcome = fill(command, payload, _size_at_7(command))
    if cdb[4] & 0x10 and outcome.transferred > 4:
        unit.event = mmc.EVENT_NONE
    return outcome


def read_disc_information(unit: CdromUnit, command: Command) -> Outcome:
    """READ DISC INFORMATION."""
    unit.medium()
    return fill(command, mmc.disc_information_untrusted(command.cdb), _size_at_7(command))


def read_track_information(unit: CdromUnit, command: Command) -> Outcome:
    """READ TRACK INFORMATION."""
    unit.medium()
    payload = mmc.track_information_untrusted(command.cdb, unit.blocks)
    return fill(command, payload, _size_at_7(command))


def read_dvd_structure(unit: CdromUnit, command: Command) -> Outcome:
    """READ DVD STRUCTURE."""
    unit.medium()
    payload = mmc.dvd_structure_untrusted(command.cdb, unit.blocks)
    return fill(command, payload, _size_at_8(command))


def get_performance(unit: CdromUnit, command: Command) -> Outcome:
    """GET PERFORMANCE."""
    payload = mmc.performance_untrusted(command.cdb, unit.blocks)
    return fill(command, payload, len(payload))


def mechanism_status(unit: CdromUnit, command: Command) -> Outcome:
    """MECHANISM STATUS."""
    return fill(command, mmc.mechanism_status(tray_open=unit.tray.open), _size_at_8(command))


def set_speed(_unit: CdromUnit, _command: Command) -> Outcome:
    """SET CD SPEED, MMC-6 6.37: accepted; there is nothing to turn slower."""
    return GOOD


def _size_at_7(command: Command) -> int:
    return int.from_bytes(command.cdb[7:9], "big")


def _size_at_8(command: Command) -> int:
    return int.from_bytes(command.cdb[8:10], "big")


def _polled(
    quick: Callable[[CdromUnit, Command], Outcome],
) -> tuple[
    Callable[[CdromUnit, Command], Outcome | None],
    Callable[[CdromUnit, Command], Awaitable[Outcome]],
]:
    """Make both forms of a command by which guests poll: they look at the medium's size before.

    Nobody else notices that an image grows or shrinks while it is in the drive.
    """

    def now(unit: CdromUnit, command: Command) -> Outcome | None:
        return quick(unit, command) if unit.disk is None else None

    async def slow(unit: CdromUnit, command: Command) -> Outcome:
        await unit.look_again()
        return quick(unit, command)

    return now, slow


READ, FREE = Access.READ, Access.FREE

TABLE = make_table(
    (
        *COMMON,
        PREVENT_ALLOW,
        Spec(op.START_STOP_UNIT, usage("1b 00 00 00 f3 04"), Access.START_STOP, start_stop),
        Spec(
            op.READ_CAPACITY_10,
            usage("25 00 00000000 00 00 00 04"),
            FREE,
            *_polled(read_capacity),
            gated=False,
        ),
        Spec(op.READ_10, usage("28 00 ffffffff 00 ffff 04"), READ, read_now, read),
        Spec(op.READ_TOC, usage("43 02 0f 000000 ff ffff c4"), READ, read_toc),
        Spec(
            op.GET_CONFIGURATION,
            usage("46 03 ffff 000000 ffff 04"),
            FREE,
            get_configuration,
            polite=False,
        ),
        Spec(
            op.GET_EVENT_STATUS_NOTIFICATION,
            usage("4a 01 0000 10 0000 ffff 04"),
            FREE,
            *_polled(get_event_status),
            polite=False,
            gated=False,
        ),
        Spec(
            op.READ_DISC_INFORMATION,
            usage("51 07 0000000000 ffff 04"),
            READ,
            read_disc_information,
        ),
        Spec(
            op.READ_TRACK_INFORMATION,
            usage("52 03 ffffffff 00 ffff 04"),
            READ,
            read_track_information,
        ),
        Spec(op.READ_16, usage("88 00 ffffffffffffffff ffffffff 00 04"), READ, read_now, read),
        Spec(op.READ_12, usage("a8 00 ffffffff ffffffff 00 04"), READ, read_now, read),
        Spec(op.GET_PERFORMANCE, usage("ac 07 00000000 0000 ffff ff 04"), FREE, get_performance),
        Spec(
            op.READ_DVD_STRUCTURE,
            usage("ad 0f 00000000 ff ff ffff 00 04"),
            READ,
            read_dvd_structure,
        ),
        Spec(op.SET_CD_SPEED, usage("bb 00 000000000000000000 04"), FREE, set_speed),
        Spec(op.MECHANISM_STATUS, usage("bd 00 000000000000 ffff 00 04"), FREE, mechanism_status),
        Spec(op.READ_CD, usage("be 1c ffffffff ffffff fe 07 04"), READ, read_now, read),
    )
)
"""The commands of the drive."""
