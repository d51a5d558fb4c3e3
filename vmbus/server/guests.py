"""The server program: any number of attached guests, each with a bus and devices of its own.

``vmbus serve`` is this with options; a program that wants to be such a server itself uses it as

::

    raise_descriptor_limit()
    server = GuestServer([DeviceSetup(device_with("disk"), ("raw:disk.img",))])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve, vmms, server.handle, query=server.query_own))
        nursery.start_soon(partial(serve_operators, operators, query=server.query,
                                   command=server.command))

Every guest gets its own back-ends: a specification is opened once per guest. ``{guest}`` in it
stands for the guest's name, so that each can have its own file; ``serve`` needs an ``admission``
then that refuses guests without one: ``Names(anonymous=False)``. A file that is opened for writing
is locked, so two guests cannot ruin it together by mistake; the second one is turned away with a
message that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vmbus import __version__
from vmbus.errors import ConfigError
from vmbus.host import BusConfig, open_bus
from vmbus.partition.transport import Transport
from vmbus.plugins.devices import asks_only
from vmbus.plugins.sharing import Line
from vmbus.server.attached import REMOVE, AttachedGuest, wanted_setup
from vmbus.server.devices import DeviceSetup, make_devices, pick_device
from vmbus.server.keepers import (
    LineMaker,
    NoKeepers,
    kept_specs,
    open_keeper,
    shared_backends,
    unshared,
)
from vmbus.server.process import resident_bytes

_log = logging.getLogger("vmbus.server")

T = TypeVar("T")


def check_kind(kind: str) -> None:
    """Raise ConfigError unless a QUERY may be of that kind."""
    if kind not in {"status", "guests"}:
        raise ConfigError(f"there is no query {kind!r}; there are 'status' and 'guests'")


def pick_guest(guests: Mapping[str, T], name: object) -> T:
    """Return the guest that a COMMAND means.

    Args:
        guests: Those that are attached, by name.
        name: Of the guest, or None if there is one only.

    Raises:
        ConfigError: There is none of that name, or several to choose from.
    """
    attached = ", ".join(guests) or "none"
    if name is None:
        if len(guests) == 1:
            return next(iter(guests.values()))
        if not guests:
            raise ConfigError("no guest is attached")
        raise ConfigError(f"which guest? attached are: {attached}")
    guest = guests.get(name) if isinstance(name, str) else None
    if guest is None:
        raise ConfigError(f"there is no guest {name!r}; attached are: {attached}")
    return guest


class GuestServer:
    """Makes a bus for each guest, and answers operators.

    Args:
        setups: The devices each guest gets, in the order in which they are offered.
        config: Budgets and limits of every bus.
        keepers: Where what guests share is kept; see :class:`vmbus.server.Keepers`.
        attached: Called when a guest has its bus and devices; cannot block.
    """

    def __init__(
        self,
        setups: Sequence[DeviceSetup],
        config: BusConfig | None = None,
        *,
        keepers: LineMaker | None = None,
        attached: Callable[[], None] = lambda: None,
    ) -> None:
        self.setups = tuple(setups)
        self.config = config or BusConfig()
        self._keepers = keepers or NoKeepers()
        self._attached = attached
        self._guests: dict[str, AttachedGuest] = {}
        self._served = 0
        self._numbers = 0
        self.faults = 0
        """Rules that guests broke which have left."""

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
            for setup in unshared(self.setups)
        ]
        for key in {how.keeper for how in shared_backends(self.setups).values()}:
            await (await open_keeper(key, kept_specs(self.setups, key))).aclose()
        for made in await make_devices("check", fixed):
            await made.device.aclose()

    async def handle(self, transport: Transport) -> None:
        """Serve one guest until it is gone. Is a checkpoint.

        Raises:
            ConfigError: A back-end cannot be opened for this guest, or another has its name.
        """
        name = transport.name
        if name in self._guests:
            raise ConfigError(f"a guest called {name!r} is attached")
        self._numbers += 1
        self._guests[name] = guest = AttachedGuest(self._numbers, transport)
        try:
            lines = await self._keepers.lines(name)
            made = await make_devices(name, self.setups, dict(lines))
            devices = [each.device for each in made]
            async with open_bus(transport, devices, config=self.config) as bus:
                guest.begin(bus, made)
                self._served += 1
                self._attached()
                _log.info("%s: attached with %d device(s)", name, len(devices))
                try:
                    await bus.wait_gone()
                finally:
                    guest.bus = None
                    self.faults += bus.faults
        finally:
            del self._guests[name]
        _log.info("%s: gone", name)

    # -- operators -------------------------------------------------------------------------------

    def query(self, kind: str) -> dict[str, Any]:
        """Answer a QUERY: ``"status"`` or ``"guests"``. Cannot block.

        Raises:
            ConfigError: There is no such kind.
        """
        check_kind(kind)
        status: dict[str, Any] = {
            "server": f"vmbus {__version__}",
            "pid": os.getpid(),
            "guests_served": self._served,
            "guests_attached": len(self._guests),
            "rss": resident_bytes(),
        }
        if kind == "guests":
            status["guests"] = [
                {**guest.snapshot(guest.bus), "name": name, "number": guest.number}
                for name, guest in self._guests.items()
                if guest.bus is not None
            ]
        return status

    def query_own(self, transport: Transport, kind: str) -> dict[str, Any]:
        """Answer a QUERY of a guest's own VMM: of other guests it hears nothing. Cannot block.

        Raises:
            ConfigError: There is no such kind.
        """
        check_kind(kind)
        status: dict[str, Any] = {"server": f"vmbus {__version__}"}
        if kind == "guests":
            status["guests"] = [
                {**guest.snapshot(guest.bus), "name": name}
                for name, guest in self._guests.items()
                if guest.transport is transport and guest.bus is not None
            ]
        return status

    async def command(
        self, request: dict[str, Any], lines: Mapping[str, Line] | None = None
    ) -> dict[str, Any]:
        """Answer a COMMAND: change a guest's devices, or pass it on to one. Is a checkpoint.

        ::

            {"guest": "vm1", "backend": "disk", "index": 0, "action": ...}

        ``guest`` may be left out if there is one only. Which device is meant is said by ``device``
        (the plug-in's name), ``backend`` (what its back-ends are called) and ``index`` (counting
        the guest's devices of one plug-in), as a QUERY lists them.

        Two actions are not a device's own. ``add-device`` offers the guest one more, which has
        ``specs``, a list of back-ends, and ``options``, an object; the answer describes it as a
        QUERY does. ``remove-device`` takes one away::

            {"backend": "endpoint", "action": "add-device", "specs": ["switch:lan"]}
            {"backend": "endpoint", "action": "remove-device", "index": 1}

        Args:
            request: As above.
            lines: To what an added device shares with other guests, by its specification; owned.
                None: what guests share is kept in this process.

        Raises:
            ConfigError: There is no such guest or device, or it cannot do that.
            BudgetError: The guest's bus is full.
            NotBackError: A device does not give back what it was handed.
        """
        with contextlib.ExitStack() as owned:
            for line in (lines or {}).values():
                owned.callback(line.close)
            attached = {name: each for name, each in self._guests.items() if each.bus is not None}
            guest = pick_guest(attached, request.get("guest"))
            name = guest.transport.name
            setup = wanted_setup(request)
            made = pick_device(guest.devices, request) if setup is None else None
            if request.get("action") is not None:
                what = {key: each for key, each in request.items() if key != "guest"}
                question = made is not None and asks_only(made.plugin, request["action"])
                level = logging.DEBUG if question else logging.INFO
                _log.log(level, "%s: an operator's command: %s", name, what)
            owned.pop_all()
        if setup is not None:
            if lines is None:
                found = await self._keepers.lines(name, setup)
                lines = {key.spec: line for key, line in found.items()}
            return await guest.add(setup, lines)
        assert made is not None
        if request.get("action") == REMOVE:
            await guest.remove(made)
            return {}
        return await made.plugin.command(made.device, request)
