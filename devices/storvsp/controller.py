"""The synthetic SCSI controller: one device on the bus, any number of logical units behind it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable
from typing import Any
from uuid import UUID, uuid4

from storvsp.disk import Disk
from storvsp.scsi import LogicalUnit
from storvsp.session import DEFAULT_MAX_TRANSFER, Limits, Session
from storvsp.units import Address, Units
from storvsp.wire import VERSION_6_2
from vmbus.host.channel import Channel
from vmbus.host.device import Offer
from vmbus.wire.guids import CLASS_SCSI

MONITOR_LATENCY = 1000
"""Ticks of 100 ns: how often the monitor page is looked at, if the controller has a bit there."""


class ScsiController:
    """A SCSI controller, peer of ``hv_storvsc`` and its kin; see :class:`vmbus.host.Device`.

    Args:
        instance_id: GUID of this controller, unique on its bus; by default a random one. A guest
            knows its disks by it, so give one that stays.
        max_subchannels: Channels the guest may open beside the primary one; Linux asks for one
            per four VPs.
        max_transfer_bytes: Largest transfer of one request in bytes, 64 KiB to 128 MiB, a
            multiple of 4096. What is longer, and longer than 512 KiB, is refused.
        monitor: Use a monitor page bit as doorbell. OpenBSD ignores controllers without one;
            others ring faster without.
        max_version: Highest vstor version to agree to.
        initiator: Who the guest is, for reservations on units shared by several controllers.

    Attributes:
        limits: What it agrees to.
        units: What is behind it.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self,
        *,
        instance_id: UUID | None = None,
        max_subchannels: int = 15,
        max_transfer_bytes: int = DEFAULT_MAX_TRANSFER,
        monitor: bool = False,
        max_version: int = VERSION_6_2,
        initiator: Hashable = None,
    ) -> None:
        self.limits = Limits(
            max_subchannels=max_subchannels,
            max_transfer_bytes=max_transfer_bytes,
            max_version=max_version,
        )
        self._session: Session | None = None
        self._offer = Offer(
            class_id=CLASS_SCSI,
            instance_id=instance_id or uuid4(),
            monitor_latency=MONITOR_LATENCY if monitor else None,
            max_subchannels=max_subchannels,
        )
        own_id = self._offer.instance_id
        self.units = Units(own_id, own_id if initiator is None else initiator, self._notify)

    # -- units -----------------------------------------------------------------------------------

    def add_disk(
        self,
        disk: Disk,
        *,
        path: int = 0,
        target: int = 0,
        lun: int | None = None,
        owned: bool = True,
        source: str = "",
        stop_when_full: bool = False,
    ) -> Address:
        """Put a disk behind the controller; a running guest is told at once. Cannot block.

        Args:
            disk: The back-end.
            path: 0 to 7.
            target: 0 or 1.
            lun: 0 to 254, or None for the lowest free one.
            owned: Close the disk when it is removed or the controller leaves the bus.
            source: What people call it, such as the specification that it was made from.
            stop_when_full: Keep commands that find no room until :meth:`continue_disk`, instead of
                failing them.

        Returns:
            Where it is.

        Raises:
            ConfigError: The address is taken or does not exist.
        """
        return self.units.add_disk(
            disk,
            path=path,
            target=target,
            lun=lun,
            owned=owned,
            source=source,
            stop_when_full=stop_when_full,
        )

    def continue_disk(self, address: Address) -> bool:
        """Let a disk go on that has been stopped because there was no room. Cannot block.

        The commands that it has kept are tried again.

        Returns:
            Whether it was stopped.

        Raises:
            ConfigError: There is no disk at ``address``.
        """
        return self.units.continue_disk(address)

    def add_drive(self, *, path: int = 0, target: int = 0, lun: int | None = None) -> Address:
        """Put an empty CD-ROM drive behind the controller, as :meth:`add_disk` does. Cannot block.

        Raises:
            ConfigError: The address is taken or does not exist.
        """
        return self.units.add_disk(None, path=path, target=target, lun=lun)

    async def insert_medium(
        self,
        address: Address,
        disk: Disk,
        *,
        replace: bool = False,
        force: bool = False,
        owned: bool = True,
        source: str = "",
    ) -> bool:
        """Put a medium into a CD-ROM drive and close its tray. Is a checkpoint.

        The guest sees UNIT ATTENTION 28/00 and a media event.

        Args:
            address: Path, target, LUN.
            disk: The medium, with sectors of 2048 bytes.
            replace: Take out the one that is there.
            force: Also if the guest has locked the tray.
            owned: Close the disk when it is taken out or the controller leaves the bus, and also if
                it does not come in.
            source: What people call it.

        Returns:
            False if the tray is locked: the guest has been asked to let go.

        Raises:
            ConfigError: There is no drive, it has a medium, or the disk does not fit.
            NotBackError: The old medium is not closed yet, as with :meth:`remove_disk`; the new one
                is in.
        """
        return await self.units.insert(
            address, disk, replace=replace, force=force, owned=owned, source=source
        )

    async def eject_medium(self, address: Address, *, force: bool = False) -> bool:
        """Take the medium out of a CD-ROM drive. Is a checkpoint.

        Args:
            address: Path, target, LUN.
            force: Also if the guest has locked the tray.

        Returns:
            False if the tray is locked: the guest has been asked to let go.

        Raises:
            ConfigError: There is no drive, or nothing in it.
            NotBackError: It is out, but not closed yet, as with :meth:`remove_disk`.
        """
        return await self.units.eject(address, force=force)

    def add_unit(
        self, unit: LogicalUnit, *, path: int = 0, target: int = 0, lun: int, source: str = ""
    ) -> Address:
        """Put any logical unit behind the controller, as :meth:`add_disk` does. Cannot block.

        Raises:
            ConfigError: The address is taken or does not exist.
        """
        return self.units.add_unit(unit, path=path, target=target, lun=lun, source=source)

    async def remove_disk(self, address: Address) -> None:
        """Take a unit away; a running guest is told at once. Is a checkpoint.

        Commands under way end with TASK ABORTED, later ones with SRB status INVALID_LUN.

        Raises:
            ConfigError: There is nothing at ``address``.
            NotBackError: The disk does not give back, within
                :data:`storvsp.units.LET_GO_PATIENCE`, what it was handed. The guest has lost it all
                the same; the command under way is answered, and the disk closed, when it does.
        """
        await self.units.remove(address)

    async def resize_disk(self, address: Address, size: int | None, *, shrink: bool = False) -> int:
        """Give a disk another size; a running guest is told at once. Is a checkpoint.

        Args:
            address: Path, target, LUN.
            size: New capacity in bytes; None: whatever the back-end has now, which may have grown
                outside.
            shrink: Cut off what is behind a smaller size.

        Returns:
            The size it has now.

        Raises:
            ConfigError: There is no disk there, its back-end cannot be resized, or it would
                become smaller without ``shrink``.
            DiskError: The back-end tried and failed.
        """
        return await self.units.resize(address, size, shrink=shrink)

    def _notify(self) -> None:
        if self._session is not None:
            self._session.notify()

    # -- the device ------------------------------------------------------------------------------

    @property
    def offer(self) -> Offer:
        """See :attr:`vmbus.host.Device.offer`."""
        return self._offer

    async def run(self, primary: Channel) -> None:
        """See :meth:`vmbus.host.Device.run`."""
        self._session = Session(primary, self.units, self.limits)
        self.units.attended()
        try:
            await self._session.run()
        finally:
            self._session = None
            self.units.left()

    def save(self) -> dict[str, Any]:
        """See :meth:`vmbus.host.Saveable.save`."""
        return self.units.save()

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`vmbus.host.Saveable.restore`."""
        self.units.restore(state)

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`vmbus.host.Device.snapshot`."""
        session = self._session
        return {
            "stage": session.stage.value if session else "not open",
            "vstor_version": f"{session.version >> 8}.{session.version & 0xFF}" if session else "",
            "commands_inline": session.requests.inline if session else 0,
            "commands_waited": session.requests.waited if session else 0,
            "refused": session.refused if session else 0,
            "units": self.units.describe(),
        }

    async def aclose(self) -> None:
        """See :meth:`vmbus.host.Device.aclose`. Waits for what is under way, however long."""
        self.units.closed = True
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.units.released)
            # One that fails must not keep the others open.
            for address in tuple(self.units.by_address):
                stack.push_async_callback(self._remove_if_there, address)

    async def _remove_if_there(self, address: Address) -> None:
        if address in self.units.by_address:  # else an operator was quicker
            await self.units.remove(address, patience=math.inf)
