"""One port of a switch: what may go through it, what has, and what waits to go out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from netvsp.frames.frame import Frame, format_mac
from netvsp.switch.queue import LIMIT, FairQueue
from vmbus.errors import ConfigError

MAX_VLAN = 4094
EVERY_VLAN = frozenset(range(MAX_VLAN + 1))
"""All of them, and 0: no tag."""
MAX_ADDRESSES = 4096
"""That a port may ask for; an uplink has :data:`UPLINK_ADDRESSES`."""
UPLINK_ADDRESSES = 12288

# Crossing.origin
FROM_ISOLATED = 1
FROM_UPLINK = 2

QUEUE_FULL = "queue full"
"""Why frames were dropped that whoever is at the port did not take in time."""

FLOOD_RATE = 5_000
"""Frames a second from a port that may go to all others. A thousand stations that all look for each
other are below that, and each of these frames is work for every guest."""
FLOOD_BURST = 1_000
"""How many in one go: so much later than without them is what is behind them."""
JOINT_FLOODS = 10
"""A joint may have so many times that."""
FLOOD_PORTS = 16
"""Ports that such a frame goes to for one; if there are more, it counts for several."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PortConfig:
    """What a port is for; constant.

    Raises:
        ConfigError: A value is out of its range.
    """

    vlan: int = 0
    """Access port: who is behind it is in this VLAN and sees no tags; 0: where there are none."""
    trunk: frozenset[int] | None = None
    """Trunk: VLANs whose frames pass, tagged; 0 for frames without a tag. Excludes ``vlan``."""
    isolated: bool = False
    """It exchanges frames with uplinks only."""
    uplink: bool = False
    """It leads out: isolated ports may reach it, and many stations may be behind it."""
    joint: bool = False
    """It leads to a switch that is the same one elsewhere. Frames do not go from one such port to
    another, since each of those switches is connected to all others."""
    addresses: int = 1
    """Source addresses of the frames that come in, its station's own included."""

    def __post_init__(self) -> None:
        if not 0 <= self.vlan <= MAX_VLAN:
            raise ConfigError(f"vlan is 1 to {MAX_VLAN}, not {self.vlan}")
        if self.trunk is not None:
            if self.vlan:
                raise ConfigError("vlan and trunk exclude each other")
            if not self.trunk or not self.trunk <= EVERY_VLAN:
                raise ConfigError(f"a trunk has some of the VLANs 0 to {MAX_VLAN}")
        if self.isolated and (self.uplink or self.joint):
            raise ConfigError("isolated and uplink exclude each other")
        if not 1 <= self.addresses <= UPLINK_ADDRESSES:
            raise ConfigError(f"addresses is 1 to {MAX_ADDRESSES}, not {self.addresses}")


class SwitchPort:
    """A port; made by :meth:`netvsp.switch.switch.Switch.add_port`.

    Args:
        name: What people call it.
        config: What it is for.
        ready: Called when frames wait where none did; cannot block.

    Attributes:
        up: Whether somebody is there; nothing is sent to others' ports otherwise.
        stations: Addresses that are known to be behind it: its adapter's own; or, for a joint,
            those of the other switch's adapters. Others are learnt.
        dropped: Frames that came in or were to go out, by reason.
        queue: What waits to go out.
        origin: What it means for others that a frame came in here, as in ``Crossing.origin``.
    """

    __slots__ = (
        "config", "dropped", "in_bytes", "in_frames", "joint", "moves", "name", "origin",
        "out_bytes", "out_frames", "queue", "ready", "refused", "stations", "tokens", "tokens_at",
        "trunk", "up", "vlan", "vlans",
    )  # fmt: skip

    def __init__(self, name: str, config: PortConfig, ready: Callable[[], None]) -> None:
        self.name = name
        self.config = config
        self.ready = ready
        self.up = False
        self.stations: set[bytes] = set()
        self.vlan = config.vlan
        self.trunk = config.trunk is not None
        self.joint = config.joint
        self.origin = FROM_ISOLATED * config.isolated | FROM_UPLINK * config.uplink
        self.vlans = config.trunk if config.trunk is not None else frozenset((config.vlan,))
        self.dropped: Counter[str] = Counter()
        self.in_frames = self.in_bytes = self.out_frames = self.out_bytes = 0
        self.moves = 0
        """Addresses that came here from another port."""
        self.refused = 0
        """Addresses that were not learnt, since there was no room for them."""
        self.tokens = 0.0
        self.tokens_at = float("-inf")
        self.queue: FairQueue[SwitchPort] = FairQueue(LIMIT)

    def put(self, source: SwitchPort, frame: Frame, length: int) -> None:
        """Have a frame wait, or drop one. Cannot block."""
        queue = self.queue
        gone = queue.push(source, frame, length)
        if gone:
            self.dropped[QUEUE_FULL] += gone
        if queue.count == 1:
            self.ready()

    def take(self, frames: int, size: int) -> list[Frame]:
        """Take frames that wait, each sender's in order. Cannot block.

        Args:
            frames: How many at most.
            size: Bytes at most, but for the first one.
        """
        taken = self.queue.pop(frames, size)
        self.out_frames += len(taken)
        for frame in taken:
            self.out_bytes += len(frame)
        return taken

    def forget(self, source: SwitchPort | None = None) -> None:
        """Drop what waits: of one sender, or all. Cannot block."""
        if source is None:
            self.queue.clear()
        else:
            self.queue.forget(source)

    def spend_flood(self, now: float, ports: int) -> bool:
        """Whether a frame may go to all others, of which there are so many, now. Cannot block."""
        if self.tokens < 1:
            times = JOINT_FLOODS if self.config.joint else 1
            grown = self.tokens + (now - self.tokens_at) * FLOOD_RATE * times
            self.tokens = min(float(FLOOD_BURST * times), grown)
            self.tokens_at = now
            if self.tokens < 1:
                return False
        self.tokens -= max(1.0, ports / FLOOD_PORTS)
        return True

    def describe(self) -> dict[str, Any]:
        """Describe the port for people, as JSON types. Cannot block."""
        found: dict[str, Any] = {
            "name": self.name,
            "up": self.up,
            "stations": [format_mac(each) for each in sorted(self.stations)[:16]],
            "in_frames": self.in_frames,
            "in_bytes": self.in_bytes,
            "out_frames": self.out_frames,
            "out_bytes": self.out_bytes,
            "waiting": self.queue.count,
            "moves": self.moves,
            "refused_addresses": self.refused,
            "dropped": dict(self.dropped),
        }
        config = self.config
        if config.trunk is not None:
            found["trunk"] = format_vlans(config.trunk)[:200]
        elif config.vlan:
            found["vlan"] = config.vlan
        flags = [each for each in ("isolated", "uplink", "joint") if getattr(config, each)]
        if flags:
            found["flags"] = flags
        return found


def parse_vlans(text: str) -> frozenset[int]:
    """Return the VLANs of ``1-10+20``; ``all`` is every one, 0 stands for frames without a tag.

    Raises:
        ConfigError: It is no such list.
    """
    if text == "all":
        return EVERY_VLAN
    found: set[int] = set()
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
            raise ConfigError(f"{text[:40]!r} is no list of VLANs such as 1-10+20")
        if max(len(first), len(last)) > 4 or not int(first) <= int(last) <= MAX_VLAN:
            raise ConfigError(f"{part[:40]!r}: VLANs are 0 to {MAX_VLAN}, the lower one first")
        found.update(range(int(first), int(last) + 1))
    return frozenset(found)


def format_vlans(vlans: frozenset[int]) -> str:
    """Return VLANs as :func:`parse_vlans` takes them."""
    if vlans == EVERY_VLAN:
        return "all"
    parts: list[list[int]] = []
    for each in sorted(vlans):
        if parts and parts[-1][1] == each - 1:
            parts[-1][1] = each
        else:
            parts.append([each, each])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
