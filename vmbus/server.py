"""The server program: any number of attached guests, each with a bus and devices of its own.

``vmbus serve`` is this with options; a program that wants to be such a server itself uses it as

::

    server = GuestServer([DeviceSetup("storvsp", ("raw:disk.img",))])
    await vmbus.attach.server.serve(listener, server.handle, query=server.query,
                                    command=server.command)

Every guest gets its own back-ends: a specification is opened once per guest. ``{guest}`` in it
stands for the guest's name, so that each can have its own file. A file that is opened for writing
is locked, so two guests cannot ruin it together by mistake; the second one is turned away with a
message that says so.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import resource
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid5

import trio

from vmbus import __version__
from vmbus.bus import Bus, BusConfig, open_bus
from vmbus.device import Device
from vmbus.errors import ConfigError
from vmbus.plugins import load_device
from vmbus.transport import Transport

_log = logging.getLogger("vmbus.server")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

INSTANCE_NAMESPACE = UUID("6f1d3c0e-5a0b-4c1e-9c55-0d5a3a7c1b2e")
"""Instance GUIDs are made from this and the device's place, so that a guest finds the same
devices after a restart of the server."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSetup:
    """One device that every guest gets."""

    plugin: str
    """Name of the device plug-in, for example ``storvsp``."""
    specs: tuple[str, ...] = ()
    """Its back-ends."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its settings."""


@dataclasses.dataclass(slots=True)
class _Guest:
    """An attached guest."""

    number: int
    transport: Transport
    bus: Bus | None = None
    """None until its devices are there."""


class GuestServer:
    """Makes a bus for each guest, and answers operators.

    Args:
        setups: The devices each guest gets, in the order in which they are offered.
        config: Budgets and limits of every bus.
    """

    def __init__(self, setups: Sequence[DeviceSetup], config: BusConfig | None = None) -> None:
        self.setups = tuple(setups)
        self.config = config or BusConfig()
        self._guests: dict[str, _Guest] = {}
        self._served = 0
        raise_descriptor_limit()

    async def check(self) -> None:
        """Open and close every back-end once, so that a mistake shows at start. A checkpoint.

        Not those with ``{guest}`` in them: their files belong to guests we do not know yet.

        Raises:
            ConfigError: One of them cannot be opened.
        """
        fixed = [
            dataclasses.replace(
                setup, specs=tuple(spec for spec in setup.specs if "{guest}" not in spec)
            )
            for setup in self.setups
        ]
        for device in await self._make_devices("check", fixed):
            await device.aclose()

    async def _make_devices(self, guest: str, setups: Sequence[DeviceSetup]) -> list[Device]:
        devices: list[Device] = []
        try:
            for index, setup in enumerate(setups):
                plugin = load_device(setup.plugin)
                specs = [_for_guest(spec, guest) for spec in setup.specs]
                devices.append(
                    await plugin.from_specs(
                        specs,
                        instance_id=uuid5(INSTANCE_NAMESPACE, f"{setup.plugin}/{index}"),
                        initiator=guest,
                        options=setup.options,
                    )
                )
        except BaseException:
            with trio.CancelScope(shield=True):
                for device in devices:
                    await device.aclose()
            raise
        return devices

    async def handle(self, transport: Transport) -> None:
        """Serve one guest until it is gone. Is a checkpoint.

        Raises:
            ConfigError: A back-end cannot be opened for this guest.
        """
        self._served += 1
        name = self._unique(transport.name)
        self._guests[name] = guest = _Guest(self._served, transport)
        try:
            devices = await self._make_devices(name, self.setups)
            async with open_bus(transport, devices, config=self.config) as bus:
                guest.bus = bus
                _log.info("%s: attached with %d device(s)", name, len(devices))
                try:
                    await bus.wait_gone()
                finally:
                    guest.bus = None
        finally:
            del self._guests[name]
        _log.info("%s: gone", name)

    def _unique(self, wanted: str) -> str:
        wanted = name = wanted or "guest"
        suffix = 2
        while name in self._guests:
            name = f"{wanted}-{suffix}"
            suffix += 1
        return name

    # -- operators -------------------------------------------------------------------------------

    def query(self, kind: str) -> dict[str, Any]:
        """Answer a QUERY: ``"status"`` or ``"guests"``. Cannot block.

        Raises:
            ConfigError: There is no such kind.
        """
        if kind not in {"status", "guests"}:
            raise ConfigError(f"there is no query {kind!r}; there are 'status' and 'guests'")
        status: dict[str, Any] = {
            "server": f"vmbus {__version__}",
            "pid": os.getpid(),
            "guests_served": self._served,
            "guests_attached": len(self._guests),
            "rss": resident_bytes(),
        }
        if kind == "guests":
            status["guests"] = [
                {**guest.bus.snapshot(), "name": name, "number": guest.number}
                for name, guest in self._guests.items()
                if guest.bus is not None
            ]
        return status

    async def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a COMMAND: pass it on to a guest's device. Is a checkpoint.

        ::

            {"guest": "vm1", "device": "storvsp", "index": 0, "action": ...}

        ``guest`` may be left out if there is one only; ``device`` and ``index`` (counting devices
        of that name) if there is one such device.

        Raises:
            ConfigError: There is no such guest or device, or it cannot do that.
        """
        bus = self._pick_bus(request.get("guest"))
        plugin = request.get("device", "storvsp")
        # The bus was given one device for each setup, in this order, and keeps them.
        found = [
            device
            for setup, device in zip(self.setups, bus.devices.values(), strict=True)
            if setup.plugin == plugin
        ]
        index = request.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < len(found):
            number = f"{len(found)}, counted from 0" if found else "none"
            raise ConfigError(f"the guest has no {plugin!r} number {index!r}; it has {number}")
        return await load_device(plugin).command(found[index], request)

    def _pick_bus(self, name: object) -> Bus:
        buses = {name: guest.bus for name, guest in self._guests.items() if guest.bus is not None}
        attached = ", ".join(buses) or "none"
        if name is None:
            if len(buses) == 1:
                return next(iter(buses.values()))
            if not buses:
                raise ConfigError("no guest is attached")
            raise ConfigError(f"which guest? attached are: {attached}")
        bus = buses.get(name) if isinstance(name, str) else None
        if bus is None:
            raise ConfigError(f"there is no guest {name!r}; attached are: {attached}")
        return bus


def _for_guest(spec: str, guest: str) -> str:
    """Put a guest's name into a specification."""
    if "{guest}" in spec and not _PLAIN_NAME.fullmatch(guest):
        # The VMM chooses the name. It must not choose the directory, nor options.
        raise ConfigError(
            f"{spec}: {guest!r} cannot stand for {{guest}}; it may have letters, digits, "
            "'_', '-' and '.', and not begin with '.' or '-'"
        )
    return spec.replace("{guest}", guest)


def resident_bytes() -> int:
    """Resident memory of this process's own, in bytes.

    That of guests is shared memory, and left out: with huge pages, a look at one of their pages
    makes 2 MiB resident here.
    """
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us: each open channel needs one or two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
