"""What guests share, kept in this process: for servers that serve all guests in one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import uuid5

import trio

from vmbus.errors import ConfigError
from vmbus.plugins.devices import load_device
from vmbus.plugins.sharing import Keeper, Line, can_share, make_line
from vmbus.server.devices import INSTANCE_NAMESPACE, DeviceSetup, SharedKey


def shared_backends(setups: Sequence[DeviceSetup]) -> dict[SharedKey, int]:
    """Return what guests share, with the bytes of staging areas.

    Raises:
        ConfigError: Something cannot be shared.
    """
    found: dict[SharedKey, int] = {}
    for place, setup in enumerate(setups):
        plugin = load_device(setup.plugin)
        if can_share(plugin):
            for spec, staging in plugin.shared(setup.specs, setup.options).items():
                if "{guest}" in spec:
                    raise ConfigError(f"{spec}: what all guests share has no guest's name in it")
                found[SharedKey(place, spec)] = staging
    return found


async def open_keeper(setups: Sequence[DeviceSetup], key: SharedKey) -> Keeper:
    """Open what guests share. Is a checkpoint. Raises ConfigError."""
    setup = setups[key.place]
    plugin = load_device(setup.plugin)
    assert can_share(plugin)
    name = f"{setup.plugin}/{key.place}/{key.spec}"
    return await plugin.open_keeper(key.spec, identity=uuid5(INSTANCE_NAMESPACE, name).bytes)


LINE_GRACE = 5.0
"""Seconds for guests to let go of what they share, once the server ends."""


class LineMaker(Protocol):
    """Connects guests with what they share."""

    async def lines(self, guest: str) -> Mapping[SharedKey, Line]:
        """Return a guest's lines, the caller's to close. Is a checkpoint. Raises ConfigError."""


class NoKeepers:
    """For servers that keep nothing."""

    async def lines(self, _guest: str) -> Mapping[SharedKey, Line]:
        """See :class:`LineMaker`."""
        await trio.lowlevel.checkpoint()
        return {}


class Keepers:
    """Keepers as tasks of this process. Use :meth:`open`."""

    def __init__(self, nursery: trio.Nursery, staging: Mapping[SharedKey, int]) -> None:
        self._nursery = nursery
        self._staging = staging
        self._keepers: dict[SharedKey, Keeper] = {}
        self._lines: set[trio.CancelScope] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, setups: Sequence[DeviceSetup]) -> AsyncIterator[Keepers]:
        """Keep what guests share for the length of an ``async with`` block. Is a checkpoint.

        Raises:
            ConfigError: Something cannot be opened.
        """
        async with trio.open_nursery() as nursery:
            keepers = cls(nursery, shared_backends(setups))
            try:
                for key in keepers._staging:
                    keepers._keepers[key] = await open_keeper(setups, key)
                yield keepers
            finally:
                for scope in keepers._lines:
                    scope.deadline = trio.current_time() + LINE_GRACE
        with trio.CancelScope(shield=True):
            for keeper in keepers._keepers.values():
                await keeper.aclose()

    async def _serve(self, keeper: Keeper, line: Line, guest: str) -> None:
        """Serve a line to its end: guests that are cancelled with us let go of it first."""
        with trio.CancelScope(shield=True) as scope:
            self._lines.add(scope)
            await keeper.serve(line.sock, line.staging_fd, guest)
        self._lines.discard(scope)

    async def lines(self, guest: str) -> Mapping[SharedKey, Line]:
        """See :class:`LineMaker`."""
        await trio.lowlevel.checkpoint()
        made: dict[SharedKey, Line] = {}
        for key, keeper in self._keepers.items():
            ours, made[key] = make_line(self._staging[key])
            self._nursery.start_soon(self._serve, keeper, ours, guest)
        return made
