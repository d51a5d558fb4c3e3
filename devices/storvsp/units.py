"""The logical units behind one controller: where each is, and which disk it stands for.

Addresses are (path, target, lun). Linux scans 8 paths, 2 targets and 255 LUNs of each; macOS looks
at path 0, target 0, LUNs 0 to 63 only, so new units go there by default.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from uuid import UUID, uuid5

import trio

from storvsp.disk import Disk
from storvsp.scsi import CdromUnit, DiskUnit, LogicalUnit
from storvsp.scsi.sense import REPORTED_LUNS_DATA_HAS_CHANGED
from vmbus.errors import ConfigError, NotBackError
from vmbus.host.undertakings import not_back

logger = logging.getLogger("storvsp")

Address = tuple[int, int, int]
"""Path, target, LUN."""

COUNTERS = ("commands", "bytes_read", "bytes_written", "errors")
"""What is counted for each unit; see :class:`storvsp.scsi.LogicalUnit`."""

MAX_PATH, MAX_TARGET, MAX_LUN = 7, 1, 254

LET_GO_PATIENCE = 10.0
"""Seconds for a disk that is taken away to give back what it was handed, and to be closed."""


def address_text(address: Address) -> str:
    """Return ``path:target:lun``."""
    return ":".join(map(str, address))


@dataclasses.dataclass(slots=True)
class _Medium:
    """The disk that a unit was made for."""

    disk: Disk
    owned: bool
    source: str
    unwatch: Callable[[], None]


def _nobody() -> None:
    return None


@dataclasses.dataclass(slots=True)
class _Name:
    """Which of the disks that were at an address had its name last."""

    number: int = 0
    disk: Callable[[], Disk | None] = _nobody


class Units:
    """The units of one controller.

    Args:
        instance_id: The controller's, for the names of disks that have none of their own.
        initiator: Who the guest is.
        changed: Called when the set of units, or one's size, has changed; cannot block.
    """

    def __init__(self, instance_id: UUID, initiator: Hashable, changed: Callable[[], None]) -> None:
        self.by_address: dict[Address, LogicalUnit] = {}
        """Where each is; for look-ups only."""
        self.initiator = initiator
        self._instance_id = instance_id
        self.changed = changed
        self._media: dict[Address, _Medium] = {}
        self._names: dict[Address, _Name] = {}
        # Where the guest that is there has found which kind of unit.
        self._seen: dict[Address, type[LogicalUnit]] | None = None
        self._releasing: set[trio.Event] = set()
        self.closed = False
        """The controller has left the bus: nothing can be added any more."""

    def __len__(self) -> int:
        """How many there are."""
        return len(self.by_address)

    def __iter__(self) -> Iterator[LogicalUnit]:
        """Go through all units once; they may come and go meanwhile."""
        return iter(tuple(self.by_address.values()))

    def luns(self, path: int, target: int) -> list[int]:
        """Return the LUNs that exist at a target, in order."""
        return sorted(each[2] for each in self.by_address if each[:2] == (path, target))

    def free_lun(self, path: int, target: int) -> int:
        """Return the lowest LUN of a target that is free."""
        taken = set(self.luns(path, target))
        return next(free for free in range(MAX_LUN + 2) if free not in taken)

    def add_disk(
        self,
        disk: Disk | None,
        *,
        path: int,
        target: int,
        lun: int | None,
        owned: bool = True,
        source: str = "",
        stop_when_full: bool = False,
    ) -> Address:
        """See :meth:`storvsp.controller.ScsiController.add_disk` and ``add_drive``."""
        if lun is None:
            lun = self.free_lun(path, target)
        address = (path, target, lun)
        self.check_free(address)
        identity = self._name(address, disk)

        def luns() -> list[int]:
            return self.luns(path, target)

        unit: LogicalUnit
        if disk is None or disk.info.optical:
            unit = CdromUnit(disk, luns=luns, identity=identity)
        else:
            unit = DiskUnit(disk, luns=luns, identity=identity)
            unit.disk.stops = stop_when_full
        if disk is not None:
            self._media[address] = _Medium(disk, owned, source, disk.watch(self.changed))
        self._place(address, unit, source or (type(disk).__name__ if disk is not None else ""))
        return address

    def add_unit(
        self, unit: LogicalUnit, *, path: int, target: int, lun: int, source: str = ""
    ) -> Address:
        """See :meth:`storvsp.controller.ScsiController.add_unit`."""
        address = (path, target, lun)
        self.check_free(address)
        self._place(address, unit, source)
        return address

    def _place(self, address: Address, unit: LogicalUnit, source: str = "") -> None:
        if not unit.name:
            whose = f"{self.initiator}: " if isinstance(self.initiator, str) else ""
            what = f" ({source})" if source else ""
            unit.name = f"{whose}disk {address_text(address)}{what}"
        self.by_address[address] = unit
        if self._seen is not None:
            unit.introduce(self.initiator, replaces=self._seen.get(address))
            self._seen[address] = type(unit)
        self._luns_changed(address)

    def check_free(self, address: Address) -> None:
        """Raise ConfigError if nothing can be put at an address."""
        path, target, lun = address
        self._check_open()
        if not (0 <= path <= MAX_PATH and 0 <= target <= MAX_TARGET and 0 <= lun <= MAX_LUN):
            raise ConfigError(
                f"no guest looks at {address_text(address)} (path:target:lun); there are paths 0 "
                f"to {MAX_PATH}, targets 0 and 1, LUNs 0 to {MAX_LUN}"
            )
        if address in self.by_address:
            raise ConfigError(f"{address_text(address)} is taken")

    def _name(self, address: Address, disk: Disk | None) -> bytes:
        """Name a disk that has no name of its own, 16 bytes.

        It gets the one of its place, so that a guest finds it again after a restart of the server;
        but a second disk at the same place is not the first one.
        """
        name = self._names.get(address)
        if name is None:
            name = self._names[address] = _Name()
        elif disk is None or name.disk() is not disk:
            name.number += 1
        name.disk = _nobody if disk is None else weakref.ref(disk)
        suffix = f"#{name.number}" if name.number else ""
        return uuid5(self._instance_id, address_text(address) + suffix).bytes

    def attended(self) -> None:
        """Take note that a guest is there from now on: what comes is news to it."""
        self._seen = {address: type(unit) for address, unit in self.by_address.items()}

    def left(self) -> None:
        """Take note that the guest is gone, and forget what units know of it."""
        self._seen = None
        for unit in self:
            unit.detach(self.initiator)

    async def remove(self, address: Address, patience: float = LET_GO_PATIENCE) -> None:
        """See :meth:`storvsp.controller.ScsiController.remove_disk`.

        Args:
            address: Path, target, LUN.
            patience: Seconds to wait for a disk that does not give back what it was handed.
        """
        unit = self.by_address.pop(address, None)
        if unit is None:
            raise ConfigError(f"nothing is at {address_text(address)}")
        unit.close()
        self._luns_changed(address)
        await self._let_go(unit, self._media.pop(address, None), patience)

    async def _let_go(
        self, unit: LogicalUnit, medium: _Medium | None, patience: float = LET_GO_PATIENCE
    ) -> None:
        """Close a disk that a unit does not use any more, when nothing is under way.

        That is done by a task of its own: whoever asked for it may lose patience with commands that
        do not end, and the disk must not stay open, and locked, for that. Nobody is told that it is
        closed before it is: a worker thread may still write to the file, and to guest memory.

        Raises:
            NotBackError: It is not closed yet after ``patience`` seconds; it will be.
        """
        ended = trio.Event()
        errors: list[Exception] = []
        alone = False

        async def release() -> None:
            try:
                await unit.ended()
                if medium is not None:
                    medium.unwatch()
                    if medium.owned:
                        await medium.disk.aclose()
            except Exception as error:
                errors.append(error)
                if alone:  # nobody else would hear of it
                    logger.warning("a disk that was taken away could not be closed: %s", error)
            finally:
                self._releasing.discard(ended)
                ended.set()

        self._releasing.add(ended)
        trio.lowlevel.spawn_system_task(release)
        try:
            with trio.move_on_after(patience):
                await ended.wait()
        finally:
            alone = not ended.is_set()
        if alone:
            what = unit.name or "a disk"
            names = [f"{what}: {name}" for name in unit.under_way]
            text = not_back(names, patience, f"{what}: closing it")
            logger.error("%s; it was taken away, and is closed when it is back", text)
            raise NotBackError(f"{text}; it is taken away, and closed when it is back")
        if errors:
            raise errors[0]

    async def released(self) -> None:
        """Wait until the disks that were taken away are closed. A checkpoint if any is not."""
        for ended in tuple(self._releasing):
            await ended.wait()

    async def insert(
        self,
        address: Address,
        disk: Disk,
        *,
        replace: bool,
        force: bool,
        owned: bool = True,
        source: str = "",
    ) -> bool:
        """See :meth:`storvsp.controller.ScsiController.insert_medium`."""
        taken = False
        try:
            drive = self.drive_for_medium(address, replace=replace)
            drive.check_medium(disk)
            if drive.present and drive.eject(force=force) is None:
                return False
            drive.insert(disk)
            taken = True
        finally:
            if owned and not taken:
                with trio.CancelScope(shield=True):
                    await disk.aclose()
        old = self._media.pop(address, None)
        self._media[address] = _Medium(disk, owned, source, disk.watch(self.changed))
        await self._let_go(drive, old)
        return True

    def drive_for_medium(self, address: Address, *, replace: bool) -> CdromUnit:
        """Return the drive at an address. Raises ConfigError if it cannot take a medium."""
        self._check_open()
        drive = self._drive(address)
        if drive.present and not replace:
            raise ConfigError(f"there is a medium in the drive at {address_text(address)}")
        return drive

    def _check_open(self) -> None:
        if self.closed:
            raise ConfigError("the controller has left the bus")

    async def eject(self, address: Address, *, force: bool) -> bool:
        """See :meth:`storvsp.controller.ScsiController.eject_medium`."""
        drive = self._drive(address)
        if drive.disk is None:
            raise ConfigError(f"the drive at {address_text(address)} is empty")
        if drive.eject(force=force) is None:
            return False
        await self._let_go(drive, self._media.pop(address, None))
        return True

    def _drive(self, address: Address) -> CdromUnit:
        unit = self.by_address.get(address)
        if not isinstance(unit, CdromUnit):
            raise ConfigError(f"there is no drive at {address_text(address)}")
        return unit

    async def resize(self, address: Address, size: int | None, *, shrink: bool = False) -> int:
        """See :meth:`storvsp.controller.ScsiController.resize_disk`."""
        if address not in self.by_address:
            raise ConfigError(f"nothing is at {address_text(address)}")
        if size is not None and size <= 0:
            raise ConfigError(f"{size} bytes are no size of a disk")
        disk = self.disk(address)
        if disk is None:
            why = self.by_address[address].why_fixed
            raise ConfigError(f"{address_text(address)} cannot be resized: it is {why}")
        action = getattr(disk, "resize", None)
        if size is not None and action is None:
            raise ConfigError(
                f"{address_text(address)} cannot be resized: a {type(disk).__name__} keeps its size"
            )
        await disk.look_again()  # it may have become another size outside
        if size is not None and size < disk.info.size and not shrink:
            raise ConfigError(
                f"{address_text(address)} has {disk.info.size} bytes; {size} would cut off what is "
                "behind, which has to be asked for (--shrink)"
            )
        if size is not None:
            done = action(size)  # type: ignore[misc]  # checked above
            if inspect.isawaitable(done):
                await done
        return disk.info.size

    def continue_disk(self, address: Address) -> bool:
        """See :meth:`storvsp.controller.ScsiController.continue_disk`."""
        unit = self.by_address.get(address)
        if unit is None or isinstance(unit, CdromUnit):
            raise ConfigError(f"there is no disk at {address_text(address)}")
        return isinstance(unit, DiskUnit) and unit.disk.go_on()

    def disk(self, address: Address) -> Disk | None:
        """Return the back-end at an address, or None."""
        medium = self._media.get(address)
        return medium.disk if medium is not None else None

    def describe(self) -> list[dict[str, Any]]:
        """Describe the units for people, as JSON types, by address. Cannot block, never raises.

        Beside what is said here: the counters of :class:`~storvsp.scsi.LogicalUnit`, and what the
        unit says of itself.
        """
        return [
            {
                "address": address_text(address),
                "size": disk.info.size if (disk := self.disk(address)) else None,
                "kind": type(disk).__name__ if disk else type(unit).__name__,
                "source": self._media[address].source if disk else "",
                "read_only": disk.info.read_only if disk else None,
                **{name: getattr(unit, name) for name in COUNTERS},
                **unit.describe(),
            }
            for address, unit in sorted(self.by_address.items())
        ]

    def save(self) -> dict[str, Any]:
        """See :meth:`vmbus.host.Saveable.save`."""
        saved = {address_text(address): unit.save() for address, unit in self.by_address.items()}
        return {address: state for address, state in saved.items() if state}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`vmbus.host.Saveable.restore`."""
        found = {address_text(address): unit for address, unit in self.by_address.items()}
        for text, saved in state.items():
            if text not in found or not isinstance(saved, dict):
                raise ConfigError(f"saved state: nothing is at {text}")
            found[text].restore(saved)

    def _luns_changed(self, address: Address) -> None:
        for other, unit in self.by_address.items():
            if other[:2] == address[:2] and other != address:
                unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
        self.changed()
