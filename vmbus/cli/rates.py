"""What ``vmbus top`` shows: rates, from two answers of a server a moment apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

COUNTERS = (
    "packets_in",
    "packets_out",
    "bytes_in",
    "bytes_out",
    "signals_in",
    "signals_out",
    "batches",
    "ring_full",
)
"""Counters of a channel that rates are made of (vmbus.host.statistics.Statistics)."""

DISK_COUNTERS = ("commands", "bytes_read", "bytes_written")
"""Counters of a disk that rates are made of (storvsp.scsi.LogicalUnit)."""

NIC_COUNTERS = ("frames", "bytes", "segments", "checksums")
"""Counters of a network adapter, each way, that rates are made of (netvsp.statistics.Direction)."""

WAYS = {"sent": "transmit", "received": "receive"}
"""What the guest does, and where a network adapter counts it."""

Key = tuple[object, ...]
"""Begins with the number of the guest: names may come back, numbers do not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One answer to the query ``guests``."""

    time: float
    """When it arrived, in seconds of a clock that never goes back."""
    reply: Mapping[str, Any]

    def channels(self) -> Iterator[tuple[Key, dict[str, Any], dict[str, Any]]]:
        """Yield key, guest and channel of every open channel."""
        for guest in self.reply["guests"]:
            for channel in guest["channels"]:
                yield (guest["number"], channel["relid"]), guest, channel

    def disks(self) -> Iterator[tuple[Key, dict[str, Any], dict[str, Any]]]:
        """Yield key, device and unit of everything that counts what a disk does."""
        for guest in self.reply["guests"]:
            for device in guest["devices"]:
                for unit in device.get("units", ()):
                    if all(name in unit for name in DISK_COUNTERS):
                        yield (guest["number"], device["key"], unit["address"]), device, unit

    def nics(self) -> Iterator[tuple[Key, dict[str, Any], dict[str, int]]]:
        """Yield key, device and counters of everything that counts what a network adapter does."""
        for guest in self.reply["guests"]:
            for device in guest["devices"]:
                ways = {way: device.get(name) for way, name in WAYS.items()}
                if all(isinstance(each, dict) and "dropped" in each for each in ways.values()):
                    counted = {
                        f"{name}_{way}": each[name]
                        for way, each in ways.items()
                        for name in NIC_COUNTERS
                    }
                    for way, each in ways.items():
                        counted[f"dropped_{way}"] = sum(each["dropped"].values())
                    yield (guest["number"], device["key"], device["instance"]), device, counted


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelView:
    """One open channel."""

    relid: int
    device: str
    """Short name of the device class."""
    subchannel_index: int
    incoming_fill: float
    """How much of the ring from the guest is waiting for us, 0 to 1."""
    outgoing_fill: float
    """How much of the ring to the guest is waiting for it, 0 to 1."""
    outstanding: int
    rates: dict[str, float]
    """Per second, by the names of :data:`COUNTERS`."""


@dataclasses.dataclass(frozen=True, slots=True)
class DiskView:
    """One disk or drive."""

    controller: int
    """Which of the guest's controllers, as ``vmbus disk`` counts them."""
    address: str
    kind: str
    source: str
    size: int | None
    errors: int
    """Commands that failed because of what is behind the disk, ever."""
    stopped: str
    """Why it keeps the guest waiting; empty if it does not."""
    rates: dict[str, float]
    """Per second, by the names of :data:`DISK_COUNTERS`."""


@dataclasses.dataclass(frozen=True, slots=True)
class NicView:
    """One network adapter."""

    adapter: int
    """Which of the guest's, as ``vmbus nic`` counts them."""
    address: str
    link: str
    failure: str
    """Why there is no network behind it any more; empty if there is."""
    queues: int
    """Channels that are open."""
    source: str
    drops: dict[str, dict[str, int]]
    """Frames that were not passed on, ever: ``sent`` and ``received``, each by reason."""
    rates: dict[str, float]
    """Per second: the names of :data:`NIC_COUNTERS`, and ``dropped``, with ``_sent`` and
    ``_received`` behind each."""


@dataclasses.dataclass(frozen=True, slots=True)
class GuestView:
    """One attached guest."""

    name: str
    number: int
    version: str | None
    memory: int
    paused: bool
    faults: int
    channels: tuple[ChannelView, ...]
    disks: tuple[DiskView, ...]
    nics: tuple[NicView, ...]

    def nic_rate(self, name: str) -> float:
        """Return the sum of a rate over all network adapters, per second."""
        return sum(nic.rates[name] for nic in self.nics)

    def disk_rate(self, name: str) -> float:
        """Return the sum of a rate over all disks, per second."""
        return sum(disk.rates[name] for disk in self.disks)


@dataclasses.dataclass(frozen=True, slots=True)
class ServerView:
    """A server and its guests, at one moment."""

    server: str
    pid: int
    rss: int
    guests_served: int
    interval: float
    """Seconds that the rates are averages of."""
    guests: tuple[GuestView, ...]


def compare(before: Sample, after: Sample) -> ServerView:
    """Describe the later sample, with rates since the earlier one.

    A channel that was opened in between, or again, counts from 0, and so does another disk or
    adapter.
    """
    seconds = max(after.time - before.time, 1e-9)
    earlier = {key: channel for key, _, channel in before.channels()}
    found: dict[object, list[ChannelView]] = {}
    for key, guest, channel in after.channels():
        rates = _rates(earlier.get(key), channel, COUNTERS, seconds)
        found.setdefault(key[0], []).append(_view(guest, channel, rates))
    earlier = {key: unit for key, _, unit in before.disks()}
    disks: dict[object, list[DiskView]] = {}
    for key, device, unit in after.disks():
        rates = _rates(earlier.get(key), unit, DISK_COUNTERS, seconds)
        disks.setdefault(key[0], []).append(_disk_view(device, unit, rates))
    counted_before = {key: counted for key, _, counted in before.nics()}
    nics: dict[object, list[NicView]] = {}
    for key, device, counted in after.nics():
        rates = _rates(counted_before.get(key), counted, counted, seconds)
        nics.setdefault(key[0], []).append(_nic_view(device, rates))
    reply = after.reply
    return ServerView(
        server=reply["server"],
        pid=reply["pid"],
        rss=reply["rss"],
        guests_served=reply["guests_served"],
        interval=seconds,
        guests=tuple(
            GuestView(
                name=guest["name"],
                number=guest["number"],
                version=guest["version"],
                memory=guest["memory"],
                paused=guest["paused"],
                faults=guest["faults"],
                channels=tuple(found.get(guest["number"], ())),
                disks=tuple(disks.get(guest["number"], ())),
                nics=tuple(nics.get(guest["number"], ())),
            )
            for guest in reply["guests"]
        ),
    )


def _view(guest: dict[str, Any], channel: dict[str, Any], rates: dict[str, float]) -> ChannelView:
    classes = {device["key"]: device["class"] for device in guest["devices"]}
    return ChannelView(
        relid=channel["relid"],
        device=classes.get(channel["device"], "?"),
        subchannel_index=channel["subchannel_index"],
        incoming_fill=_share(channel["incoming_used"], channel["incoming_size"]),
        outgoing_fill=_share(channel["outgoing_used"], channel["outgoing_size"]),
        outstanding=channel["outstanding"],
        rates=rates,
    )


def _rates(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], names: Iterable[str], seconds: float
) -> dict[str, float]:
    if old is None or any(new[name] < old[name] for name in names):
        old = dict.fromkeys(names, 0)
    return {name: (new[name] - old[name]) / seconds for name in names}


def _disk_view(device: dict[str, Any], unit: dict[str, Any], rates: dict[str, float]) -> DiskView:
    return DiskView(
        controller=device.get("index", 0),
        address=unit["address"],
        kind=unit["kind"],
        source=unit["source"],
        size=unit["size"],
        errors=unit.get("errors", 0),
        stopped=str(unit.get("stopped") or ("its keeper is gone" if unit.get("lost") else "")),
        rates=rates,
    )


def _nic_view(device: dict[str, Any], rates: dict[str, float]) -> NicView:
    return NicView(
        adapter=device.get("index", 0),
        address=device["mac"],
        link=device["link"],
        failure=device["failure"],
        queues=device["channels"],
        source=device["source"],
        drops={way: dict(device[name]["dropped"]) for way, name in WAYS.items()},
        rates=rates,
    )


def _share(used: int, size: int) -> float:
    return used / size if size else 0.0
