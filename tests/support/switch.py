"""A switch with ports, and a clock that is put forward by hand; frames between stations."""

from __future__ import annotations

from typing import Any

from netvsp.frames.frame import Frame, Offload
from netvsp.switch.port import PortConfig, SwitchPort
from netvsp.switch.switch import Switch

BROADCAST = b"\xff" * 6
MANY = 1 << 20
"""More frames than a port has."""


def station(number: int) -> bytes:
    """Return the address of a station."""
    return bytes.fromhex("00155d") + number.to_bytes(3, "big")


def make_frame(
    source: int | bytes,
    target: int | bytes,
    body: bytes = b"",
    *,
    tci: int | None = None,
    offload: Offload | None = None,
) -> Frame:
    """Return a frame from one station to another, which are numbers or addresses."""
    ends = [each if isinstance(each, bytes) else station(each) for each in (target, source)]
    return Frame(b"".join((*ends, b"\x88\xb5", body)), (), offload, tci)


class Net:
    """A switch whose ports are called by numbers, as their stations are.

    Attributes:
        now: What its clock shows.
        woken: Ports that were told that frames wait, in order.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.woken: list[int] = []
        self.moves: list[tuple[int, bytes, str, str]] = []
        self.changes: list[tuple[bytes, bool]] = []
        self.switch = Switch(
            lambda: self.now,
            moved=lambda vlan, address, a, b: self.moves.append((vlan, address, a.name, b.name)),
            stations=lambda address, there: self.changes.append((address, there)),
        )
        self.ports: dict[int, SwitchPort] = {}

    def add(self, number: int, config: PortConfig | None = None, **options: Any) -> SwitchPort:
        """Add a port, with its station unless it is a joint."""
        config = config or PortConfig(**options)
        port = self.switch.add_port(str(number), config, lambda: self.woken.append(number))
        self.ports[number] = port
        if not config.joint:
            self.switch.set_station(port, station(number))
        return port

    def send(self, number: int, *frames: Frame) -> None:
        """Have frames come in at a port."""
        left = list(frames)
        while left:
            done = self.switch.receive(self.ports[number], left)
            assert done
            del left[:done]

    def take(self, number: int) -> list[Frame]:
        """Take all frames that wait at a port."""
        return self.ports[number].take(MANY, 1 << 40)

    def got(self) -> dict[int, list[bytes]]:
        """Take all frames at all ports; return what is in those that had some."""
        found = {number: [each.tobytes() for each in self.take(number)] for number in self.ports}
        return {number: frames for number, frames in found.items() if frames}

    def dropped(self, number: int) -> dict[str, int]:
        """Return what a port has dropped since it was asked last."""
        counts = self.ports[number].dropped
        found = dict(counts)
        counts.clear()
        return found
