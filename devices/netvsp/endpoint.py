"""What is behind a network adapter: the contract of an endpoint, and what the adapter is to it.

An endpoint takes the frames that the guest sends, and brings those that it is to get::

    adapter --- transmit(queue, frames) ---> endpoint        called in the adapter's tasks
    adapter <-- port.receive(frames) ------- endpoint.run    in a task of the endpoint's own

**Buffers.** The frames of :meth:`Endpoint.transmit` belong to the caller, and what is in
:attr:`Frame.rest` is the guest's memory: the endpoint is done with them when the call returns, or
keeps :meth:`Frame.own`. The frames of :meth:`Port.receive` belong to the endpoint again when it
returns; the adapter has copied them.

**Back-pressure.** Neither call blocks, and both say how many frames they have taken, in order.
What ``transmit`` has not taken the adapter keeps, unanswered, so that the guest's ring fills up and
the guest slows down; it calls :meth:`Endpoint.wait_writable` before it tries again. What
``receive`` has not taken, since the guest has no room or because others are to have their turn, the
endpoint may keep until :meth:`Port.wait_room`, or drop, which it says by :meth:`Port.lost`; an
endpoint with several senders drops, so that one guest that does not read holds up nobody else.

**Lives.** ``run`` is called once for each life of the adapter, and cancelled at its end; there are
many. ``transmit`` may be called at any time, between two lives too. What was on its way to the
guest in one life is not brought in the next: it was meant for a guest that is gone.

**Offloads.** :attr:`EndpointInfo.offloads` says what it takes. The adapter does what is missing in
software before it calls ``transmit``. What comes in by ``receive`` may have any offload; the
adapter does what this guest cannot take.

**Queues.** ``transmit`` may be called for each queue from 0 on below :attr:`EndpointInfo.queues`;
a flow stays on its queue. Frames that come in are sorted by the guest's receive-side scaling.

**Link.** The endpoint calls :meth:`Port.link_changed`; a frame that is sent while it is down is
taken and dropped.

**Errors.** ``run`` that raises, or returns, is the end of the endpoint: the adapter takes the link
down and says why. Neither call raises. After its end, and after :meth:`Endpoint.aclose`, which may
come while ``run`` is under way, an endpoint takes and drops all frames, and keeps nobody waiting.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import trio

from netvsp.frames.frame import Frame


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offloads:
    """What an endpoint can do with a frame that is sent."""

    checksum: bool = False
    """It fills in the sums of TCP and UDP, of IPv4 and IPv6: NEEDS_CHECKSUM."""
    tcp_segments: bool = False
    """It takes TCP segments of up to 64 KiB: GSO_TCPV4 and GSO_TCPV6. Implies ``checksum``."""
    udp_segments: bool = False
    """It takes UDP segments: GSO_UDP. Implies ``checksum``."""
    vlan: bool = False
    """It takes frames with their tag beside their bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndpointInfo:
    """What an endpoint is; constant."""

    offloads: Offloads = Offloads()
    queues: int = 1
    mtu: int | None = None
    """Bytes of payload of the longest frame it carries; None: any."""
    speed: int = 10_000_000_000
    """Bits per second, for the guest to show."""


class Port(Protocol):
    """What an adapter is to its endpoint."""

    @property
    def mac(self) -> bytes:
        """The adapter's address, six bytes."""

    def receive(self, frames: Sequence[Frame]) -> int:
        """Hand frames to the guest. Cannot block.

        Returns:
            How many were taken, in order; some of them may have been dropped and counted.
        """

    async def wait_room(self) -> None:
        """Wait until :meth:`receive` may take more. Is a checkpoint."""

    def lost(self, count: int) -> None:
        """Count frames for the guest that had to be dropped for want of room. Cannot block.

        Those that :meth:`receive` has not taken, and that could not be kept. The guest can ask how
        many there were: GEN_RCV_NO_BUFFER.

        Args:
            count: How many more.
        """

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        """Tell the guest about its link. Cannot block.

        Args:
            up: Whether frames come through.
            speed: Bits per second, if they have changed.
        """


class Endpoint(abc.ABC):
    """Where an adapter's frames go to and come from; see the module text for the rules."""

    info: EndpointInfo = EndpointInfo()

    @abc.abstractmethod
    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """Take frames that the guest sends. Cannot block, does not raise.

        Args:
            queue: Below :attr:`EndpointInfo.queues`.
            frames: The caller's; their ``rest`` is the guest's memory.

        Returns:
            How many were taken, in order.
        """

    async def wait_writable(self, queue: int) -> None:
        """Wait until :meth:`transmit` may take more on a queue. Is a checkpoint.

        Several channels of a guest may share a queue, so several tasks may wait for one.
        """
        await trio.lowlevel.checkpoint()

    async def run(self, port: Port) -> None:
        """Bring frames in until cancelled. Is a checkpoint.

        It is called once for each life of the adapter, and cancelled at its end.

        Raises:
            EndpointError: The endpoint is at an end, and why.
        """
        del port
        await trio.sleep_forever()

    def snapshot(self) -> dict[str, Any]:
        """Describe the endpoint for people, as JSON types. Cannot block, never raises."""
        return {}

    async def aclose(self) -> None:
        """Release what it holds. Idempotent. Is a checkpoint."""
        await trio.lowlevel.checkpoint()


class EndpointError(Exception):
    """An endpoint has come to its end, and why."""
