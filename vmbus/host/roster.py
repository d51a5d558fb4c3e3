"""The devices of a bus, and what becomes of them: offered, failed, removed, closed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import trio

from vmbus.errors import BudgetError, ConfigError, NotBackError
from vmbus.host.device import Device, Retiring, Saveable
from vmbus.host.runner import ChannelRunner
from vmbus.host.services import Services
from vmbus.host.stops import names_of
from vmbus.host.undertakings import not_back
from vmbus.wire.guids import class_name

_log = logging.getLogger("vmbus.bus")

MAX_FAULTY_LIVES = 3
"""A device whose channel died this often on one connection is not offered again before the next."""


@dataclasses.dataclass(slots=True, eq=False)
class Removal:
    """A device on its way off the bus."""

    over: trio.Event = dataclasses.field(default_factory=trio.Event)
    """Set when the device is closed, or stays."""
    failed: str = ""
    """Why it stays."""


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A device on the bus."""

    device: Device
    number: int
    """What the host program calls it, for good."""
    key: int
    """What the engine calls its present offer."""
    removal: Removal | None = None
    """None unless it has to go."""
    faulty_lives: int = 0
    offered: bool = True

    @property
    def instance(self) -> UUID:
        """The instance GUID of its offer."""
        return self.device.offer.instance_id


class Roster:
    """The devices of one bus.

    Args:
        bus: The bus.
        runners: Its channels, by the engine's key; only read here.
    """

    def __init__(self, bus: Services, runners: Mapping[int, ChannelRunner]) -> None:
        self._bus = bus
        self._runners = runners
        self._entries: dict[int, Entry] = {}
        self._next_number = 1
        self._owners: dict[int, Entry] = {}
        self._name = bus.transport.name

    def __iter__(self) -> Iterator[Entry]:
        """Go through the devices in the order in which they came."""
        return iter(tuple(self._entries.values()))

    def owner(self, key: int) -> Entry | None:
        """Return the device whose present offer has this key in the engine."""
        return self._owners.get(key)

    def add(self, device: Device) -> int:
        """Offer a device; return its number. Raises ConfigError, BudgetError."""
        instance = device.offer.instance_id
        if any(
            not entry.offered and entry.removal is None and entry.instance == instance
            for entry in self
        ):
            # The engine does not know of those that wait for the guest's next life.
            raise ConfigError(f"offer: instance {instance} is on the bus already")
        entry = Entry(device, self._next_number, self._bus.engine.offer(device.offer))
        self._next_number += 1
        self._entries[entry.number] = entry
        self._owners[entry.key] = entry
        return entry.number

    async def remove(self, number: int) -> None:
        """Rescind a device, wait for it to end, close it. A checkpoint.

        One that is :class:`vmbus.host.device.Retiring` has ``close_grace`` for that before.
        A request that is not at rest after ``close_grace`` and ``pause_grace`` is one of a back-end
        that does not give back what it was handed. The device stays then, and serves on: a guest
        that is told of a removal waits for the answers that it has not got, and never gets them.
        A device that does not end after the guest has been told has ``close_grace`` and
        ``fence_grace`` more, and goes on being removed after that.

        Raises:
            ConfigError: There is no such device.
            NotBackError: It stays, or is not closed yet; the text says what does not come back.
        """
        entry = self._entries.get(number)
        if entry is None:
            raise ConfigError(f"there is no device {number} on this bus")
        removal = entry.removal
        if removal is None:
            removal = entry.removal = Removal()
            # In a task of its own: a caller that loses patience must not leave it half removed.
            self._bus.nursery.start_soon(self._remove, entry, removal)
        config = self._bus.config
        seconds = 3 * config.close_grace + config.pause_grace + config.fence_grace
        with trio.move_on_after(seconds):
            await removal.over.wait()
        if removal.failed:
            raise NotBackError(removal.failed)
        if not removal.over.is_set():
            raise NotBackError(self._late(entry, seconds))

    async def _remove(self, entry: Entry, removal: Removal) -> None:
        # Linux drops completions of a rescinded channel but waits for them all the same, so what
        # is in flight is answered before the guest hears of the removal.
        config = self._bus.config
        if isinstance(entry.device, Retiring):
            with trio.move_on_after(config.close_grace):
                await entry.device.retire()
        with trio.move_on_after(config.close_grace):
            for runner in self._runners_of(entry):
                await runner.drain()
        if not await self._at_rest(entry):
            removal.failed = self._late(entry, config.close_grace + config.pause_grace)
            self._keep(entry)
            removal.over.set()
            return
        self._bus.engine.revoke(entry.key)
        self._bus.pump()
        for runner in self._runners_of(entry):
            await runner.finished.wait()
        await self._close(entry)

    async def _at_rest(self, entry: Entry) -> bool:
        """Let requests that take their time stand still. A checkpoint if one does not yet.

        Returns:
            Whether none touches guest memory any more.
        """
        if names_of(self._runners_of(entry)):
            with trio.move_on_after(self._bus.config.pause_grace):
                for runner in self._runners_of(entry):
                    await runner.pause()
        return not names_of(self._runners_of(entry))

    def _keep(self, entry: Entry) -> None:
        """Go on with a device that could not be removed."""
        entry.removal = None
        if isinstance(entry.device, Retiring):
            entry.device.stay()
        if not entry.offered:  # its guest has left meanwhile
            self._offer_again(entry)
        if not self._bus.paused:
            for runner in self._runners_of(entry):
                runner.resume()

    def _late(self, entry: Entry, seconds: float) -> str:
        """Say what does not let a device be removed; also in the log."""
        text = not_back(names_of(self._runners_of(entry)), seconds)
        if self._bus.failure_log.spend():
            _log.error("%s: removing %s: %s", self._name, entry.instance, text)
        return text

    def _runners_of(self, entry: Entry) -> list[ChannelRunner]:
        runners = self._runners.values()
        return [runner for runner in runners if runner.event.primary_key == entry.key]

    def failed(self, key: int) -> None:
        """A device gave its channel up: rescind it, so that the guest knows. Cannot block."""
        entry = self._owners.get(key)
        if entry is not None and entry.removal is None:
            entry.faulty_lives += 1
            self._bus.engine.revoke(key)

    def gone(self, key: int, *, unwanted: bool = False) -> None:
        """The guest has let go of a channel: offer its device again. Cannot block.

        Args:
            key: What the engine called it.
            unwanted: The guest gave it back of its own accord: the device waits for its next life.
        """
        entry = self._owners.pop(key, None)
        if entry is None:
            return
        entry.offered = False
        if entry.removal is None and not unwanted and entry.faulty_lives < MAX_FAULTY_LIVES:
            self._offer_again(entry)

    def disconnected(self) -> None:
        """The guest has left the bus: the next one gets all devices. Cannot block."""
        for entry in self:
            entry.faulty_lives = 0
            if not entry.offered and entry.removal is None:
                self._offer_again(entry)

    def _offer_again(self, entry: Entry) -> None:
        try:
            entry.key = self._bus.engine.offer(entry.device.offer)
        except BudgetError as error:
            # Others have taken its room; the guest's next life may leave more.
            if self._bus.failure_log.spend():
                _log.warning("%s: %s cannot come back: %s", self._name, entry.instance, error)
            return
        entry.offered = True
        self._owners[entry.key] = entry

    def describe(self) -> list[dict[str, Any]]:
        """Describe the devices for people, as JSON types. Cannot block, never raises."""
        return [
            {
                "key": entry.number,
                "class": class_name(entry.device.offer.class_id),
                "instance": str(entry.instance),
                "faulty_lives": entry.faulty_lives,
                **entry.device.snapshot(),
            }
            for entry in self
        ]

    def save(self) -> dict[str, Any]:
        """See :meth:`vmbus.host.Bus.save`."""
        return {
            str(entry.instance): entry.device.save()
            for entry in self
            if isinstance(entry.device, Saveable)
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`vmbus.host.Bus.restore`."""
        found = {str(entry.instance): entry.device for entry in self}
        if not isinstance(state, dict):
            raise ConfigError("saved state: not an object")
        for instance, saved in state.items():
            device = found.get(instance)
            if not isinstance(device, Saveable) or not isinstance(saved, dict):
                raise ConfigError(f"saved state: no device {instance} here has a state")
            device.restore(saved)

    async def aclose(self) -> None:
        """Close all devices; their channels have ended. Is a checkpoint."""
        for entry in self:
            await self._close(entry)

    async def _close(self, entry: Entry) -> None:
        self._entries.pop(entry.number, None)
        self._owners.pop(entry.key, None)
        await self.close_device(entry.device)
        if entry.removal is not None:
            entry.removal.over.set()

    async def close_device(self, device: Device) -> None:
        """Close a device, whether it is here or not; a failure is logged. Is a checkpoint."""
        try:
            await device.aclose()
        except Exception:
            _log.exception("%s: closing a device failed", self._name)
