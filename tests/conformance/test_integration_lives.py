"""Every guest on a bus in the same process: whole lives, several lives, and sudden ends of them."""

from __future__ import annotations

import pytest
import trio

from storvsp.guest import HABITS, attach, scan
from tests.support.worlds import (
    ALL,
    controller,
    exercise,
    first_disk,
    limited,
    whole_life,
    world,
)
from vmbus.guest import PERSONALITIES, UEFI, HostRefusedError, Personality
from vmbus.guest.personality import Unload
from vmbus.wire.versions import Version


@pytest.fixture(params=ALL)
def personality(request: pytest.FixtureRequest) -> Personality:
    return PERSONALITIES[request.param]


async def test_a_whole_life_leaves_nothing_behind(personality):
    # checklist rows 1 to 12, 21 to 26, 31 and 33, as far as this guest would notice
    async with world(controller(personality, disks=2)) as there:
        async with there.boot(personality) as guest:
            adapter = await whole_life(guest)
        assert there.bus.snapshot()["faults"] == 0
        assert not there.bus.runners
        wanted = 3 if HABITS[personality.key].vps_per_sub_channel is not None else 0
        assert len(adapter.channels) == 1 + wanted


LADDER = [(name, version) for name in ALL for version in Version]


@pytest.mark.parametrize(("name", "limit"), LADDER, ids=[f"{n}-{v!s}" for n, v in LADDER])
async def test_a_guest_lives_with_whatever_version_the_host_is_held_to(name, limit):
    # checklist row 1: refusals are answers, and the guest goes down its ladder
    personality = PERSONALITIES[name]
    possible = [version for version in personality.versions if version <= limit]
    async with world(controller(personality), config=limited(limit)) as there:
        async with there.boot(personality) as guest:
            if not possible:
                with pytest.raises(HostRefusedError):
                    await guest.connection.connect()
                return
            adapter, disk = await first_disk(guest, sub_channels=1)
            assert guest.connection.version == possible[0]
            await exercise(adapter, disk, tasks=3, rounds=2)
            await adapter.close()
            await guest.connection.unload()
            guest.check_memory()
        if personality.unload is not Unload.NEVER and possible[0] >= personality.unload_since:
            await there.settle()
            assert there.bus.snapshot()["version"] is None
        assert there.bus.snapshot()["faults"] == 0


async def test_a_second_kernel_takes_over_without_a_word_of_the_first(personality):
    # checklist row 7: kdump. The first kernel has commands in flight and open channels.
    async with world(controller(personality)) as there, there.boot(personality) as guest:
        adapter, disk = await first_disk(guest, sub_channels=2)
        await exercise(adapter, disk, tasks=2, rounds=1)
        await guest.connection.connect()  # no CLOSE, no TEARDOWN, no UNLOAD before
        offers = list(guest.connection.offers.values())
        again = await attach(guest, offers[0], sub_channels=1, contiguous=False)
        (disk,) = await scan(again)
        await exercise(again, disk, tasks=2, rounds=1)
        await again.close()
        await guest.connection.unload()
        guest.check_memory()


async def test_a_channel_can_be_opened_twenty_times(personality):
    # checklist row 4: one reply each, or a guest that matches by type takes the wrong one
    async with world(controller(personality)) as there:
        async with there.boot(personality) as guest:
            offers = await guest.connection.connect()
            offer = offers[0]
            for turn in range(20):
                adapter = await attach(
                    guest, offer, sub_channels=turn % 3, contiguous=turn % 2 == 0
                )
                result = await adapter.execute(bytes([0x12, 0, 0, 0, 36, 0]), read=36)
                assert result.good
                await adapter.close()
                guest.check_memory()
            await guest.connection.unload()
        assert there.bus.snapshot()["faults"] == 0
        assert len(there.machine.memory.views(0, 4096)) == 1


async def test_a_reset_in_the_middle_of_commands_ends_that_life_only(personality):
    # checklist row 7: the VM is reset, nothing of the old life touches memory afterwards
    async with world(controller(personality)) as there:
        with trio.CancelScope() as power:
            async with there.boot(personality) as guest, trio.open_nursery() as nursery:
                adapter, disk = await first_disk(guest, sub_channels=2)
                for _ in range(4):
                    nursery.start_soon(exercise, adapter, disk)
                await trio.sleep(0)
                power.cancel()
        await there.transport.reset()
        assert not there.bus.runners
        size = 1 << 20
        there.machine.memory.write(0x100000, b"\xee" * size)
        await there.settle()
        assert there.machine.memory.read(0x100000, size) == b"\xee" * size
        async with there.boot(personality) as guest:
            await whole_life(guest, sub_channels=1)


async def test_firmware_hands_over_to_an_operating_system_again_and_again():
    """UEFI unloads, Linux boots; the order of things in a generation 2 VM."""
    async with world(controller()) as there:
        for name in ("uefi", "linux-6.1", "uefi", "linux-new", "uefi", "freebsd"):
            if name == "uefi":
                await there.transport.reset()
            async with there.boot(PERSONALITIES[name]) as guest:
                await whole_life(guest, sub_channels=1)
        assert there.bus.snapshot()["faults"] == 0


async def test_firmware_may_use_six_where_the_system_is_held_back():
    config = limited(Version.V3_0, delay_max_version=True)
    async with world(controller(), config=config) as there:
        async with there.boot(UEFI) as guest:
            await guest.connection.connect()
            assert guest.connection.version == Version.V6_0
            await guest.connection.unload()
        async with there.boot(PERSONALITIES["linux-6.1"]) as guest:
            await whole_life(guest)
