"""Listening to a bus: messages, packets, memory, signals, faults, channels coming and going.

Traces, fuzzers and the account of ``vmbus serve -vv`` hang on this, and on nothing else. A
listener overrides the methods of :class:`Observer` that it cares for::

    class Printer(Observer):
        def fault(self, relid, text):
            print(relid, text)

    stop = bus.observe(Printer())

What nobody overrides costs nothing, on the data path in particular: a channel has no observer
unless somebody listens to packets or signals. An observer that raises is logged and dropped; it
never harms the bus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from vmbus.engine.offers import Offer
from vmbus.ring import Packet
from vmbus.wire.messages import Direction
from vmbus.wire.versions import Version

_log = logging.getLogger("vmbus.bus")

Piece = bytes | bytearray | memoryview
"""A part of what a packet points to."""


class MemoryUse(Enum):
    """What a device does with the memory that a packet points to."""

    READ = "read"
    """A packet of the guest's, which :meth:`Observer.packets_in` has told of. The guest could write
    there at any time, so what the device acts on may be something else."""
    WRITTEN = "written"
    """A packet of the guest's, whose completion follows."""
    SENT = "sent"
    """A packet of the host's, which follows."""


class ObservedChannel(Protocol):
    """What observers see of a channel."""

    relid: int
    subchannel_index: int
    offer: Offer
    version: Version


class Observer:
    """Hears of a bus; override what you want to hear. No method may block.

    Everything is handed over when it happens, in the trio thread. Bytes are private copies and may
    be kept.
    """

    def control(self, direction: Direction, payload: bytes) -> None:
        """A control message, before the engine takes it or after the engine has made it.

        One for the guest may not be in its slot yet, and will never be if the guest leaves.
        """

    def channel_opened(self, channel: ObservedChannel) -> None:
        """A channel is open; its device is about to serve it."""

    def channel_ended(self, channel: ObservedChannel) -> None:
        """A channel is over: nothing of it touches guest memory any more."""

    def packets_in(self, channel: ObservedChannel, packets: Sequence[Packet]) -> None:
        """A device has got these packets of the guest's, in this order."""

    def packets_out(self, channel: ObservedChannel, packets: Sequence[bytes]) -> None:
        """These packets are in the guest's ring: from descriptor to padding, without trailers."""

    def memory(
        self,
        channel: ObservedChannel,
        transaction_id: int,
        pieces: Sequence[Piece],
        use: MemoryUse,
    ) -> None:
        """What a packet points to, as its device has found it.

        Args:
            channel: Where the packet is.
            transaction_id: Of the packet.
            pieces: Its bytes, one behind the other; guest memory, which is lent for this call:
                whoever wants to keep it copies it.
            use: What it is to the device.
        """

    def signal(self, channel: ObservedChannel, direction: Direction) -> None:
        """One side has rung the other's doorbell for this channel."""

    def fault(self, relid: int | None, text: str) -> None:
        """The guest broke a rule, on a channel or, if None, in the control plane."""


_RING_METHODS = ("packets_in", "packets_out", "memory", "signal")


class Observers:
    """The observers of one bus; passes on what it is told to those who listen.

    Args:
        changed: Called when :attr:`ring` has changed; cannot block.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._all: dict[object, Observer] = {}
        self._listeners: dict[str, list[tuple[object, Callable[..., None]]]] = {}

    @property
    def ring(self) -> Observers | None:
        """What channels are to tell of their rings, None if nobody listens to that."""
        return self if any(name in self._listeners for name in _RING_METHODS) else None

    @property
    def to_memory(self) -> bool:
        """Whether somebody listens to memory: devices look before they tell."""
        return "memory" in self._listeners

    def add(self, observer: Observer) -> Callable[[], None]:
        """Add an observer; the same one may be added twice.

        Returns:
            A function that takes this one away again; calling it twice is harmless.
        """
        key = object()
        self._all[key] = observer
        self._sort()

        def remove() -> None:
            if self._all.pop(key, None) is not None:
                self._sort()

        return remove

    def _sort(self) -> None:
        self._listeners = {}
        for name in _METHODS:
            found = [
                (key, getattr(observer, name))
                for key, observer in self._all.items()
                if getattr(type(observer), name) is not getattr(Observer, name)
            ]
            if found:
                self._listeners[name] = found
        self._changed()

    def _tell(self, name: str, *arguments: object) -> None:
        for key, listener in self._listeners.get(name, ()):
            try:
                listener(*arguments)
            except Exception:
                _log.exception("an observer failed and hears no more: %r", self._all.get(key))
                self._all.pop(key, None)
                self._sort()

    def control(self, direction: Direction, payload: bytes) -> None:
        """See :meth:`Observer.control`. Never raises."""
        self._tell("control", direction, payload)

    def channel_opened(self, channel: ObservedChannel) -> None:
        """See :meth:`Observer.channel_opened`. Never raises."""
        self._tell("channel_opened", channel)

    def channel_ended(self, channel: ObservedChannel) -> None:
        """See :meth:`Observer.channel_ended`. Never raises."""
        self._tell("channel_ended", channel)

    def packets_in(self, channel: ObservedChannel, packets: Sequence[Packet]) -> None:
        """See :meth:`Observer.packets_in`. Never raises."""
        self._tell("packets_in", channel, packets)

    def packets_out(self, channel: ObservedChannel, packets: Sequence[bytes]) -> None:
        """See :meth:`Observer.packets_out`. Never raises."""
        self._tell("packets_out", channel, packets)

    def memory(
        self,
        channel: ObservedChannel,
        transaction_id: int,
        pieces: Sequence[Piece],
        use: MemoryUse,
    ) -> None:
        """See :meth:`Observer.memory`. Never raises."""
        self._tell("memory", channel, transaction_id, pieces, use)

    def signal(self, channel: ObservedChannel, direction: Direction) -> None:
        """See :meth:`Observer.signal`. Never raises."""
        self._tell("signal", channel, direction)

    def fault(self, relid: int | None, text: str) -> None:
        """See :meth:`Observer.fault`. Never raises."""
        self._tell("fault", relid, text)


_METHODS = ("control", "channel_opened", "channel_ended", "fault", *_RING_METHODS)
