"""Controllers and disks that come and go under guests that are at work."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

from storvsp.disks.delay import DelayDisk
from storvsp.disks.fault import Fault, FaultDisk, FaultKind
from storvsp.disks.ram import RamDisk
from storvsp.guest import HABITS, ScsiError, attach, scan
from tests.support.patience import until
from tests.support.storage_line import INQUIRY
from tests.support.worlds import (
    ALL,
    DISK_SIZE,
    EchoDevice,
    controller,
    exercise,
    first_disk,
    read_10,
    world,
    write_10,
)
from vmbus.errors import ConfigError
from vmbus.guest import LINUX_6_1, PERSONALITIES
from vmbus.guest.personality import Rescind
from vmbus.wire import messages as m


async def test_a_controller_that_is_added_later_is_found_and_works(personality):
    async with world(controller(personality)) as there, there.boot(personality) as guest:
        _, disk = await first_disk(guest, sub_channels=1)
        there.bus.add_device(controller(personality, number=2, disks=3))
        offers = await guest.connection.wait_offers(lambda offer: not offer.subchannel_index, 2)
        new = next(offer for offer in offers if offer.instance_id != disk.adapter.offer.instance_id)
        adapter = await attach(guest, new, contiguous=False)
        disks = await scan(adapter)
        assert [each.lun for each in disks] == [0, 1, 2]
        await exercise(adapter, disks[2], tasks=2)
        await exercise(disk.adapter, disk, tasks=2)


async def test_a_controller_is_removed_under_load_and_the_other_goes_on(personality):
    # checklist rows 24 and 34: in flight is answered, RESCIND comes once, the relid stays taken
    # while the guest does not release it
    first, second = controller(personality, number=1), controller(personality, number=2)
    async with world(first) as there, there.boot(personality) as guest:
        number = there.bus.add_device(second)
        offers = await guest.connection.connect()
        doomed = await attach(guest, offers[0], contiguous=False)
        other = await attach(guest, offers[1], contiguous=False)
        (old_disk,) = await scan(doomed)
        (disk,) = await scan(other)
        ends: list[BaseException] = []
        reads: Counter[int] = Counter()

        async def busy(task: int) -> None:
            try:
                while True:
                    await old_disk.read(0, 8)
                    reads[task] += 1
            except trio.BrokenResourceError as error:
                ends.append(error)

        async with trio.open_nursery() as nursery:
            if personality.rescind is Rescind.RELEASE:
                for task in range(3):
                    nursery.start_soon(busy, task)
                await until(lambda: len(reads) == 3)
            nursery.start_soon(exercise, other, disk)
            victim = next(
                key
                for key, device in there.bus.devices.items()
                if device.offer.instance_id == doomed.offer.instance_id
            )
            await there.bus.remove_device(victim)
            assert victim not in there.bus.devices
            assert number in there.bus.devices
        if personality.rescind is Rescind.RELEASE:
            assert len(ends) == 3
            await guest.connection.wait_gone(doomed.offer.relid)
        assert there.transport.messages.count(m.RescindChannelOffer.TYPE) == len(doomed.channels)
        await exercise(other, disk, tasks=2)
        guest.check_memory()
        if personality.rescind is Rescind.IGNORE:
            there.bus.add_device(controller(personality, number=3))
            third = (await guest.connection.wait_offers(lambda offer: offer.relid > 2))[0]
            assert third.relid == 3


async def test_a_removed_controller_comes_back_under_the_same_guid():
    async with world(controller()) as there, there.boot(LINUX_6_1) as guest:
        adapter, disk = await first_disk(guest)
        for _ in range(5):
            (number,) = there.bus.devices
            await there.bus.remove_device(number)
            await guest.connection.wait_gone(adapter.offer.relid)
            there.bus.add_device(controller())
            (offer,) = await guest.connection.wait_offers(lambda _: True)
            assert offer.relid == 1
            adapter = await attach(guest, offer, contiguous=False)
            (disk,) = await scan(adapter)
            await exercise(adapter, disk, tasks=2, rounds=2)
        guest.check_memory()


async def test_removing_what_is_not_there_is_refused():
    async with world(controller()) as there:
        with pytest.raises(ConfigError, match="no device 7"):
            await there.bus.remove_device(7)
        await there.bus.remove_device(1)
        with pytest.raises(ConfigError):
            await there.bus.remove_device(1)


async def test_two_may_remove_a_device_and_one_may_lose_patience():
    device = EchoDevice()
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        await guest.connection.open_channel(offer, ring_pages=4)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as impatient:
                impatient.cancel()
                await there.bus.remove_device(1)
            nursery.start_soon(there.bus.remove_device, 1)
        assert device.closed == 1
        assert there.bus.devices == {}
        await guest.connection.wait_gone(offer.relid)


async def test_disks_come_and_go_and_change_their_size_under_a_running_guest():
    store = controller()
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        adapter, disk = await first_disk(guest)
        rescans: list[int] = []
        adapter.on_rescan = lambda: rescans.append(1)
        address = store.add_disk(RamDisk(1 << 20))
        assert await adapter.wait_notifications(1) == [11]
        assert [each.size for each in await scan(adapter)] == [DISK_SIZE, 1 << 20]
        assert await store.resize_disk(address, 2 << 20) == 2 << 20
        await adapter.wait_notifications(2)
        assert [each.size for each in await scan(adapter)] == [DISK_SIZE, 2 << 20]
        await store.remove_disk(address)
        await adapter.wait_notifications(3)
        assert [each.lun for each in await scan(adapter)] == [0]
        assert len(rescans) == 3
        await exercise(adapter, disk, tasks=2)
        result = await adapter.execute(INQUIRY, lun=1, read=36)
        assert result.data[0] == 0x7F


@pytest.mark.parametrize("name", [name for name in ALL if HABITS[name].resize_srb])
async def test_a_guest_that_looks_for_it_notices_that_a_disk_has_grown(name):
    personality = PERSONALITIES[name]
    store = controller(personality, disks=0)
    address = store.add_disk(RamDisk(1 << 20))
    async with world(store) as there, there.boot(personality) as guest:
        adapter, disk = await first_disk(guest)
        noticed: list[tuple[int, int, int]] = []
        adapter.on_resize = lambda *place: noticed.append(place)
        await store.resize_disk(address, 2 << 20)
        while not noticed:
            await disk.execute(read_10(0, 1), read=512)
        assert noticed == [address]


async def test_a_disk_is_removed_under_commands_that_wait_and_each_gets_an_answer():
    # checklist row 24
    store = controller(disks=0)
    address = store.add_disk(DelayDisk(RamDisk(1 << 20), read=3600.0))
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        adapter, disk = await first_disk(guest)
        results = []

        async def read(block: int) -> None:
            results.append(await disk.execute(read_10(block, 1), read=512))

        async with trio.open_nursery() as nursery:
            for block in range(20):
                nursery.start_soon(read, block)
            await there.settle()
            assert not results
            await store.remove_disk(address)
        assert len(results) == 20
        assert not any(result.good for result in results)
        assert all(channel.outstanding == 0 for channel in adapter.channels)


async def test_another_disk_in_the_same_place_gets_no_command_of_its_predecessor():
    old, new = RamDisk(1 << 20), RamDisk(1 << 20)
    store = controller(disks=0)
    address = store.add_disk(FaultDisk(old, slow := Fault(FaultKind.HANG)))
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        adapter, _ = await first_disk(guest)
        outcome = []

        async def write() -> None:
            outcome.append(await adapter.execute(write_10(0, 1), write=b"\xaa" * 512))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await there.settle()
            assert slow.waiting
            await store.remove_disk(address)
            store.add_disk(new)
            await there.settle()
            slow.release()
        assert not outcome[0].good
        check = bytearray(512)
        await new.readv(0, [memoryview(check)])
        assert not any(check)


async def test_a_drive_without_a_medium_is_found_and_says_so():
    store = controller(disks=0)
    store.add_drive()
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        (drive,) = await scan(await attach(guest, offer, sub_channels=0))
        assert drive.size == 0
        with pytest.raises(ScsiError, match="sense 2/3a/01"):
            await drive.read(0, 1)
