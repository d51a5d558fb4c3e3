"""Layers of a record, and who finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from vmbus.trace.records import Record


class Layer(NamedTuple):
    """One protocol's part of a record."""

    name: str
    """Of the protocol: ``vmbus``, ``ring``, ``vstor``, ``scsi``, ``nvsp``, ``rndis``."""
    summary: str
    """In a few words, for people."""
    fields: Mapping[str, Any]
    """By the names of the protocol; JSON types, bytes as hexadecimal text."""


class RingPacket(NamedTuple):
    """A packet of a ring."""

    to_host: bool
    kind: int
    """:data:`vmbus.wire.packets.IN_BAND` and so on."""
    flags: int
    transaction_id: int
    payload: bytes
    """With the padding at its end."""
    request: bytes | None
    """COMPLETION: the payload of the packet that it completes, if that was seen."""


class ChannelDissector(Protocol):
    """Takes apart what is said on the channels of one life of a device.

    Neither method may raise anything but :class:`vmbus.errors.GuestProtocolError`, whose text then
    stands beside what was found: a trace may hold anything.
    """

    def packet_untrusted(self, packet: RingPacket) -> list[Layer]:
        """Return the layers of a packet's payload, the outermost first. Cannot block."""

    def memory_untrusted(self, data: bytes, total: int, request: bytes | None) -> list[Layer]:
        """Return the layers of what a packet points to, as far as it is here. Cannot block.

        Args:
            data: From its beginning on.
            total: Bytes that there were.
            request: The payload of the packet, if that was seen and is the guest's.
        """


@dataclasses.dataclass(slots=True)
class Dissection:
    """A record, and what it means."""

    record: Record
    layers: list[Layer]
    problem: str = ""
    """What is wrong with it; empty if nothing is."""
    request: int | None = None
    """Number of the record that this one answers."""
    latency_ns: int | None = None
    """How much later it is than that."""

    @property
    def summary(self) -> str:
        """What it means, in a line."""
        words = [layer.summary for layer in self.layers if layer.summary]
        if self.problem:
            words.append(f"[{self.problem}]")
        return ": ".join(words) or self.record.kind_name

    def field(self, name: str) -> object:
        """Return a field by its layer's name and its own, as ``scsi.opcode``; None: it has none."""
        layer, _, field = name.partition(".")
        for each in self.layers:
            if each.name == layer and field in each.fields:
                return each.fields[field]
        return None
