"""The synthetic SCSI controller: one device on the bus, any number of logical units behind it.

Addresses are (path, target, lun). Linux scans 8 paths, 2 targets and 255 LUNs of each; macOS looks
at path 0, target 0, LUNs 0 to 63 only, so new units go there by default.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any
from uuid import UUID, uuid4, uuid5

from storvsp.disk import Disk
from storvsp.scsi import CdromUnit, DiskUnit, LogicalUnit
from storvsp.scsi.sense import REPORTED_LUNS_DATA_HAS_CHANGED
from storvsp.session import Session
from storvsp.wire import VERSION_6_2
from vmbus.channel import Channel
from vmbus.device import Device
from vmbus.engine.offers import Offer
from vmbus.errors import ConfigError
from vmbus.wire.guids import CLASS_SCSI

Address = tuple[int, int, int]
"""Path, target, LUN."""

MAX_PATH, MAX_TARGET, MAX_LUN = 7, 1, 254
MAX_SUBCHANNELS = 63
DEFAULT_MAX_TRANSFER = 2 << 20
"""Bytes. A whole 2 MiB request is one packet of 4.2 KB; the cost per request is shared by more
data than with the 256 KiB of other hosts. Linux takes up to 128 MiB."""
MONITOR_LATENCY = 1000
"""Ticks of 100 ns: how often the monitor page is looked at, if the controller has a bit there."""


class ScsiController:
    """A SCSI controller, peer of ``hv_storvsc`` and its kin; see :class:`vmbus.device.Device`.

    Args:
        instance_id: GUID of this controller, unique on its bus; by default a random one. A guest
            knows its disks by it, so give one that stays.
        max_subchannels: Channels the guest may open beside the primary one; Linux asks for one
            per four VPs.
        max_transfer_bytes: Largest transfer of one request in bytes, 64 KiB to 128 MiB, a
            multiple of 4096.
        monitor: Use a monitor page bit as doorbell. OpenBSD ignores controllers without one;
            others ring faster without.
        max_version: Highest vstor version to agree to.
        initiator: Who the guest is, for reservations on units shared by several controllers.

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
        if not 0 <= max_subchannels <= MAX_SUBCHANNELS:
            raise ConfigError(f"max_subchannels is 0 to {MAX_SUBCHANNELS}, not {max_subchannels}")
        if max_transfer_bytes % 4096 or not 64 << 10 <= max_transfer_bytes <= 128 << 20:
            raise ConfigError("max_transfer_bytes is a multiple of 4096 from 64 KiB to 128 MiB")
        self.max_subchannels = max_subchannels
        self.max_transfer_bytes = max_transfer_bytes
        self.max_version = max_version
        self.units: dict[Address, LogicalUnit] = {}
        self.faults = 0
        """Requests refused because they broke a rule."""
        self._disks: dict[Address, Disk] = {}
        self._owned: set[Address] = set()
        self._unwatch: dict[Address, Callable[[], None]] = {}
        self._session: Session | None = None
        self._offer = Offer(
            class_id=CLASS_SCSI,
            instance_id=instance_id or uuid4(),
            monitor_latency=MONITOR_LATENCY if monitor else None,
            max_subchannels=max_subchannels,
        )
        self.initiator: Hashable = self._offer.instance_id if initiator is None else initiator

    # -- units -----------------------------------------------------------------------------------

    def add_disk(
        self,
        disk: Disk,
        *,
        path: int = 0,
        target: int = 0,
        lun: int | None = None,
        owned: bool = True,
    ) -> Address:
        """Put a disk behind the controller; a running guest is told at once. Cannot block.

        Args:
            disk: The back-end.
            path: 0 to 7.
            target: 0 or 1.
            lun: 0 to 254, or None for the lowest free one.
            owned: Close the disk when it is removed or the controller leaves the bus.

        Returns:
            Where it is.

        Raises:
            ConfigError: The address is taken or does not exist.
        """
        if lun is None:
            taken = set(self.luns(path, target))
            lun = next(free for free in range(MAX_LUN + 2) if free not in taken)
        kind = CdromUnit if disk.info.optical else DiskUnit
        # A disk without a name of its own keeps the one its place gives it, so that a guest finds
        # it again after a restart of the server.
        identity = uuid5(self._offer.instance_id, f"{path}:{target}:{lun}").bytes
        unit = kind(disk, luns=lambda: self.luns(path, target), identity=identity)
        try:
            address = self.add_unit(unit, path=path, target=target, lun=lun)
        except ConfigError:
            unit.close()
            raise
        self._disks[address] = disk
        self._unwatch[address] = disk.watch(self._notify)
        if owned:
            self._owned.add(address)
        return address

    def add_unit(self, unit: LogicalUnit, *, path: int = 0, target: int = 0, lun: int) -> Address:
        """Put any logical unit behind the controller, as :meth:`add_disk` does. Cannot block.

        Raises:
            ConfigError: The address is taken or does not exist.
        """
        address = (path, target, lun)
        if not (0 <= path <= MAX_PATH and 0 <= target <= MAX_TARGET and 0 <= lun <= MAX_LUN):
            raise ConfigError(
                f"no guest looks at path {path}, target {target}, LUN {lun}; there are paths 0 to "
                f"{MAX_PATH}, targets 0 and 1, LUNs 0 to {MAX_LUN}"
            )
        if address in self.units:
            raise ConfigError(f"path {path}, target {target}, LUN {lun} is taken")
        self.units[address] = unit
        self._luns_changed(address)
        return address

    async def remove_disk(self, address: Address) -> None:
        """Take a unit away; a running guest is told at once. Is a checkpoint.

        Commands under way end with TASK ABORTED, later ones with SRB status INVALID_LUN.

        Raises:
            ConfigError: There is nothing at ``address``.
        """
        unit = self.units.pop(address, None)
        if unit is None:
            raise ConfigError("nothing is at path {}, target {}, LUN {}".format(*address))
        unit.close()
        self._luns_changed(address)
        if unwatch := self._unwatch.pop(address, None):
            unwatch()
        disk = self._disks.pop(address, None)
        if disk is not None and address in self._owned:
            self._owned.discard(address)
            await disk.aclose()

    async def resize_disk(self, address: Address, size: int) -> int:
        """Give a disk another size; a running guest is told at once. Is a checkpoint.

        Args:
            address: Path, target, LUN.
            size: New capacity in bytes.

        Returns:
            The size it has now.

        Raises:
            ConfigError: There is no disk there, or its back-end cannot be resized.
            DiskError: The back-end tried and failed.
        """
        disk = self._disks.get(address)
        resize = getattr(disk, "resize", None)
        if address not in self.units:
            raise ConfigError("nothing is at path {}, target {}, LUN {}".format(*address))
        if disk is None or resize is None:
            kind = type(disk or self.units[address]).__name__
            raise ConfigError("{}:{}:{} is {}, which cannot be resized".format(*address, kind))
        done = resize(size)
        if inspect.isawaitable(done):
            await done
        return disk.info.size

    def disk(self, address: Address) -> Disk | None:
        """Return the back-end at an address, or None."""
        return self._disks.get(address)

    def luns(self, path: int, target: int) -> list[int]:
        """Return the LUNs that exist at a target, in order."""
        return sorted(each[2] for each in self.units if each[:2] == (path, target))

    def all_units(self) -> Iterable[LogicalUnit]:
        """Return every unit once."""
        return tuple(self.units.values())

    def _luns_changed(self, address: Address) -> None:
        for other, unit in self.units.items():
            if other[:2] == address[:2] and other != address:
                unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
        self._notify()

    def _notify(self) -> None:
        if self._session is not None:
            self._session.notify()

    # -- as a plug-in (vmbus.plugins.DevicePlugin) -----------------------------------------------

    @classmethod
    async def from_specs(
        cls,
        specs: Sequence[str],
        *,
        instance_id: UUID,
        initiator: Hashable,
        options: dict[str, Any],
    ) -> ScsiController:
        """See :meth:`vmbus.plugins.DevicePlugin.from_specs`."""
        from storvsp.plugin import make_controller

        return await make_controller(
            specs, instance_id=instance_id, initiator=initiator, options=options
        )

    @classmethod
    async def command(cls, device: Device, request: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`vmbus.plugins.DevicePlugin.command` and :func:`storvsp.plugin.operate`."""
        from storvsp.plugin import operate

        assert isinstance(device, cls)
        return await operate(device, request)

    # -- the device ------------------------------------------------------------------------------

    @property
    def offer(self) -> Offer:
        """See :attr:`vmbus.device.Device.offer`."""
        return self._offer

    async def run(self, primary: Channel) -> None:
        """See :meth:`vmbus.device.Device.run`."""
        self._session = Session(self, primary)
        try:
            await self._session.run()
        finally:
            self._session = None
            for unit in self.all_units():
                unit.detach(self.initiator)

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`vmbus.device.Device.snapshot`."""
        session = self._session
        return {
            "stage": session.stage.value if session else "not open",
            "vstor_version": f"{session.version >> 8}.{session.version & 0xFF}" if session else "",
            "commands_inline": session.inline if session else 0,
            "commands_waited": session.waited if session else 0,
            "refused": self.faults,
            "units": [
                {
                    "address": ":".join(map(str, address)),
                    "size": disk.info.size if (disk := self._disks.get(address)) else None,
                    "kind": type(disk).__name__ if disk else type(unit).__name__,
                    "read_only": disk.info.read_only if disk else None,
                }
                for address, unit in sorted(self.units.items())
            ],
        }

    async def aclose(self) -> None:
        """See :meth:`vmbus.device.Device.aclose`."""
        async with contextlib.AsyncExitStack() as stack:
            # One that fails must not keep the others open.
            for address in tuple(self.units):
                stack.push_async_callback(self.remove_disk, address)
