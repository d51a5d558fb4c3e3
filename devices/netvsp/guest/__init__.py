"""The network driver of the Python guest (netvsc), peer of :mod:`netvsp`'s device.

::

    adapter = await attach(guest, offer)
    await adapter.up()
    status = await adapter.send(frame)
    frame = await adapter.receive()

It shares :mod:`netvsp.wire` with the host half and nothing else.
"""

from __future__ import annotations

from netvsp.guest.adapter import NetvscAdapter, attach
from netvsp.guest.events import Event
from netvsp.guest.frames import GuestFrame
from netvsp.guest.habits import HABITS, NetworkHabits
from netvsp.guest.replies import AttachError, RndisError
from netvsp.guest.shared import Counters

__all__ = [
    "attach",
    "NetvscAdapter",
    "GuestFrame",
    "Event",
    "Counters",
    "AttachError",
    "RndisError",
    "NetworkHabits",
    "HABITS",
]
