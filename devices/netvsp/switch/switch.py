"""The switch: a frame comes in at one port, and goes out at another, at several, or at none.

Rules, in the order in which they are looked at; what breaks one is dropped, and counted at the port
where it came in by the word in brackets:

* A frame has an Ethernet header ("short"), and is from one station ("address").
* The port may send in the frame's VLAN ("vlan"), and there is no other VLAN behind it: a tag of
  VLAN 0 before another one is none ("vlan").
* The source is the port's station, or one that the port may have besides. It is not the station of
  another port ("spoofed"): what an adapter is known to have, nobody takes from it by sending.
* What 802.1D keeps between two bridges goes no further ("link-local").
* A frame to a known station goes to its port. That is another port, and they are not two joints
  ("loop"); it is in the VLAN ("vlan"), and neither is isolated unless the other is an uplink
  ("isolated").
* A frame to all, to a group, or to a station that is not known goes to all ports to which it could
  go to a known one; a port may have so many of these in a second ("storm").

At the port where it goes out: "queue full", and "vlan" if it has a second tag and the first is to
be taken off, since whoever gets it then would take the second one for its VLAN.

A frame crosses as it is, with all that is left to do for it: a segment of 64 KiB is one frame here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from netvsp.frames.frame import (
    ETHERNET_HEADER,
    ETHERTYPE_VLAN,
    TAGS,
    VLAN_TAG,
    Frame,
    Offload,
    format_mac,
    hides_tag,
)
from netvsp.switch.port import (
    EVERY_VLAN,
    FROM_ISOLATED,
    FROM_UPLINK,
    UPLINK_ADDRESSES,
    PortConfig,
    SwitchPort,
)
from netvsp.switch.table import AddressTable, Learnt
from vmbus.errors import ConfigError

MAX_PORTS = 1024
MAX_STATIONS = 4096
"""Stations of a joint."""
TURN = 256
"""What is done in one call: each frame is one, and each port to which a frame is copied."""

JOINT = PortConfig(trunk=EVERY_VLAN, joint=True, addresses=UPLINK_ADDRESSES)

_LINK_LOCAL = bytes.fromhex("0180c20000")


class Crossing(Frame):
    """A frame between two switches that are one.

    Attributes:
        origin: What the port is where it came in: FROM_ISOLATED, FROM_UPLINK, or 0.
    """

    __slots__ = ("origin",)

    def __init__(
        self,
        head: bytes,
        offload: Offload | None = None,
        tci: int | None = None,
        flow: int = 0,
        origin: int = 0,
    ) -> None:
        super().__init__(head, (), offload, tci, flow)
        self.origin = origin


class Switch:
    """Ports, and the table of what is behind them.

    Args:
        clock: Returns seconds; cannot block.
        moved: Told when an address has gone from one port to another; cannot block.
        stations: Told when a station has come to the ports that are no joints, or gone from them;
            cannot block.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        moved: Callable[[int, bytes, SwitchPort, SwitchPort], None] | None = None,
        stations: Callable[[bytes, bool], None] | None = None,
    ) -> None:
        self.ports: dict[SwitchPort, None] = {}
        self.table: AddressTable[SwitchPort] = AddressTable()
        self._clock = clock
        self._moved = moved
        self._stations_changed = stations
        self._claims: dict[bytes, list[SwitchPort]] = {}
        """Ports that have a station of this address; it is the first one's."""
        self._owners: dict[bytes, SwitchPort] = {}
        """The first ones."""
        self._members: dict[int, list[SwitchPort]] = {}
        """Ports that are up in each VLAN, as far as they were looked for since the last change."""

    # -- ports -----------------------------------------------------------------------------------

    def add_port(self, name: str, config: PortConfig, ready: Callable[[], None]) -> SwitchPort:
        """Make a port, which is down until it has a station. Cannot block.

        Args:
            name: What people call it.
            config: What it is for.
            ready: Called when frames wait for it where none did; cannot block.

        Raises:
            ConfigError: There are too many.
        """
        if len(self.ports) >= MAX_PORTS:
            raise ConfigError(f"a switch has {MAX_PORTS} ports at most")
        port = SwitchPort(name, config, ready)
        port.up = config.joint
        self.ports[port] = None
        self._members.clear()
        return port

    def remove_port(self, port: SwitchPort) -> None:
        """Take a port away with all that is known of it. Cannot block. Idempotent."""
        if port not in self.ports:
            return
        for address in tuple(port.stations):
            self.remove_station(port, address)
        del self.ports[port]
        port.up = False
        port.forget()
        for other in self.ports:
            other.forget(port)
        self.table.forget(port)
        self._members.clear()

    def set_station(self, port: SwitchPort, address: bytes | None) -> bool:
        """Say which adapter is behind a port; None: none is. Cannot block.

        A port without one is down. What waits for it then is dropped.

        Returns:
            Whether the address is its own; it is another port's otherwise, as long as that has it.
        """
        for each in tuple(port.stations):
            if each != address:
                self.remove_station(port, each)
        up = address is not None
        if up != port.up:
            port.up = up
            self._members.clear()
            if not up:
                port.forget()
                self.table.forget(port)
        return address is None or self.add_station(port, address)

    def add_station(self, port: SwitchPort, address: bytes) -> bool:
        """Add a station to those behind a port, as :meth:`set_station`. Cannot block.

        Returns:
            Whether it is this port's.
        """
        if address not in port.stations:
            if len(port.stations) >= MAX_STATIONS or address[0] & 1 or not any(address):
                return False
            claims = self._claims.setdefault(address, [])
            claims.append(port)
            self._owners[address] = claims[0]
            port.stations.add(address)
            self._tell(port, address, claims, added=True)
        return self._owners[address] is port

    def remove_station(self, port: SwitchPort, address: bytes) -> None:
        """Take a station from those behind a port. Cannot block. Idempotent."""
        if address in port.stations:
            port.stations.discard(address)
            claims = self._claims[address]
            claims.remove(port)
            if claims:
                self._owners[address] = claims[0]
            else:
                del self._claims[address], self._owners[address]
            self._tell(port, address, claims, added=False)

    def _tell(
        self, port: SwitchPort, address: bytes, claims: list[SwitchPort], *, added: bool
    ) -> None:
        """Tell of a station that the first of our own ports has, or that none has any more."""
        if port.config.joint or self._stations_changed is None:
            return
        if not any(each is not port and not each.config.joint for each in claims):
            self._stations_changed(address, added)

    def own_stations(self) -> list[bytes]:
        """Return the stations of ports that are no joints. Cannot block."""
        return [
            address
            for address, claims in self._claims.items()
            if any(not each.config.joint for each in claims)
        ]

    # -- frames ----------------------------------------------------------------------------------

    def receive(self, port: SwitchPort, frames: Sequence[Frame]) -> int:
        """Take frames that have come in at a port. Cannot block.

        Args:
            port: Where.
            frames: The caller's; those of a joint are :class:`Crossing`. They are copied if they
                are not their own already, and are not changed.

        Returns:
            How many were dealt with, in order: one at least, unless there are none. The rest should
            come again when others have had their turn.
        """
        now = self._clock()
        budget = TURN
        done = size = 0
        for frame in frames:
            done += 1
            length = len(frame)
            size += length
            reason = self._forward(port, frame, length, now)
            if isinstance(reason, int):
                budget -= reason
            else:
                port.dropped[reason] += 1
                budget -= 1
            if budget <= 0:
                break
        port.in_frames += done
        port.in_bytes += size
        self.table.sweep(now, 2)
        return done

    def _forward(self, port: SwitchPort, frame: Frame, length: int, now: float) -> int | str:
        """Forward a frame; return what that has cost, or why it was dropped."""
        head = frame.head
        if len(head) < ETHERNET_HEADER:
            return "short"
        # The tag, beside the frame from here on.
        tci = frame.tci
        origin = port.origin
        if port.joint:
            origin = frame.origin if isinstance(frame, Crossing) else 0
        if tci is None and head[12:14] == ETHERTYPE_VLAN:
            frame = frame.untagged()
            head, tci = frame.head, frame.tci
            length -= VLAN_TAG
            if tci is None or length < ETHERNET_HEADER:
                return "short"
        vlan = 0 if tci is None else tci & 0xFFF
        if not vlan and head[12:14] in TAGS and hides_tag(frame):
            return "vlan"
        if port.vlan:
            if vlan and vlan != port.vlan:
                return "vlan"
            vlan = port.vlan
            tci = ((tci or 0) & 0xF000) | vlan
        elif vlan not in port.vlans:
            return "vlan"
        source, target = head[6:12], head[:6]
        owner = self._owners.get(source)
        if owner is not port:
            if owner is not None:
                return "spoofed"
            reason = self._learn(port, vlan, source, now)
            if reason:
                return reason
        if not target[0] & 1:
            out = self._owners.get(target)
            if out is None:
                out = self.table.find(vlan, target, now)
            if out is not None:
                if out is port or (out.joint and port.joint):
                    return "loop"
                if vlan not in out.vlans:
                    return "vlan"
                if origin | out.origin and not _may_pass(origin, out):
                    return "isolated"
                if out.up:
                    _deliver(port, out, frame.own() if frame.rest else frame, tci, origin)
                return 1
        elif target[:5] == _LINK_LOCAL and target[5] < 16:
            return "link-local"
        members = self._members.get(vlan)
        if members is None:
            members = self._find_members(vlan)
        if not port.spend_flood(now, len(members)):
            return "storm"
        frame = frame.own()
        for out in members:
            if out is not port and not (out.joint and port.joint) and _may_pass(origin, out):
                _deliver(port, out, frame, tci, origin)
        return 1 + len(members)

    def _learn(self, port: SwitchPort, vlan: int, source: bytes, now: float) -> str:
        """Learn where a frame came from; return why it may not, or nothing."""
        table = self.table
        if table.touch(vlan, source, port, now):
            return ""
        if source[0] & 1 or not any(source):
            return "address"
        if not port.up:
            return "down"
        limit = port.config.addresses - len(port.stations)
        if port.joint:
            limit = UPLINK_ADDRESSES
        elif limit <= 0:
            return "spoofed"
        learnt, before = table.learn(vlan, source, port, now, limit)
        if learnt is Learnt.REFUSED:
            port.refused += 1
        elif before is not None:
            port.moves += 1
            if self._moved is not None:
                self._moved(vlan, source, before, port)
        return ""

    def _find_members(self, vlan: int) -> list[SwitchPort]:
        members = [port for port in self.ports if port.up and vlan in port.vlans]
        self._members[vlan] = members
        return members

    # -- people ----------------------------------------------------------------------------------

    def describe(self, ports: int = 64) -> dict[str, Any]:
        """Describe the switch for people, as JSON types. Cannot block.

        Args:
            ports: Of how many ports at most.
        """
        table = self.table
        return {
            "ports": [each.describe() for each in list(self.ports)[:ports]],
            "port_count": len(self.ports),
            "addresses": len(table),
            "stations": len(self._claims),
            "moves": table.moves,
            "evicted": table.evicted,
            "contested": [
                format_mac(each) for each, claims in self._claims.items() if len(claims) > 1
            ][:16],
        }


def _may_pass(origin: int, out: SwitchPort) -> bool:
    """Whether isolation lets a frame out at a port; a joint's other side looks for itself."""
    if out.joint:
        return True
    if origin & FROM_ISOLATED and not out.origin & FROM_UPLINK:
        return False
    return not out.origin & FROM_ISOLATED or bool(origin & FROM_UPLINK)


def _deliver(port: SwitchPort, out: SwitchPort, frame: Frame, tci: int | None, origin: int) -> None:
    """Have a frame, which is its own, wait at a port, in its VLAN as that port shows it."""
    if out.joint:
        frame = Crossing(frame.head, frame.offload, tci, frame.flow, origin)
    elif not out.trunk:
        if frame.head[12:14] == ETHERTYPE_VLAN:
            # A tag in a tag: without the outer one it would be in a VLAN of its sender's choice.
            out.dropped["vlan"] += 1
            return
        if frame.tci is not None:
            frame = Frame(frame.head, (), frame.offload, None, frame.flow)
    elif frame.tci != tci:
        frame = Frame(frame.head, (), frame.offload, tci, frame.flow)
    out.put(port, frame, len(frame.head))
