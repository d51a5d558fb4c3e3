"""``loopback:``: every frame comes back to its sender, its two addresses exchanged.

``loopback:[as-is]`` leaves the addresses alone: guests drop such frames, but promiscuous ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import trio

from netvsp.endpoint import Endpoint, EndpointInfo, Offloads, Port
from netvsp.frames.frame import Frame
from netvsp.spec import EndpointSpec
from vmbus.plugins.options import Option

MAX_FRAMES = 1024
"""Frames on their way back; there is room for no more until some have arrived."""
MAX_SIZE = 4 << 20
"""Bytes of them."""
TURN = 64
"""Frames that are handed back before others have their turn."""

OPTIONS = (Option("as-is", "leave the addresses alone"),)


class LoopbackEndpoint(Endpoint):
    """An adapter's frames come back to it.

    Args:
        exchange: Exchange the addresses; otherwise a guest gets its frames as they are, and drops
            them, unless it is promiscuous.
    """

    info = EndpointInfo(
        offloads=Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True),
        queues=64,
    )

    def __init__(self, *, exchange: bool = True) -> None:
        self._exchange = exchange
        self._frames: deque[Frame] = deque()
        self._size = 0
        self._arrived = trio.Event()
        self._room = trio.Event()
        self._closed = False
        self._returned = 0

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        if self._closed:
            return len(frames)
        taken = 0
        for frame in frames:
            if not self._has_room:
                break
            own = frame.own()
            taken += 1
            self._size += len(own.head)
            if self._exchange:
                head = own.head
                own = Frame(head[6:12] + head[:6] + head[12:], (), own.offload, own.tci, own.flow)
            self._frames.append(own)
        if taken < len(frames) and self._room.is_set():
            self._room = trio.Event()  # those who wait already have the old one
        self._arrived.set()
        return taken

    @property
    def _has_room(self) -> bool:
        return len(self._frames) < MAX_FRAMES and self._size < MAX_SIZE

    async def wait_writable(self, queue: int) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`."""
        del queue
        if self._has_room:
            await trio.lowlevel.checkpoint()
        else:
            await self._room.wait()

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        frames = self._frames
        self._forget()  # what is of an earlier life
        while True:
            await self._arrived.wait()
            await trio.lowlevel.checkpoint()  # others have their turn
            some = [frames[i] for i in range(min(len(frames), TURN))]
            taken = port.receive(some)
            for _ in range(taken):
                self._size -= len(frames.popleft().head)
            self._returned += taken
            if taken:
                self._room.set()
            if taken < len(some):
                await port.wait_room()
            elif not frames:
                self._arrived = trio.Event()

    def _forget(self) -> None:
        self._frames.clear()
        self._size = 0
        self._arrived = trio.Event()
        self._room.set()

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        return {"returned": self._returned, "waiting": len(self._frames)}

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        self._closed = True
        self._forget()
        await trio.lowlevel.checkpoint()


async def open_spec(spec: EndpointSpec) -> LoopbackEndpoint:
    """Open ``loopback:[as-is]``."""
    options = spec.reader()
    as_is = options.flag("as-is")
    options.finish()
    spec.without_target()
    await trio.lowlevel.checkpoint()
    return LoopbackEndpoint(exchange=not as_is)
