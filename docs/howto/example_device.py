"""A device that answers every packet with its own bytes, reversed; see write-a-device.md."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from uuid import UUID

import trio

from vmbus.errors import ConfigError
from vmbus.host import Channel, Device, Life, Offer
from vmbus.plugins.options import Option
from vmbus.plugins.registry import Registry
from vmbus.plugins.specs import OptionReader
from vmbus.ring import Packet

CLASS_MIRROR = UUID("8a1f0d52-6f0e-4c42-9d4b-3c1f9a6f0c11")


OPTIONS = (
    Option("delay", "how long an answer takes", "TIME", "0"),
    Option("loud", "answer in capital letters", "on|off", "off"),
)
"""For ``vmbus devices``."""


class MirrorDevice:
    """Answers each request with its payload backwards.

    Args:
        instance_id: The offer's instance GUID.
        delay: Seconds that an answer takes.
        loud: Answer in capital letters.
    """

    def __init__(self, instance_id: UUID, *, delay: float = 0.0, loud: bool = False) -> None:
        self._offer = Offer(class_id=CLASS_MIRROR, instance_id=instance_id)
        self._delay = delay
        self._loud = loud
        self.answered = 0

    @property
    def offer(self) -> Offer:
        """What the guest is told; the same at every call."""
        return self._offer

    async def run(self, primary: Channel) -> None:
        """Serve one life: from the guest's OPEN to its CLOSE."""
        await Life(primary, self._serve).run()

    def _serve(self, channel: Channel, packets: list[Packet], nursery: trio.Nursery) -> None:
        for packet in packets:
            if not packet.wants_completion:
                channel.complain("nothing to mirror it to", packet.transaction_id)
            elif self._delay:
                nursery.start_soon(self._answer_later, channel, packet)
            else:
                self._answer(channel, packet)

    def _answer(self, channel: Channel, packet: Packet) -> None:
        data = packet.payload[::-1]
        channel.complete(packet.transaction_id, data.upper() if self._loud else data)
        self.answered += 1

    async def _answer_later(self, channel: Channel, packet: Packet) -> None:
        await trio.sleep(self._delay)
        self._answer(channel, packet)
        await channel.flush()

    def snapshot(self) -> dict[str, Any]:
        """For ``vmbus top`` and other eyes."""
        return {"answered": self.answered}

    async def aclose(self) -> None:
        """Nothing to close."""

    # -- as a plug-in (vmbus.plugins.devices.DevicePlugin), which the class itself is -------------

    backends: Registry | None = None
    demo: str | None = None

    @classmethod
    async def from_specs(
        cls,
        specs: Sequence[str],
        *,
        instance_id: UUID,
        initiator: Hashable,
        options: Mapping[str, Any],
    ) -> MirrorDevice:
        """Make one for a guest of ``vmbus serve --device mirror``."""
        reader = OptionReader("mirror", options)
        delay = reader.duration("delay")  # seconds; 0.0 without it
        loud = reader.flag("loud")  # on, off
        reader.finish()  # nothing else is known
        if specs:
            raise ConfigError("a mirror has no back-ends")
        return cls(instance_id, delay=delay, loud=loud)

    @classmethod
    async def command(cls, device: Device, request: Mapping[str, Any]) -> dict[str, Any]:
        """There is nothing to operate."""
        raise ConfigError("a mirror can do nothing but mirror")
