"""Which storage driver a guest has: its personality's, or another one."""

from __future__ import annotations

import dataclasses

import pytest

from storvsp.guest import HABITS, StorageHabits, attach
from storvsp.guest.habits import LINUX
from tests.support.fake_host import Machine
from tests.support.fake_storage import Storage
from vmbus.guest import FREEBSD, LINUX_6_1, PERSONALITIES, boot


def test_every_personality_has_a_storage_driver():
    assert list(HABITS) == list(PERSONALITIES)


async def attached_habits(personality, **options):
    """What the driver does that a guest gets, and the device it talks to."""
    storage = Storage(Machine(pages=16384).host)
    async with boot(storage.host.machine, personality) as guest:
        (found,) = await guest.connection.connect()
        adapter = await attach(guest, found, **options)
        await adapter.close()
    return adapter.habits, storage


async def test_a_guest_has_the_driver_of_its_personality_even_if_that_is_changed():
    changed = dataclasses.replace(FREEBSD, name="of my own", uses_monitor=False)
    habits, _ = await attached_habits(changed)
    assert habits is HABITS["freebsd"]


async def test_a_test_may_give_a_guest_another_driver():
    mine = dataclasses.replace(LINUX, versions=(0x501,), ring_pages=3)
    habits, storage = await attached_habits(
        dataclasses.replace(LINUX_6_1, uses_monitor=False), habits=mine
    )
    assert habits is mine
    assert [packet[12:14] for packet in storage.log if packet[0] == 9] == [b"\x01\x05"]
    (gpadl,) = (item for item in storage.host.log if item.NAME == "GPADL_HEADER")
    assert gpadl.range_buflen == 8 + 2 * 3 * 8


async def test_a_personality_that_no_driver_goes_with_needs_one_given():
    alone = dataclasses.replace(LINUX_6_1, key="plan9", uses_monitor=False)
    with pytest.raises(ExceptionGroup) as caught:
        await attached_habits(alone)
    assert isinstance(caught.value.exceptions[0], KeyError)
    habits, _ = await attached_habits(alone, habits=StorageHabits())
    assert habits.ring_pages == 32
