"""An endpoint around another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netvsp.endpoint import Endpoint, Port
from netvsp.frames.frame import Frame

# ruff: noqa: D102 - netvsp.endpoint.Endpoint describes the methods


class EndpointWrapper(Endpoint):
    """Passes every call on to another endpoint; derive and override what should differ.

    Closing the wrapper closes the endpoint inside.

    Args:
        inner: The endpoint inside, owned from now on.
    """

    def __init__(self, inner: Endpoint) -> None:
        self.inner = inner
        self.info = inner.info

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        return self.inner.transmit(queue, frames)

    async def wait_writable(self, queue: int) -> None:
        await self.inner.wait_writable(queue)

    async def run(self, port: Port) -> None:
        await self.inner.run(port)

    def snapshot(self) -> dict[str, Any]:
        return self.inner.snapshot()

    async def aclose(self) -> None:
        await self.inner.aclose()


class PortWrapper:
    """Passes every call on to another port, as :class:`EndpointWrapper` does for endpoints.

    Args:
        outer: The adapter's.
    """

    def __init__(self, outer: Port) -> None:
        self.outer = outer

    @property
    def mac(self) -> bytes:
        return self.outer.mac

    def receive(self, frames: Sequence[Frame]) -> int:
        return self.outer.receive(frames)

    async def wait_room(self) -> None:
        await self.outer.wait_room()

    def lost(self, count: int) -> None:
        self.outer.lost(count)

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        self.outer.link_changed(up=up, speed=speed)
