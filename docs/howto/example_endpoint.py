"""``wire:NAME``: two adapters of one process, at the two ends of a wire.

The worked example of ``write-an-endpoint.md``: whoever opens ``wire:lab`` first has one end, the
next one the other. What one guest sends the other one gets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import trio

from netvsp.endpoint import Endpoint, EndpointInfo, Offloads, Port
from netvsp.frames.frame import Frame
from netvsp.spec import EndpointSpec

MAX_FRAMES = 1024
TURN = 64


class WireEndpoint(Endpoint):
    """One end of a wire; the other one is given to it later."""

    info = EndpointInfo(
        offloads=Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True),
        queues=64,
    )

    def __init__(self) -> None:
        self.other: WireEndpoint | None = None
        self._frames: deque[Frame] = deque()
        """On their way to the guest of this end."""
        self._arrived = trio.Event()
        self._room = trio.Event()
        self._port: Port | None = None

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """Put frames on the way to the other end; drop them if nobody is there."""
        other = self.other
        if other is None or other._port is None:
            return len(frames)
        taken = min(len(frames), MAX_FRAMES - len(other._frames))
        other._frames.extend(frame.own() for frame in frames[:taken])
        if taken < len(frames) and other._room.is_set():
            other._room = trio.Event()
        other._arrived.set()
        return taken

    async def wait_writable(self, queue: int) -> None:
        """Wait until the other end has room, or nobody is there any more."""
        other = self.other
        if other is None or len(other._frames) < MAX_FRAMES:
            await trio.lowlevel.checkpoint()
        else:
            await other._room.wait()

    async def run(self, port: Port) -> None:
        """Bring frames in, in bounded turns."""
        self._empty()
        self._port = port
        self._tell()
        try:
            while True:
                await self._arrived.wait()
                await trio.lowlevel.checkpoint()
                some = [self._frames[i] for i in range(min(len(self._frames), TURN))]
                taken = port.receive(some)
                for _ in range(taken):
                    self._frames.popleft()
                if taken:
                    self._room.set()
                if taken < len(some):
                    await port.wait_room()
                elif not self._frames:
                    self._arrived = trio.Event()
        finally:
            self._port = None
            self._empty()
            self._tell()

    def _empty(self) -> None:
        """Forget what is on its way; whoever waits for room goes on."""
        self._frames.clear()
        self._arrived = trio.Event()
        self._room.set()

    def _tell(self) -> None:
        """A link is up while there is a guest at both ends."""
        ends = [end for end in (self, self.other) if end is not None]
        up = len(ends) == 2 and all(end._port is not None for end in ends)
        for end in ends:
            if end._port is not None:
                end._port.link_changed(up=up)

    def snapshot(self) -> dict[str, Any]:
        """Say how much is on its way."""
        return {"connected": self.other is not None, "waiting": len(self._frames)}

    async def aclose(self) -> None:
        """Let go of the other end."""
        other, self.other = self.other, None
        if other is not None:
            other.other = None
            other._tell()
        self._empty()
        await trio.lowlevel.checkpoint()


_open_ends: dict[str, WireEndpoint] = {}
"""Those that have no other end yet."""


async def open_spec(spec: EndpointSpec) -> WireEndpoint:
    """Open ``wire:NAME``."""
    spec.reader().finish()
    if not spec.target:
        raise spec.error("needs a name, as in wire:lab")
    await trio.lowlevel.checkpoint()
    end, other = WireEndpoint(), _open_ends.pop(spec.target, None)
    if other is None:
        _open_ends[spec.target] = end
    else:
        end.other, other.other = other, end
    return end
