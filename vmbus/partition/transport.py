"""What the bus runtime needs of a partition: messages, doorbells, interrupts and memory.

A *transport* connects one guest partition to one :class:`vmbus.host.Bus`. Two are built in: the
in-process one of :mod:`vmbus.partition.loopback`, for VMMs written in Python and for tests, and the
``vmbus-user`` socket of :mod:`vmbus.attach`. The cut is at SynIC level: a transport knows
connection ids, message slots and event flags, but nothing of offers, channels or GPADLs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from vmbus.memory import GuestMemory
from vmbus.partition.events import PartitionEvent


class Call(Protocol):
    """A prepared way to raise one event flag on one VP; made by :meth:`Transport.open_call`."""

    def signal(self) -> None:
        """Set the flag and interrupt the VP. Cannot block, never raises; late calls are lost."""

    def retarget(self, vp: int) -> None:
        """Deliver to another VP from now on (MODIFYCHANNEL). Cannot block."""

    def close(self) -> None:
        """No signal goes out after this. Idempotent. Cannot block."""


class Doorbell(Protocol):
    """The host end of a guest's HvSignalEvent on one connection id and flag."""

    @property
    def fd(self) -> int:
        """A non-blocking eventfd, readable when the guest has signalled. Owned by the port."""


class Transport(Protocol):
    """One attached partition."""

    @property
    def name(self) -> str:
        """A short name for logs and listings."""

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory; regions come and go under the transport's control."""

    @property
    def vp_count(self) -> int:
        """Number of virtual processors; VP indices are ``0 .. vp_count - 1``."""

    async def deliver(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        """Put one message into a SynIC slot. Is a checkpoint; never two at once per (vp, sint).

        Args:
            vp: VP index.
            sint: 0 to 15.
            message_type: 1 for VMBus.
            payload: At most 240 bytes.

        Returns:
            True once the message is in the slot; False if it had to be dropped, because the guest
            has switched its SynIC off or has no such VP.

        Raises:
            trio.BrokenResourceError: The partition is gone.
        """

    def open_call(self, vp: int, sint: int, flag: int) -> Call:
        """Prepare event flag ``flag`` of SINT ``sint`` on ``vp``. Cannot block."""

    async def add_message_port(self, connection_id: int) -> None:
        """Let the guest post to ``connection_id``. Is a checkpoint."""

    async def add_event_port(self, connection_id: int, flag: int) -> Doorbell:
        """Let the guest signal ``connection_id`` (with ``flag``, 0 as a rule). Is a checkpoint.

        Raises:
            vmbus.errors.AttachError: The VMM refused (the id is in use, say).
        """

    async def remove_event_port(self, connection_id: int, flag: int) -> None:
        """No signals any more; the doorbell's descriptor is closed. Is a checkpoint."""

    def incoming(self) -> AsyncIterator[PartitionEvent]:
        """What the partition does, in order; ends when it is gone. One consumer.

        It is gone for good when its VMM has closed the connection, or lost it, or somebody in this
        process has closed the transport. A guest that leaves the bus with UNLOAD, is reset or
        panics is not gone: it, or its successor, may make contact again.
        """

    def report(self, text: str) -> None:
        """Tell the VMM about a guest's misbehaviour, if it wants to know. Cannot block."""
