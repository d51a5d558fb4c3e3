"""The controller as a plug-in: made from specifications, operated by commands."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from uuid import UUID

from storvsp.controller import ScsiController
from storvsp.disks.specs import DISKS, DiskSpec, open_disk
from storvsp.session import DEFAULT_MAX_TRANSFER
from storvsp.shared import Keeper, SharedUnit
from storvsp.units import Address, address_text
from vmbus.errors import ConfigError
from vmbus.host.device import Device
from vmbus.plugins.options import Option
from vmbus.plugins.registry import Registry
from vmbus.plugins.remarks import remark, remarks
from vmbus.plugins.sharing import Line, Share
from vmbus.plugins.specs import OptionReader, parse_number, parse_size

logger = logging.getLogger("storvsp")

MIN_STAGING = 8 << 20
"""Bytes between a guest and the keeper of a disk that it shares."""
_NAME = "SCSI controller"

OPTIONS = (
    Option("max_subchannels", "channels beside the first one, 0 to 63", "N", "15"),
    Option(
        "max_transfer_bytes",
        "largest transfer of one SCSI request, 64K to 128M in whole 4K",
        "SIZE",
        "2M",
    ),
    Option(
        "monitor",
        "ring it through the monitor page: slower, but OpenBSD needs it",
        "on|off",
        "off",
    ),
)


class ScsiPlugin:
    """See :class:`vmbus.plugins.devices.DevicePlugin`."""

    backends: Registry | None = DISKS
    demo: str | None = "storvsp.demo"

    async def from_specs(
        self,
        specs: Sequence[str],
        *,
        instance_id: UUID,
        initiator: Hashable,
        options: Mapping[str, Any],
        shared: Mapping[str, Line] | None = None,
    ) -> ScsiController:
        """Make a controller with a disk for each specification. Is a checkpoint.

        Args:
            specs: ``scheme:[options]target``; the options ``path``, ``target`` and ``lun`` place
                the disk, otherwise it gets the lowest free LUN of path 0, target 0; ``on-error``
                is ``report`` or ``stop``.
            instance_id: The offer's instance GUID.
            initiator: Who the guest is.
            options: ``max_subchannels``, ``max_transfer_bytes`` (a size) and ``monitor`` (a flag),
                as in :class:`ScsiController`.
            shared: Lines to the keepers of disks with the option ``shared``; owned.

        Raises:
            ConfigError: A specification or an option cannot be honoured; nothing stays open then.
        """
        reader = OptionReader(_NAME, options)
        max_subchannels = reader.integer("max_subchannels")
        max_transfer_bytes = _max_transfer(reader)
        monitor = reader.flag("monitor")
        reader.finish()
        controller = ScsiController(
            instance_id=instance_id,
            initiator=initiator,
            max_subchannels=15 if max_subchannels is None else max_subchannels,
            max_transfer_bytes=max_transfer_bytes,
            monitor=monitor,
        )
        try:
            for spec in specs:
                if shared is not None and spec in shared:
                    await add_shared(controller, spec, shared[spec])
                else:
                    await add(controller, spec)
        except BaseException:
            await controller.aclose()
            raise
        return controller

    def shared(self, specs: Sequence[str], options: Mapping[str, Any]) -> dict[str, Share]:
        """See :class:`vmbus.plugins.sharing.SharingPlugin`."""
        largest = _max_transfer(OptionReader(_NAME, options))
        staging = max(2 * largest, MIN_STAGING)
        found = [spec for spec in specs if _is_shared(spec)]
        for spec in found:
            if DiskSpec.parse(spec).options.get("on-error", "report") != "report":
                raise ConfigError(
                    f"{spec}: leave out on-error=stop, for a shared disk does not stop for one of "
                    "its guests"
                )
        return dict.fromkeys(found, Share(staging=staging))

    async def open_keeper(self, specs: Sequence[str], *, identity: bytes) -> Keeper:
        """See :class:`vmbus.plugins.sharing.SharingPlugin`."""
        (spec,) = specs
        plain = DiskSpec.parse(spec).split()[0]
        with remarks() as warnings:
            disk = await open_disk(plain)
        return Keeper(disk, identity, source=str(plain), warnings=warnings)

    async def command(self, device: Device, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an operator's request on a disk or a drive. Is a checkpoint.

        ::

            {"action": "add", "spec": "ram:64M"}                     -> {"address": "0:0:1"}
            {"action": "remove", "address": "0:0:1"}                 -> {}
            {"action": "resize", "address": "0", "size": "2G"}       -> {"size": 2147483648}
            {"action": "insert", "address": "1", "spec": "cd:a.iso"} -> {"done": true}
            {"action": "change", "address": "1", "spec": "cd:b.iso"} -> {"done": true}
            {"action": "eject", "address": "1"}                      -> {"done": true}
            {"action": "continue", "address": "0"}                   -> {"continued": true}

        ``resize`` without ``size`` looks again at a back-end that has grown outside; to make a disk
        smaller it needs ``"shrink": true``. ``insert`` wants an empty or open drive. ``change`` and
        ``eject`` answer false if the guest has locked the tray, which is asked to let go, unless
        there is ``"force": true``. What the operator should know of a disk or medium is told in
        ``warnings``, a list of texts, if there is any.

        Raises:
            ConfigError: The request is unknown, incomplete or cannot be honoured.
            NotBackError: A disk is taken away, but not closed yet.
        """
        assert isinstance(device, ScsiController)
        with remarks() as warnings:
            result = await self._command(device, request)
        return {**result, "warnings": warnings} if warnings else result

    async def _command(self, device: ScsiController, request: Mapping[str, Any]) -> dict[str, Any]:
        match request:
            case {"action": "add", "spec": str(spec)}:
                return {"address": address_text(await add(device, spec))}
            case {"action": "remove", "address": str(text)}:
                await device.remove_disk(parse_address(text))
                return {}
            case {"action": "resize", "address": str(text)}:
                size = request.get("size")
                if not isinstance(size, str | None):
                    raise ConfigError("resize: size is a text such as 2G")
                size = await device.resize_disk(
                    parse_address(text),
                    parse_size(size) if size is not None else None,
                    shrink=_flag(request, "shrink"),
                )
                return {"size": size}
            case {"action": "insert" | "change" as action, "address": str(text), "spec": str(spec)}:
                replace = action == "change"
                done = await insert(
                    device, text, spec, replace=replace, force=_flag(request, "force")
                )
                return {"done": done}
            case {"action": "eject", "address": str(text)}:
                force = _flag(request, "force")
                return {"done": await device.eject_medium(parse_address(text), force=force)}
            case {"action": "continue", "address": str(text)}:
                return {"continued": device.continue_disk(parse_address(text))}
            case _:
                raise ConfigError(
                    "a SCSI controller can: add (spec), remove (address), resize (address, size, "
                    "shrink), insert (address, spec), change (address, spec, force), eject "
                    "(address, force), continue (address)"
                )


PLUGIN = ScsiPlugin()
"""What the entry point names."""


def _is_shared(text: str) -> bool:
    try:
        return "shared" in DiskSpec.parse(text).options
    except ConfigError:  # will be said where it is opened
        return False


async def add_shared(controller: ScsiController, text: str, line: Line) -> Address:
    """Put a disk that is kept elsewhere behind the controller; owns the line. Is a checkpoint.

    Raises:
        ConfigError: Its place is taken, or its keeper is gone.
    """
    path, target, lun = _place(text, DiskSpec.parse(text).split()[1])
    assert line.staging_fd is not None  # as ``shared`` has asked for
    unit = SharedUnit(
        line.sock,
        line.staging_fd,
        luns=lambda: controller.units.luns(path, target),
        changed=controller.units.changed,
        source=text,
    )
    try:
        await unit.known.wait()
        if not unit.info:
            raise ConfigError(f"{text}: its keeper is gone")
        for warning in unit.info["warnings"]:
            remark(logger, warning)
        if lun is None:
            lun = controller.units.free_lun(path, target)
        return controller.add_unit(unit, path=path, target=target, lun=lun, source=text)
    except BaseException:
        unit.close()
        raise


async def add(controller: ScsiController, text: str) -> Address:
    """Open the disk ``text`` names and put it behind the controller. Is a checkpoint.

    Raises:
        ConfigError: It cannot be opened, or its place is taken.
    """
    spec, place = DiskSpec.parse(text).split()
    policy = place.pop("on-error", "report")
    if policy not in {"report", "stop"}:
        raise ConfigError(f"{text}: on-error is report or stop, not {policy[:40]!r}")
    if "shared" in place:
        raise ConfigError(f"{text}: only disks that the server was started with are shared")
    path, target, lun = _place(text, place)
    if lun is not None:  # before anything is made
        controller.units.check_free((path, target, lun))
    if spec.scheme == "cd" and not (spec.target or spec.options):
        return controller.add_drive(path=path, target=target, lun=lun)
    disk = await open_disk(spec)
    try:
        return controller.add_disk(
            disk,
            path=path,
            target=target,
            lun=lun,
            source=str(spec),
            stop_when_full=policy == "stop",
        )
    except BaseException:
        await disk.aclose()
        raise


def _place(text: str, place: Mapping[str, str]) -> tuple[int, int, int | None]:
    numbers = {
        name: _number(text, name, place[name])
        for name in place
        if name in {"path", "target", "lun"}
    }
    return numbers.get("path", 0), numbers.get("target", 0), numbers.get("lun")


async def insert(
    controller: ScsiController, address: str, text: str, *, replace: bool, force: bool
) -> bool:
    """Open the medium ``text`` names and put it into the drive at an address. Is a checkpoint.

    Returns:
        False if the guest has locked the tray.

    Raises:
        ConfigError: It cannot be opened, does not fit, or there is no drive that can take it.
    """
    place = parse_address(address)
    spec, options = DiskSpec.parse(text).split()
    if options:
        raise ConfigError(f"{text}: option {min(options)!r} places a disk, not a medium")
    controller.units.drive_for_medium(place, replace=replace)
    disk = await open_disk(spec)
    return await controller.insert_medium(place, disk, replace=replace, force=force, source=text)


def _flag(request: Mapping[str, Any], name: str) -> bool:
    value = request.get(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false, not {value!r}")
    return value


def _max_transfer(reader: OptionReader) -> int:
    size = reader.size("max_transfer_bytes")
    return DEFAULT_MAX_TRANSFER if size is None else size


def _number(text: str, name: str, value: str) -> int:
    try:
        return parse_number(value, signed=True)
    except ConfigError as error:
        raise ConfigError(f"{text}: option {name!r} needs a number: {error}") from None


def parse_address(text: str) -> Address:
    """Parse ``lun`` or ``path:target:lun``. Raises ConfigError."""
    try:
        numbers = [parse_number(part, signed=True) for part in text.split(":")]
    except ConfigError:
        numbers = []
    if len(numbers) == 1:
        return 0, 0, numbers[0]
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    raise ConfigError(f"{text[:40]!r} is not an address; write a LUN, or path:target:lun")
