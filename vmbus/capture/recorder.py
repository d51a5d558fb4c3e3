"""Listens to a bus, and writes down what it hears as records of a trace."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from vmbus.host.observer import MemoryUse, ObservedChannel, Observer, Piece
from vmbus.ring import Packet
from vmbus.trace.records import MAX_DATA, Flag, Kind, Way
from vmbus.trace.writer import TraceWriter
from vmbus.wire.guids import class_name
from vmbus.wire.messages import Direction

_WAYS = {Direction.GUEST_TO_HOST: Way.TO_HOST, Direction.HOST_TO_GUEST: Way.TO_GUEST}
_FLAGS = {
    MemoryUse.READ: Flag(0),
    MemoryUse.WRITTEN: Flag.HOST_WROTE,
    MemoryUse.SENT: Flag.HOST_WROTE | Flag.HOSTS_PACKET,
}


class Recorder(Observer):
    """An observer that records; see :meth:`vmbus.host.Bus.observe`.

    A channel that was open before is recorded from its next packet on, and its OPEN record says
    that it is late.

    Args:
        writer: Where records go; the caller's.
        snap: Bytes of memory that are kept of what one packet points to; None: all.
        clock: Returns nanoseconds since 1970.
    """

    def __init__(
        self,
        writer: TraceWriter,
        *,
        snap: int | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._writer = writer
        self._snap = snap
        self._clock = clock
        self._lives: dict[ObservedChannel, int] = {}

    def describe(self, facts: dict[str, Any]) -> None:
        """Record what is to be known about the bus and the capture. Blocks as writing does.

        Args:
            facts: As JSON types; ``docs/reference/trace-format.md`` has the names.
        """
        self._put(Kind.META, Way.NONE, json.dumps(facts).encode())

    def note(self, text: str) -> None:
        """Record a remark for people. Blocks as writing does."""
        self._put(Kind.NOTE, Way.NONE, text.encode("utf-8", "replace"))

    def control(self, direction: Direction, payload: bytes) -> None:
        """See :class:`vmbus.host.Observer`."""
        self._put(Kind.MESSAGE, _WAYS[direction], payload)

    def channel_opened(self, channel: ObservedChannel) -> None:
        """See :class:`vmbus.host.Observer`."""
        self._open(channel, late=False)

    def channel_ended(self, channel: ObservedChannel) -> None:
        """See :class:`vmbus.host.Observer`."""
        life = self._lives.pop(channel, 0)
        if life:
            self._writer.write(
                Kind.CLOSE, Way.NONE, channel.relid, life, b"", time_ns=self._clock()
            )
            self._writer.close_channel(channel.relid, life)

    def packets_in(self, channel: ObservedChannel, packets: Sequence[Packet]) -> None:
        """See :class:`vmbus.host.Observer`."""
        life, now = self._life(channel), self._clock()
        for packet in packets:
            self._writer.write(
                Kind.PACKET, Way.TO_HOST, channel.relid, life, packet.data, time_ns=now
            )

    def packets_out(self, channel: ObservedChannel, packets: Sequence[bytes]) -> None:
        """See :class:`vmbus.host.Observer`."""
        life, now = self._life(channel), self._clock()
        for packet in packets:
            self._writer.write(Kind.PACKET, Way.TO_GUEST, channel.relid, life, packet, time_ns=now)

    def memory(
        self,
        channel: ObservedChannel,
        transaction_id: int,
        pieces: Sequence[Piece],
        use: MemoryUse,
    ) -> None:
        """See :class:`vmbus.host.Observer`."""
        life, now = self._life(channel), self._clock()
        data = b"".join(pieces)
        total = len(data)
        flags = _FLAGS[use]
        way = Way.TO_GUEST if flags else Way.TO_HOST
        if self._snap is not None and total > self._snap:
            data = data[: self._snap]
            flags |= Flag.CUT
        for offset in range(0, len(data), MAX_DATA) or (0,):
            piece = data[offset : offset + MAX_DATA]
            last = offset + len(piece) == len(data)
            self._writer.write(
                Kind.MEMORY, way, channel.relid, life, piece, time_ns=now,
                flags=flags if last else flags & ~Flag.CUT, ref=transaction_id,
                offset=offset, total=total, length=total - offset if last else len(piece),
            )  # fmt: skip

    def signal(self, channel: ObservedChannel, direction: Direction) -> None:
        """See :class:`vmbus.host.Observer`."""
        self._writer.write(
            Kind.SIGNAL, _WAYS[direction], channel.relid, self._life(channel), b"",
            time_ns=self._clock(), ref=1,
        )  # fmt: skip

    def fault(self, relid: int | None, text: str) -> None:
        """See :class:`vmbus.host.Observer`."""
        life = next((life for each, life in self._lives.items() if each.relid == relid), 0)
        self._writer.write(
            Kind.FAULT, Way.NONE, relid or 0, life, text.encode("utf-8", "replace"),
            time_ns=self._clock(), comment=text,
        )  # fmt: skip

    def _life(self, channel: ObservedChannel) -> int:
        return self._lives.get(channel) or self._open(channel, late=True)

    def _open(self, channel: ObservedChannel, *, late: bool) -> int:
        offer = channel.offer
        name = class_name(offer.class_id)
        sub = f", sub-channel {channel.subchannel_index}" if channel.subchannel_index else ""
        life = self._writer.open_channel(channel.relid, name, f"{offer.instance_id}{sub}")
        self._lives[channel] = life
        facts: dict[str, Any] = {
            "class": str(offer.class_id),
            "instance": str(offer.instance_id),
            "name": name,
            "relid": channel.relid,
            "life": life,
            "sub_channel": channel.subchannel_index,
            "version": str(channel.version),
        }
        if late:
            facts["late"] = True
        self._writer.write(
            Kind.OPEN, Way.NONE, channel.relid, life, json.dumps(facts).encode(),
            time_ns=self._clock(),
        )  # fmt: skip
        return life

    def _put(self, kind: Kind, way: Way, data: bytes) -> None:
        self._writer.write(kind, way, 0, 0, data, time_ns=self._clock())
