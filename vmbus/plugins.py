"""Layer 4: devices by name, from the entry points in the group ``vmbus.devices``.

First-party devices register exactly as a stranger's do::

    [project.entry-points."vmbus.devices"]
    storvsp = "storvsp:ScsiController"

The object is a class with the members of :class:`DevicePlugin`. Nothing is imported before its
name is asked for, and a plug-in that cannot be imported breaks itself only.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, cast
from uuid import UUID

from vmbus.device import Device
from vmbus.errors import ConfigError

ENTRY_POINT_GROUP = "vmbus.devices"


class DevicePlugin(Protocol):
    """What an entry point of the group has to be: a class, as a rule the device's own."""

    async def from_specs(
        self,
        specs: Sequence[str],
        *,
        instance_id: UUID,
        initiator: Hashable,
        options: dict[str, Any],
    ) -> Device:
        """Make a device with the back-ends that ``specs`` name. Is a checkpoint.

        Args:
            specs: Back-ends, in the plug-in's own grammar (``ram:64M``).
            instance_id: The offer's instance GUID.
            initiator: Who the guest is, for back-ends shared with other guests.
            options: Settings of the device as a whole; unknown ones are an error.

        Raises:
            ConfigError: A specification cannot be honoured.
        """

    async def command(self, device: Device, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out an operator's request on a running device. Is a checkpoint.

        Raises:
            ConfigError: The request is unknown or cannot be honoured.
        """


def device_names() -> list[str]:
    """Return the names of all installed device plug-ins, in order. Cannot block for long."""
    return sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP).names)


def load_device(name: str) -> DevicePlugin:
    """Import a device plug-in.

    Raises:
        ConfigError: There is none of this name, or it cannot be imported; says which there are.
    """
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
    for entry in found:
        try:
            return cast("DevicePlugin", entry.load())
        except Exception as error:
            raise ConfigError(
                f"device {name!r} ({entry.value}) cannot be loaded: {error!r}"
            ) from error
    known = ", ".join(device_names()) or "none; is the package installed?"
    raise ConfigError(f"there is no device {name!r}; installed are: {known}")
