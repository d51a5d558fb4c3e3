"""The driver half of the bus in Python: a guest that behaves as real guests do.

::

    async with boot(machine, LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        channel = await guest.connection.open_channel(offers[0], ring_pages=16)
        completion = await channel.request(b"hello")

It shares nothing with the host half but the bytes on the wire (:mod:`vmbus.wire`), so that it can
serve as its judge: where a real driver would hang, crash or lose data because of its host, this one
raises :class:`GuestPanic` with the reason.
"""

from __future__ import annotations

from vmbus.guest.buffers import Buffer, BufferPool
from vmbus.guest.channel import GuestChannel
from vmbus.guest.connection import Connection
from vmbus.guest.driver import Driver
from vmbus.guest.gpadl import Gpadl
from vmbus.guest.kernel import Guest, boot
from vmbus.guest.machine import GuestPanic, Interrupt, Machine, Region
from vmbus.guest.mailbox import HostRefusedError
from vmbus.guest.personality import (
    DPDK,
    FREEBSD,
    HAIKU,
    ILLUMOS,
    LINUX_5_10,
    LINUX_6_1,
    LINUX_NEW,
    MACOS,
    NETBSD,
    OPENBSD,
    PERSONALITIES,
    UEFI,
    Personality,
)
from vmbus.guest.ring import Incoming

__all__ = [
    "boot",
    "Guest",
    "Connection",
    "GuestChannel",
    "Incoming",
    "Driver",
    "Gpadl",
    "Buffer",
    "BufferPool",
    "GuestPanic",
    "HostRefusedError",
    "Machine",
    "Region",
    "Interrupt",
    "Personality",
    "PERSONALITIES",
    "LINUX_6_1",
    "LINUX_NEW",
    "LINUX_5_10",
    "FREEBSD",
    "ILLUMOS",
    "OPENBSD",
    "NETBSD",
    "DPDK",
    "MACOS",
    "UEFI",
    "HAIKU",
]
