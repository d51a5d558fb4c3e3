"""One attached guest: its bus, and its devices, which come and go while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import trio

from vmbus.errors import ConfigError
from vmbus.host import Bus
from vmbus.partition.transport import Transport
from vmbus.plugins.devices import device_with
from vmbus.plugins.remarks import remarks
from vmbus.plugins.sharing import Line
from vmbus.server.devices import DeviceSetup, MadeDevice, make_device

ADD, REMOVE = "add-device", "remove-device"
"""Actions of commands that are about the bus itself, and not about what a device can do."""


class AttachedGuest:
    """A guest of a server.

    Args:
        number: Counts the server's guests.
        transport: Its partition.

    Attributes:
        bus: None until its devices are there, and when it is about to leave.
    """

    def __init__(self, number: int, transport: Transport) -> None:
        self.number = number
        self.transport = transport
        self.bus: Bus | None = None
        self._made: list[MadeDevice] = []
        self._adding = trio.Lock()

    def begin(self, bus: Bus, made: list[MadeDevice]) -> None:
        """Take note of the bus, and of the devices that it begins with. Cannot block."""
        self.bus = bus
        self._made = made

    @property
    def devices(self) -> list[MadeDevice]:
        """Those that are on the bus."""
        there = set(map(id, self.bus.devices.values())) if self.bus is not None else set()
        self._made = [made for made in self._made if id(made.device) in there]
        return self._made

    def snapshot(self, bus: Bus) -> dict[str, Any]:
        """Describe its bus, with the names that commands have for its devices. Cannot block."""
        found = bus.snapshot()
        labels = {id(made.device): made.label() for made in self.devices}
        devices = bus.devices
        for each in found["devices"]:
            each.update(labels.get(id(devices[each["key"]]), {}))
        return found

    async def add(self, setup: DeviceSetup, lines: Mapping[str, Line]) -> dict[str, Any]:
        """Make a device and offer it to the guest. Is a checkpoint.

        It gets the first place that is free, and with it the instance GUID that a device there
        always has: a guest that has seen it before knows it again.

        Args:
            setup: What to make.
            lines: To what it shares with other guests, by the specification; owned.

        Returns:
            What commands call it, its ``instance``, and what it says of itself, as JSON types;
            ``warnings``, a list of texts, if there is something to know.

        Raises:
            ConfigError: It cannot be made, or the guest has left.
            BudgetError: The bus is full.
        """
        with contextlib.ExitStack() as owned:
            for line in lines.values():
                owned.callback(line.close)
            async with self._adding:
                owned.pop_all()
                with remarks() as warnings:
                    made = await make_device(self.transport.name, setup, self.devices, lines)
                try:
                    if self.bus is None:
                        raise ConfigError(f"{self.transport.name} has left")
                    self.bus.add_device(made.device)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await made.device.aclose()
                    raise
                self._made.append(made)
        return {
            **made.label(),
            "instance": str(made.device.offer.instance_id),
            **made.device.snapshot(),
            **({"warnings": warnings} if warnings else {}),
        }

    async def remove(self, made: MadeDevice) -> None:
        """Rescind a device and close it. Is a checkpoint.

        Raises:
            ConfigError: It is not on the bus any more.
            NotBackError: It stays, or is not closed yet; see :meth:`vmbus.host.Bus.remove_device`.
        """
        bus = self.bus
        numbers = [
            number
            for number, device in (bus.devices.items() if bus is not None else ())
            if device is made.device
        ]
        if bus is None or not numbers:
            raise ConfigError(f"{self.transport.name} has this device no more")
        await bus.remove_device(numbers[0])


def wanted_setup(request: Mapping[str, Any]) -> DeviceSetup | None:
    """Return the device that a command wants to be added, None if it wants something else.

    Raises:
        ConfigError: It does not say which, or wrongly.
    """
    if request.get("action") != ADD:
        return None
    match request:
        case {"device": str(name)}:
            plugin = name
        case {"backend": str(noun)}:
            plugin = device_with(noun)
        case _:
            raise ConfigError(f"{ADD}: device is a plug-in's name; or backend, what it has")
    specs, options = request.get("specs", []), request.get("options", {})
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        raise ConfigError(f"{ADD}: specs is a list of texts such as ram:64M")
    if not isinstance(options, dict):
        raise ConfigError(f"{ADD}: options is an object, names with their values")
    return DeviceSetup(plugin, tuple(specs), options)
