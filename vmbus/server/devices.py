"""The devices of one guest: made as the server's set-up says, and found again by operators."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import trio

from vmbus.errors import ConfigError
from vmbus.host.device import Device
from vmbus.plugins.devices import DevicePlugin, load_device
from vmbus.plugins.sharing import Line
from vmbus.plugins.words import enumerate_words

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

INSTANCE_NAMESPACE = UUID("6f1d3c0e-5a0b-4c1e-9c55-0d5a3a7c1b2e")
"""Instance GUIDs are made from this and the device's place, so that a guest finds the same
devices after a restart of the server."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSetup:
    """One device that every guest gets."""

    plugin: str
    """Name of the device plug-in, as ``vmbus devices`` lists it."""
    specs: tuple[str, ...] = ()
    """Its back-ends."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its settings."""


class SharedKey(NamedTuple):
    """Which back-end of which device several guests share."""

    place: int
    """Of the device among a guest's."""
    spec: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MadeDevice:
    """A device of a guest, and what operators call it."""

    device: Device
    plugin: DevicePlugin
    name: str
    """The plug-in's."""
    index: int
    """Counts the guest's devices of this plug-in, from 0; one that is removed leaves a gap."""
    place: int
    """Among all of the guest's devices: what its instance GUID is made from."""

    @property
    def backend(self) -> str | None:
        """What its back-ends are called, as in "disk"; None if it has none to choose from."""
        return self.plugin.backends.noun if self.plugin.backends is not None else None

    def label(self) -> dict[str, Any]:
        """Return what commands know it by, as JSON types."""
        return {"plugin": self.name, "index": self.index, "backend": self.backend}


async def make_devices(
    guest: str, setups: Sequence[DeviceSetup], lines: Mapping[SharedKey, Line] | None = None
) -> list[MadeDevice]:
    """Make a guest's devices. Is a checkpoint.

    Args:
        guest: Its name.
        setups: What to make.
        lines: To what the guest shares with others, by the device's place and the specification;
            owned.

    Raises:
        ConfigError: A back-end cannot be opened, and nothing stays open.
    """
    made: list[MadeDevice] = []
    try:
        for place, setup in enumerate(setups):
            shared = {spec: line for (at, spec), line in (lines or {}).items() if at == place}
            made.append(await make_device(guest, setup, made, shared))
    except BaseException:
        with trio.CancelScope(shield=True):
            for each in made:
                await each.device.aclose()
        raise
    return made


async def make_device(
    guest: str, setup: DeviceSetup, others: Iterable[MadeDevice], lines: Mapping[str, Line]
) -> MadeDevice:
    """Make one device of a guest, in the first place that is free. Is a checkpoint.

    Args:
        guest: Its name.
        setup: What to make.
        others: The devices that it has.
        lines: To what it shares with other guests, by the specification; owned.

    Raises:
        ConfigError: A back-end cannot be opened, and nothing stays open.
    """
    others = list(others)
    place = _lowest({each.place for each in others})
    index = _lowest({each.index for each in others if each.name == setup.plugin})
    with contextlib.ExitStack() as owned:
        for line in lines.values():
            owned.callback(line.close)
        plugin = load_device(setup.plugin)
        specs = [for_guest(spec, guest) for spec in setup.specs]
        shared = {for_guest(spec, guest): line for spec, line in lines.items()}
        owned.pop_all()
    device = await plugin.from_specs(
        specs,
        instance_id=uuid5(INSTANCE_NAMESPACE, f"{setup.plugin}/{place}"),
        initiator=guest,
        options=setup.options,
        **({"shared": shared} if shared else {}),
    )
    return MadeDevice(device, plugin, setup.plugin, index, place)


def _lowest(taken: set[int]) -> int:
    return next(number for number in itertools.count() if number not in taken)


def pick_device(made: Iterable[MadeDevice], request: Mapping[str, Any]) -> MadeDevice:
    """Return the device that a request means.

    Args:
        made: The guest's.
        request: ``device`` is a plug-in's name, ``backend`` what its back-ends are called; either
            or both may be missing. ``index`` counts the guest's devices of one plug-in.

    Raises:
        ConfigError: None is meant, or several are.
    """
    name, backend, index = request.get("device"), request.get("backend"), request.get("index", 0)
    kind = [each for each in made if name in (None, each.name) and backend in (None, each.backend)]
    what = repr(name) if name is not None else "device"
    if backend is not None and name is None:
        what = f"{backend} device"
    found = [each for each in kind if each.index == index]
    if not isinstance(index, int) or isinstance(index, bool) or not found:
        raise ConfigError(f"there is no {what} number {index!r}; the guest has {_numbers_of(kind)}")
    if len(found) > 1:
        names = ", ".join(sorted(each.name for each in found))
        raise ConfigError(f"which {what} number {index}? the guest has: {names}")
    return found[0]


def _numbers_of(kind: Sequence[MadeDevice]) -> str:
    numbers = sorted(each.index for each in kind)
    if len(numbers) < 2:
        return f"one, number {numbers[0]}" if numbers else "none"
    words = f"0 to {len(numbers) - 1}"
    if numbers != list(range(len(numbers))):
        words = enumerate_words(map(str, numbers), "and")
    return f"{len(numbers)}, numbers {words}"


def need_names(setups: Iterable[DeviceSetup]) -> bool:
    """Whether ``{guest}`` stands in a specification, so that guests must have names."""
    return any("{guest}" in spec for setup in setups for spec in setup.specs)


def for_guest(spec: str, guest: str) -> str:
    """Put a guest's name into a specification. Raises ConfigError."""
    if "{guest}" in spec and not _PLAIN_NAME.fullmatch(guest):
        # The VMM chooses the name. It must not choose the directory, nor options.
        raise ConfigError(
            f"{spec}: {guest!r} cannot stand for {{guest}}; it may have letters, digits, "
            "'_', '-' and '.', and not begin with '.' or '-'"
        )
    return spec.replace("{guest}", guest)
