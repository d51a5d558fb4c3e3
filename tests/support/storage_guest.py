"""A guest's adapter on a controller that is played."""

from __future__ import annotations

import dataclasses
from contextlib import asynccontextmanager

from storvsp.guest import attach
from tests.support.fake_host import Machine
from tests.support.fake_storage import Storage
from vmbus.guest import LINUX_6_1, boot


@asynccontextmanager
async def attached(personality=LINUX_6_1, *, storage=None, pages=16384, **options):
    """A guest with its storage driver attached, and the device it talks to."""
    storage = storage or Storage(Machine(pages=pages).host)
    machine = storage.host.machine
    personality = dataclasses.replace(personality, uses_monitor=False)
    async with boot(machine, personality) as guest:
        (found,) = await guest.connection.connect()
        yield await attach(guest, found, **options), storage
