"""A whole trace: which channel is what, and which answer is to which request."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import NamedTuple, cast

from vmbus.dissect.control import ControlDissector, name_of
from vmbus.dissect.layers import ChannelDissector, Dissection, Layer, RingPacket
from vmbus.errors import ConfigError, GuestProtocolError
from vmbus.plugins.registry import Registry
from vmbus.trace.records import Flag, Kind, Record, Way
from vmbus.wire.messages import Direction
from vmbus.wire.packets import COMPLETION, PACKET_NAMES, parse_descriptor_untrusted

DISSECTORS = Registry("vmbus.dissectors", "dissector")
"""Those that are installed: functions without parameters that make a :class:`ChannelDissector`."""

MAX_REQUESTS = 1 << 16
"""Requests without an answer that are remembered of a channel; the oldest are forgotten."""
MAX_CHANNELS = 1 << 13
"""Lives of channels that are remembered."""
MAX_TEXT = 200
"""Characters of somebody's text in a line."""

_DIRECTIONS = {
    Way.TO_HOST: Direction.GUEST_TO_HOST,
    Way.TO_GUEST: Direction.HOST_TO_GUEST,
    Way.NONE: Direction.GUEST_TO_HOST,
}
_TEXTS = frozenset({Kind.NOTE, Kind.FAULT, Kind.GAP, Kind.CHANGE})


class _Asked(NamedTuple):
    number: int
    time_ns: int
    payload: bytes


class _Channel:
    """One life."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dissector = _load(name)
        self.asked: OrderedDict[tuple[bool, int], list[_Asked]] = OrderedDict()
        """Packets that want an answer, by whose they are and their transaction id."""

    def ask(self, to_host: bool, transaction_id: int, asked: _Asked) -> None:
        self.asked.setdefault((to_host, transaction_id), []).append(asked)
        if len(self.asked) > MAX_REQUESTS:
            self.asked.popitem(last=False)

    def look(self, to_host: bool, transaction_id: int, *, take: bool) -> _Asked | None:
        """Return the oldest request of this id, and forget it if it is answered now."""
        found = self.asked.get((to_host, transaction_id))
        if found is None:
            return None
        if not take:
            return found[-1]
        first = found.pop(0)
        if not found:
            del self.asked[to_host, transaction_id]
        return first


def _load(name: str) -> ChannelDissector | None:
    if name not in DISSECTORS.names():
        return None
    try:
        return cast("ChannelDissector", DISSECTORS.load(name)())  # type: ignore[operator]
    except ConfigError:
        return None  # a plug-in that is broken; packets are shown as they are


class Dissector:
    """Takes the records of one trace apart, in their order."""

    def __init__(self) -> None:
        self.control = ControlDissector()
        self._channels: OrderedDict[tuple[int, int], _Channel] = OrderedDict()

    def dissect(self, record: Record) -> Dissection:
        """Return what a record means. Cannot block, never raises: a trace may hold anything."""
        found = Dissection(record, [])
        try:
            self._dissect_untrusted(record, found)
        except GuestProtocolError as error:
            found.problem = str(error)
        return found

    def _dissect_untrusted(self, record: Record, found: Dissection) -> None:
        kind = record.kind
        if kind == Kind.MESSAGE:
            found.layers.append(Layer("vmbus", name_of(record.data), {}))
            found.layers[0] = self.control.message_untrusted(record.data, _DIRECTIONS[record.way])
        elif kind == Kind.PACKET:
            self._packet_untrusted(record, found)
        elif kind == Kind.MEMORY:
            self._memory_untrusted(record, found)
        elif kind == Kind.OPEN:
            self._open(record, found)
        elif kind == Kind.CLOSE:
            self._channels.pop((record.relid, record.life), None)
            found.layers.append(Layer("trace", f"channel {record.relid} is over", {}))
        elif kind == Kind.SIGNAL:
            who = "guest" if record.way == Way.TO_HOST else "host"
            found.layers.append(Layer("signal", f"{who} rings", {"count": record.ref}))
        elif kind == Kind.META:
            found.layers.append(Layer("trace", _line(record.data), {}))
        elif kind in _TEXTS:
            word = record.kind_name.lower()
            found.layers.append(Layer("trace", f"{word}: {_line(record.data)}", {}))

    def _channel(self, record: Record) -> _Channel:
        key = record.relid, record.life
        channel = self._channels.get(key)
        if channel is None:
            channel = self._remember(key, "unknown")
        return channel

    def _remember(self, key: tuple[int, int], name: str) -> _Channel:
        channel = self._channels[key] = _Channel(name)
        if len(self._channels) > MAX_CHANNELS:
            self._channels.popitem(last=False)
        return channel

    def _open(self, record: Record, found: Dissection) -> None:
        try:
            facts = json.loads(record.data)
            name = str(facts["name"])
        except (ValueError, KeyError, TypeError, RecursionError):
            found.problem = "no description of a channel"
            facts, name = {}, "unknown"
        self._remember((record.relid, record.life), name)
        text = f"channel {record.relid}: {name[:MAX_TEXT]}"
        if isinstance(facts, dict) and facts.get("sub_channel"):
            text += f", sub-channel {str(facts['sub_channel'])[:8]}"
        found.layers.append(Layer("trace", text, {"class": name[:MAX_TEXT]}))

    def _packet_untrusted(self, record: Record, found: Dissection) -> None:
        data = record.data
        kind, offset, length, flags, transaction_id = parse_descriptor_untrusted(data)
        word = PACKET_NAMES.get(kind, f"type {kind}")
        found.layers.append(
            Layer(
                "ring",
                f"{word} {transaction_id:#x}",
                {
                    "type": word,
                    "flags": flags,
                    "transaction_id": transaction_id,
                    "payload_length": max(length - offset, 0),
                },
            )
        )
        channel = self._channel(record)
        to_host = record.way != Way.TO_GUEST
        asked = None
        if kind == COMPLETION:
            asked = channel.look(not to_host, transaction_id, take=True)
            if asked is not None:
                found.request = asked.number
                found.latency_ns = record.time_ns - asked.time_ns
        elif flags & 1:
            channel.ask(
                to_host, transaction_id, _Asked(record.number, record.time_ns, data[offset:])
            )
        if channel.dissector is not None:
            packet = RingPacket(
                to_host, kind, flags, transaction_id, data[offset:],
                asked.payload if asked is not None else None,
            )  # fmt: skip
            found.layers += channel.dissector.packet_untrusted(packet)

    def _memory_untrusted(self, record: Record, found: Dissection) -> None:
        channel = self._channel(record)
        did = "written" if record.flags & Flag.HOST_WROTE else "read"
        text = f"{record.length} bytes {did}"
        if record.total != record.length:
            text += f", {record.offset} of {record.total}"
        fields = {"transaction_id": record.ref, "offset": record.offset, "total": record.total}
        found.layers.append(Layer("memory", text, fields))
        asked = None
        if not record.flags & Flag.HOSTS_PACKET:
            asked = channel.look(True, record.ref, take=False)
            if asked is not None:
                found.request = asked.number
        if channel.dissector is not None and not record.offset:
            found.layers += channel.dissector.memory_untrusted(
                record.data, record.total, asked.payload if asked is not None else None
            )


def _line(data: bytes) -> str:
    text = data[: 4 * MAX_TEXT].decode("utf-8", "replace")[:MAX_TEXT]
    return "".join(each if each.isprintable() else "?" for each in text)
