"""Devices by name, from the entry points in the group ``vmbus.devices``.

First-party devices register exactly as a stranger's do::

    [project.entry-points."vmbus.devices"]
    storvsp = "storvsp:PLUGIN"

The object has the members of :class:`DevicePlugin`. Programs that work with devices, the server
and the command line, know no device by name: they ask here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, cast
from uuid import UUID

from vmbus.errors import ConfigError
from vmbus.host.device import Device
from vmbus.plugins.registry import Registry


class DevicePlugin(Protocol):
    """What an entry point of the group has to be."""

    backends: Registry | None
    """The back-ends that its devices can have, if there are any to choose from. Their noun is a
    word of the command line: the plug-in whose back-ends are disks makes what ``--disk`` says."""
    demo: str | None
    """Module with a program, ``python -m``, that is a guest of ``vmbus demo`` for such a device."""

    async def from_specs(
        self,
        specs: Sequence[str],
        *,
        instance_id: UUID,
        initiator: Hashable,
        options: Mapping[str, Any],
    ) -> Device:
        """Make a device with the back-ends that ``specs`` name. Is a checkpoint.

        Args:
            specs: Back-ends, in the plug-in's own grammar (``ram:64M``).
            instance_id: The offer's instance GUID.
            initiator: Who the guest is, for back-ends shared with other guests.
            options: Settings of the device as a whole, by name: text from a command line, or what
                a program has instead, numbers and booleans. To be read through a
                :class:`vmbus.plugins.specs.OptionReader`, for which unknown ones are an error.

        Raises:
            ConfigError: A specification cannot be honoured.
        """

    async def command(self, device: Device, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an operator's request on a running device. Is a checkpoint.

        Requests whose ``action`` is among the plug-in's ``questions``, a collection that it may
        have, change nothing. They come as often as somebody looks, and are no news for a log.

        Raises:
            ConfigError: The request is unknown or cannot be honoured.
        """


def asks_only(plugin: DevicePlugin, action: object) -> bool:
    """Whether an operator's request changes nothing; see :meth:`DevicePlugin.command`."""
    return action in getattr(plugin, "questions", ())


_MEMBERS = ("backends", "demo", "from_specs", "command")

DEVICES = Registry("vmbus.devices", "device")
"""The devices that are installed."""


def load_device(name: str) -> DevicePlugin:
    """Import a device plug-in.

    Raises:
        ConfigError: As :meth:`Registry.load` does, or it is no device plug-in.
    """
    plugin = DEVICES.load(name)
    missing = [each for each in _MEMBERS if not hasattr(plugin, each)]
    if missing:
        raise ConfigError(f"device plug-in {name!r} is broken: it has no {missing[0]!r}")
    return cast("DevicePlugin", plugin)


def device_with(noun: str) -> str:
    """Return the name of the device whose back-ends are called ``noun``, as in "disk".

    Raises:
        ConfigError: None of the devices that can be imported has such back-ends.
    """
    broken = []
    for name in DEVICES.names():
        try:
            backends = load_device(name).backends
        except ConfigError as error:
            broken.append(f"; {error}")
        else:
            if backends is not None and backends.noun == noun:
                return name
    raise ConfigError(f"no installed device has a {noun} as its back-end{''.join(broken)}")


def backend_registries() -> list[Registry]:
    """Return the registries of all devices' back-ends. Imports the devices.

    A device that cannot be imported has none.
    """
    found: list[Registry] = []
    for name in DEVICES.names():
        with contextlib.suppress(ConfigError):
            backends = load_device(name).backends
            if backends is not None and backends not in found:
                found.append(backends)
    return found
