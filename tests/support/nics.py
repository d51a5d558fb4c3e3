"""Scenery for tests of the network adapter: adapters, endpoints that a test plays, frames."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import trio

from netvsp.adapter import NetworkAdapter
from netvsp.endpoint import Endpoint, EndpointInfo, Offloads, Port
from netvsp.frames.frame import Frame
from netvsp.link import AdapterConfig
from vmbus.guest import Personality

MAC = bytes.fromhex("00155d0a0b0c")
PEER = bytes.fromhex("00155d0d0e0f")
ALL_OFFLOADS = Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True)


class Wire(Endpoint):
    """An endpoint that a test plays by hand.

    Attributes:
        sent: Frames that the guest has sent, with bytes of their own.
        port: The adapter, while the guest has it open.
        room: Frames that are taken before ``transmit`` takes no more; None: any number.
    """

    def __init__(self, info: EndpointInfo | None = None) -> None:
        self.info = info or EndpointInfo(offloads=ALL_OFFLOADS, queues=64)
        self.sent: list[Frame] = []
        self.queues: list[int] = []
        self.port: Port | None = None
        self.room: int | None = None
        self.arrived = trio.Event()
        self.writable = trio.Event()
        self.closed = 0

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """Keep them."""
        taken = len(frames) if self.room is None else min(len(frames), self.room)
        if self.room is not None:
            self.room -= taken
        self.sent += [frame.own() for frame in frames[:taken]]
        self.queues += [queue] * taken
        self.arrived.set()
        self.arrived = trio.Event()
        return taken

    async def wait_writable(self, queue: int) -> None:
        """Wait until the test says so."""
        del queue
        await self.writable.wait()

    async def run(self, port: Port) -> None:
        """Let the test have the port."""
        self.port = port
        try:
            await trio.sleep_forever()
        finally:
            self.port = None

    async def wait_sent(self, count: int) -> list[Frame]:
        """Wait until the guest has sent so many."""
        while len(self.sent) < count:
            await self.arrived.wait()
        return self.sent

    async def aclose(self) -> None:
        """Count it."""
        self.closed += 1


def network_adapter(
    personality: Personality | None = None,
    endpoint: Endpoint | None = None,
    *,
    number: int = 1,
    config: AdapterConfig | None = None,
    mac: bytes = MAC,
    **options: Any,
) -> NetworkAdapter:
    """An adapter of the kind that the personality can use."""
    if personality is not None:
        options.setdefault("monitor", personality.needs_monitor)
    return NetworkAdapter(
        endpoint or Wire(),
        mac=mac,
        instance_id=uuid.UUID(int=0xE7000000 + number),
        config=config,
        **options,
    )


def plain_frame(size: int = 60, *, to: bytes = PEER, source: bytes = MAC, seed: int = 0) -> bytes:
    """A frame of no known type."""
    return to + source + b"\x88\xb5" + bytes((seed + i) & 0xFF for i in range(size - 14))


def described_nic(
    index: int = 0,
    *,
    transmit: dict[str, Any] | None = None,
    receive: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """An adapter as a server describes it, with these counters."""
    found = network_adapter().snapshot()
    return {
        "key": 7 + index,
        "class": "net",
        "instance": str(uuid.UUID(int=7 + index)),
        "plugin": "netvsp",
        "index": index,
        "backend": "endpoint",
        **found,
        "source": "tap:vnet0",
        **changes,
        "transmit": {**found["transmit"], **(transmit or {})},
        "receive": {**found["receive"], **(receive or {})},
    }
