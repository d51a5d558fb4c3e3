"""The storage driver of the Python guest (storvsc), peer of :mod:`storvsp`'s controller.

::

    adapter = await attach(guest, offer)
    for disk in await scan(adapter):
        first = await disk.read(0, 1)

It shares :mod:`storvsp.wire` with the host half and nothing else.
"""

from __future__ import annotations

from storvsp.guest.adapter import AttachError, StorvscAdapter, attach
from storvsp.guest.disk import GuestDisk
from storvsp.guest.habits import HABITS, StorageHabits
from storvsp.guest.replies import Result, ScsiError
from storvsp.guest.scan import scan

__all__ = [
    "attach",
    "scan",
    "StorvscAdapter",
    "GuestDisk",
    "Result",
    "ScsiError",
    "AttachError",
    "StorageHabits",
    "HABITS",
]
