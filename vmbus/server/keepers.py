"""What guests share, kept in this process: for servers that serve all guests in one."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol
from uuid import uuid5

import trio

from vmbus.errors import ConfigError
from vmbus.plugins.devices import load_device
from vmbus.plugins.sharing import Keeper, Line, can_share, make_line
from vmbus.server.devices import INSTANCE_NAMESPACE, DeviceSetup, SharedKey


class KeeperKey(NamedTuple):
    """Which keeper."""

    plugin: str
    place: int
    """Of the device whose back-end it keeps; -1 if it keeps something for several."""
    name: str
    """The back-end's specification, or what the plug-in calls the keeper."""


class Shared(NamedTuple):
    """How guests come to something that they share."""

    keeper: KeeperKey
    staging: int
    """Bytes of a line's staging area."""
    programs: bool
    """Whether the keeper starts programs."""


def shared_backends(
    setups: Sequence[DeviceSetup], *, within_process: bool = False
) -> dict[SharedKey, Shared]:
    """Return what guests share.

    Args:
        setups: Their devices.
        within_process: Leave out what guests of one process need no keeper for.

    Raises:
        ConfigError: Something cannot be shared.
    """
    found: dict[SharedKey, Shared] = {}
    for place, setup in enumerate(setups):
        plugin = load_device(setup.plugin)
        if can_share(plugin):
            for spec, share in plugin.shared(setup.specs, setup.options).items():
                if "{guest}" in spec and not share.keeper:
                    raise ConfigError(f"{spec}: what all guests share has no guest's name in it")
                if within_process and not share.within_process:
                    continue
                keeper = KeeperKey(setup.plugin, place, spec)
                if share.keeper:
                    keeper = KeeperKey(setup.plugin, -1, share.keeper)
                found[SharedKey(place, spec)] = Shared(keeper, share.staging, share.programs)
    return found


def unshared(setups: Sequence[DeviceSetup]) -> list[DeviceSetup]:
    """Return the same devices without the back-ends that guests share. Raises ConfigError."""
    shared = shared_backends(setups)
    return [
        dataclasses.replace(
            setup, specs=tuple(spec for spec in setup.specs if (place, spec) not in shared)
        )
        for place, setup in enumerate(setups)
    ]


def kept_specs(setups: Sequence[DeviceSetup], key: KeeperKey) -> list[str]:
    """Return the specifications of what a keeper keeps, each once. Raises ConfigError."""
    shared = shared_backends(setups)
    return list(dict.fromkeys(each.spec for each, how in shared.items() if how.keeper == key))


def shared_by_added(setup: DeviceSetup, *, within_process: bool = False) -> dict[SharedKey, Shared]:
    """Return what a device shares that is added to a guest which runs.

    Args:
        setup: The device.
        within_process: As in :func:`shared_backends`.

    Returns:
        As :func:`shared_backends` does, for place 0.

    Raises:
        ConfigError: Something cannot be shared, or only by what is there from the start.
    """
    found = shared_backends([setup], within_process=within_process)
    for key, how in found.items():
        if how.keeper.place >= 0:  # which differs from guest to guest
            raise ConfigError(
                f"{key.spec}: it is shared only by devices that the server was started with"
            )
    return found


async def open_keeper(key: KeeperKey, specs: Sequence[str]) -> Keeper:
    """Open what guests share. Is a checkpoint.

    Args:
        key: What it is called.
        specs: What it keeps: see :func:`kept_specs`.

    Raises:
        ConfigError: It cannot be opened.
    """
    plugin = load_device(key.plugin)
    assert can_share(plugin)
    identity = uuid5(INSTANCE_NAMESPACE, f"{key.plugin}/{key.place}/{key.name}").bytes
    return await plugin.open_keeper(specs, identity=identity)


LINE_GRACE = 5.0
"""Seconds for guests to let go of what they share, once the server ends."""


class LineMaker(Protocol):
    """Connects guests with what they share."""

    async def lines(self, guest: str, added: DeviceSetup | None = None) -> Mapping[SharedKey, Line]:
        """Return a guest's lines, the caller's to close. Is a checkpoint.

        Args:
            guest: Its name.
            added: A device that it gets, for the lines of that alone, in place 0.

        Raises:
            ConfigError: What is shared cannot be opened, or not now.
        """


class NoKeepers:
    """For servers that keep nothing."""

    async def lines(
        self, _guest: str, added: DeviceSetup | None = None
    ) -> Mapping[SharedKey, Line]:
        """See :class:`LineMaker`."""
        await trio.lowlevel.checkpoint()
        for key in shared_by_added(added, within_process=True) if added is not None else ():
            raise ConfigError(f"{key.spec}: this server keeps nothing that guests share")
        return {}


class Keepers:
    """Keepers as tasks of this process. Use :meth:`open`."""

    def __init__(self, nursery: trio.Nursery, setups: Sequence[DeviceSetup]) -> None:
        self._nursery = nursery
        self._shared = shared_backends(setups, within_process=True)
        self._keepers: dict[KeeperKey, Keeper] = {}
        self._opening = trio.Lock()
        self._lines: set[trio.CancelScope] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, setups: Sequence[DeviceSetup]) -> AsyncIterator[Keepers]:
        """Keep what guests share for the length of an ``async with`` block. Is a checkpoint.

        Raises:
            ConfigError: Something cannot be opened.
        """
        async with trio.open_nursery() as nursery:
            keepers = cls(nursery, setups)
            try:
                for key in dict.fromkeys(how.keeper for how in keepers._shared.values()):
                    keepers._keepers[key] = await open_keeper(key, kept_specs(setups, key))
                yield keepers
            finally:
                for scope in keepers._lines:
                    scope.deadline = trio.current_time() + LINE_GRACE
        with trio.CancelScope(shield=True):
            for keeper in keepers._keepers.values():
                await keeper.aclose()

    async def _serve(self, keeper: Keeper, line: Line, guest: str, spec: str) -> None:
        """Serve a line to its end: guests that are cancelled with us let go of it first."""
        with trio.CancelScope(shield=True) as scope:
            self._lines.add(scope)
            await keeper.serve(line, guest, spec)
        self._lines.discard(scope)

    async def lines(self, guest: str, added: DeviceSetup | None = None) -> Mapping[SharedKey, Line]:
        """See :class:`LineMaker`."""
        await trio.lowlevel.checkpoint()
        shared = self._shared if added is None else shared_by_added(added, within_process=True)
        async with self._opening:
            for key, how in shared.items():
                if how.keeper not in self._keepers:
                    self._keepers[how.keeper] = await open_keeper(how.keeper, [key.spec])
        made: dict[SharedKey, Line] = {}
        for key, how in shared.items():
            ours, made[key] = make_line(how.staging)
            self._nursery.start_soon(self._serve, self._keepers[how.keeper], ours, guest, key.spec)
        return made
