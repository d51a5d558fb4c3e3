"""``null:``: takes every frame, and brings none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from netvsp.endpoint import Endpoint, EndpointInfo, Offloads
from netvsp.frames.frame import Frame
from netvsp.spec import EndpointSpec


class NullEndpoint(Endpoint):
    """An adapter's frames end here.

    Attributes:
        frames: How many there were.
    """

    info = EndpointInfo(
        offloads=Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True),
        queues=64,
    )

    def __init__(self) -> None:
        self.frames = 0

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        self.frames += len(frames)
        return len(frames)

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        return {"frames": self.frames}


async def open_spec(spec: EndpointSpec) -> NullEndpoint:
    """Open ``null:``."""
    spec.reader().finish()
    spec.without_target()
    await trio.lowlevel.checkpoint()
    return NullEndpoint()
