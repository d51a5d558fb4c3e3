"""The host side of Hyper-V's VMBus: bus engine, rings, devices and attachment, for trio.

What a program that has guests needs first::

    from vmbus import LoopbackTransport, open_bus

comes from the rooms below, when it is asked for: who uses the rings or the wire formats only loads
no event loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmbus.errors import VMBusError as VMBusError
    from vmbus.host import (
        Bus as Bus,
        BusConfig as BusConfig,
        Channel as Channel,
        Device as Device,
        Life as Life,
        Observer as Observer,
        Offer as Offer,
        open_bus as open_bus,
    )
    from vmbus.memory import GuestMemory as GuestMemory, allocate_memory as allocate_memory
    from vmbus.partition.loopback import LoopbackTransport as LoopbackTransport
    from vmbus.partition.transport import Transport as Transport
    from vmbus.synic import Synic as Synic

__version__ = "0.1.0"

__all__ = [
    "open_bus",
    "Bus",
    "BusConfig",
    "Device",
    "Offer",
    "Channel",
    "Life",
    "Observer",
    "Transport",
    "LoopbackTransport",
    "Synic",
    "GuestMemory",
    "allocate_memory",
    "VMBusError",
]

_ROOMS = {
    **dict.fromkeys(
        ("open_bus", "Bus", "BusConfig", "Device", "Offer", "Channel", "Life", "Observer"),
        "vmbus.host",
    ),
    "Transport": "vmbus.partition.transport",
    "LoopbackTransport": "vmbus.partition.loopback",
    "Synic": "vmbus.synic",
    "GuestMemory": "vmbus.memory",
    "allocate_memory": "vmbus.memory",
    "VMBusError": "vmbus.errors",
}


def __getattr__(name: str) -> object:
    """Return a public name from its room (PEP 562)."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *_ROOMS})
