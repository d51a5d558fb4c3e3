"""Devices come, go, fail and hang under guests that are at work; guests pause and run dry."""

from __future__ import annotations

import contextlib
import struct

import pytest
import trio
import trio.testing

from storvsp.disks.delay import DelayDisk
from storvsp.disks.fault import Fault, FaultDisk, FaultKind
from storvsp.disks.ram import RamDisk
from storvsp.guest import attach, scan
from tests.support.worlds import (
    ALL,
    DISK_SIZE,
    EchoDevice,
    RawGuest,
    controller,
    exercise,
    first_disk,
    numbers,
    read_10,
    whole_life,
    world,
    write_10,
)
from vmbus.errors import ConfigError, GuestProtocolError
from vmbus.guest import (
    DPDK,
    FREEBSD,
    LINUX_6_1,
    MACOS,
    OPENBSD,
    PERSONALITIES,
    UEFI,
    GuestPanic,
    Personality,
)
from vmbus.guest.personality import Rescind
from vmbus.host import BusConfig
from vmbus.host.roster import MAX_FAULTY_LIVES
from vmbus.wire import messages as m
from vmbus.wire.packets import build_packet


@pytest.fixture(params=ALL)
def personality(request: pytest.FixtureRequest) -> Personality:
    return PERSONALITIES[request.param]


INQUIRY = bytes([0x12, 0, 0, 0, 36, 0])


# --- Hot add and remove -------------------------------------------------------------------------


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

        async def busy() -> None:
            try:
                while True:
                    await old_disk.read(0, 8)
            except trio.BrokenResourceError as error:
                ends.append(error)

        async with trio.open_nursery() as nursery:
            if personality.rescind is Rescind.RELEASE:
                for _ in range(3):
                    nursery.start_soon(busy)
                await trio.sleep(0.01)
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


# --- Devices that fail --------------------------------------------------------------------------


def raise_an_error(channel: object, packet: object) -> None:
    raise RuntimeError("boom")


def break_a_rule(channel: object, packet: object) -> None:
    raise GuestProtocolError("what is this", field="nonsense")


@pytest.mark.parametrize("misdeed", [raise_an_error, break_a_rule])
async def test_a_device_that_raises_is_offered_again_and_the_others_do_not_notice(misdeed, caplog):
    bad, good = EchoDevice(1, sub_channels=1), EchoDevice(2)
    async with world(bad, good) as there, there.boot(LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        broken = await guest.connection.open_channel(offers[0], ring_pages=4)
        fine = await guest.connection.open_channel(offers[1], ring_pages=4)
        (sub,) = await guest.connection.wait_offers(lambda offer: offer.subchannel_index > 0)
        lent = await guest.connection.open_channel(sub, ring_pages=4)
        assert (await lent.request(b"12345678")).payload == b"12345678"
        bad.on_packet = misdeed
        with pytest.raises(trio.BrokenResourceError):
            await broken.request(b"")
        with pytest.raises(trio.BrokenResourceError):
            await lent.request(b"")
        assert (await fine.request(b"abcdefgh")).payload == b"abcdefgh"
        bad.on_packet = None
        await guest.connection.wait_gone(broken.relid)

        def returned(offer: m.OfferChannel) -> bool:
            return offer.instance_id == bad.offer.instance_id and not offer.subchannel_index

        (again,) = await guest.connection.wait_offers(returned)
        channel = await guest.connection.open_channel(again, ring_pages=4)
        assert (await channel.request(b"01234567")).payload == b"01234567"
        assert there.bus.devices[1] is bad
        guest.check_memory()
    assert bad.closed == good.closed == 1
    if misdeed is raise_an_error:
        assert "the device failed" in caplog.text


async def test_a_device_that_fails_for_ever_is_offered_to_the_next_guest_only():
    bad = EchoDevice()
    bad.on_packet = raise_an_error
    async with world(bad) as there, there.boot(LINUX_6_1) as guest:
        await guest.connection.connect()
        for _ in range(MAX_FAULTY_LIVES):
            (offer,) = await guest.connection.wait_offers(lambda _: True)
            channel = await guest.connection.open_channel(offer, ring_pages=4)
            with pytest.raises(trio.BrokenResourceError):
                await channel.request(b"")
            await guest.connection.wait_gone(offer.relid)
        await there.settle()
        assert guest.connection.offers == {}
        await guest.connection.unload()
        bad.on_packet = None
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        assert (await channel.request(b"01234567")).payload == b"01234567"


async def test_a_device_that_fails_for_ever_can_still_be_removed():
    bad = EchoDevice()
    bad.on_packet = raise_an_error
    async with world(bad) as there, there.boot(UEFI) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        await channel.send(b"")
        await there.settle()
        assert there.bus.snapshot()["devices"][0]["faulty_lives"] == 1
        await there.bus.remove_device(1)
        assert bad.closed == 1


async def test_a_device_that_just_stops_is_rescinded():
    quitter = EchoDevice()

    async def at_once(primary: object) -> None:
        quitter.offer_subchannels = 0
        raise trio.EndOfChannel

    quitter.on_run = at_once
    async with world(quitter) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        with pytest.raises(trio.BrokenResourceError):
            await channel.request(b"")
        await guest.connection.wait_gone(offer.relid)


async def test_a_device_that_hangs_at_the_end_is_cancelled_after_its_grace():
    async def hang(primary: object) -> None:
        await trio.sleep_forever()

    device = EchoDevice()
    device.on_run = hang
    async with world(device, config=BusConfig(close_grace=0.01)) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        assert guest.post_bytes(guest.build(m.CloseChannel(relid=1))) == 0
        assert guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=7))) == 0
        assert await guest.wait_for(m.GpadlTorndown.TYPE) == [m.GpadlTorndown.TYPE]
        assert not there.bus.runners
        assert device.running == 0


async def test_a_device_that_keeps_a_sub_channel_loses_its_life():
    class Miser(EchoDevice):
        async def _sub(self, channel):
            await trio.sleep_forever()

    device = Miser(sub_channels=1)
    async with world(device, config=BusConfig(close_grace=0.01)) as there:
        guest = RawGuest(there)
        await guest.connect()
        (raw,) = await guest.open()
        relid = guest.parse(raw).relid
        pfns = range(0x80, 0x88)
        assert numbers(await guest.post(*guest.gpadl(relid, 8, pfns))) == [m.GpadlCreated.TYPE]
        assert numbers(await guest.post(guest.open_message(relid, 8, 4))) == [
            m.OpenChannelResult.TYPE
        ]
        await guest.post(m.CloseChannel(relid=relid), m.GpadlTeardown(relid=relid, gpadl=8))
        seen = await guest.wait_for(m.GpadlTorndown.TYPE)
        assert m.RescindChannelOffer.TYPE in seen
        assert device.running == 0


async def test_a_corrupt_ring_costs_its_channel_only():
    # fuzz scenarios G12 and G13: fail closed, other channels are not affected
    bad, good = controller(number=1), controller(number=2)
    async with world(bad, good) as there, there.boot(LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        victim = await attach(guest, offers[0], contiguous=False)
        other = await attach(guest, offers[1], contiguous=False)
        (disk,) = await scan(other)
        runner = next(r for r in there.bus.runners.values() if r.event.relid == offers[0].relid)
        assert runner.channel is not None
        words = there.machine.memory.page(runner.event.gpadl.pages[0]).cast("I")
        words[0] = 0xFFFFFFF1
        runner.channel.poke()
        await there.settle()
        with pytest.raises(trio.BrokenResourceError):
            await victim.execute(INQUIRY, read=36)
        await exercise(other, disk, tasks=2)
        (offer,) = await guest.connection.wait_offers(
            lambda offer: offer.instance_id == bad.offer.instance_id
        )
        again = await attach(guest, offer, contiguous=False)
        await exercise(again, (await scan(again))[0], tasks=2)


async def test_a_new_disk_can_be_announced_over_a_corrupt_ring():
    store = controller()
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        await first_disk(guest, sub_channels=0)
        (runner,) = there.bus.runners.values()
        pfn = runner.event.gpadl.pages[runner.event.downstream_page_offset]
        there.machine.memory.page(pfn).cast("I")[1] = 3
        store.add_disk(RamDisk(1 << 20))
        await there.settle()
        assert there.bus.snapshot()["faults"] == 1
        assert len(store.units) == 2


# --- Pause and resume ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linux-6.1", "freebsd", "openbsd", "macos"])
async def test_pauses_in_the_middle_of_commands_lose_nothing(name):
    personality = PERSONALITIES[name]
    async with world(controller(personality)) as there, there.boot(personality) as guest:
        adapter, disk = await first_disk(guest, sub_channels=2)
        over = trio.Event()

        async def work() -> None:
            await exercise(adapter, disk, tasks=8, rounds=10)
            over.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            for _ in range(12):
                await trio.sleep(0)
                await there.transport.pause()
                assert there.bus.snapshot()["paused"]
                await trio.lowlevel.checkpoint()
                await there.transport.resume()
        assert over.is_set()
        assert not there.bus.snapshot()["paused"]


async def test_a_paused_bus_touches_no_memory_and_does_no_errand():
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open(pages=2)
        memory = there.machine.memory
        channel = device.lives[0]
        channel.send(bytes(1000))
        await channel.flush()
        # More than the ring takes: the rest waits for room.
        for _ in range(6):
            channel.send(bytes(1000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.flush)
            await there.settle()
            assert channel.pending
            await there.transport.pause()
            before = memory.read(0x40 * 4096, 4 * 4096)
            # The guest had made room just before; posts come in from the VPs' last breath.
            page = memory.page(0x42).cast("I")
            page[1] = page[0]
            before = memory.read(0x40 * 4096, 4 * 4096)
            channel.send(bytes(8))
            assert not channel.try_flush()
            channel.poke()
            assert guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=99))) == 0
            await trio.sleep(0.02)
            await there.settle()
            assert memory.read(0x40 * 4096, 4 * 4096) == before
            assert guest.synic.receive() is None
            await there.transport.resume()
            assert numbers(await guest.receive()) == [m.GpadlTorndown.TYPE]
            page[1] = page[0]
            await there.settle()
            page[1] = page[0]
        assert not channel.pending


async def test_a_channel_that_opens_while_the_machine_pauses_waits_with_its_rings():
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        pfns = range(0x40, 0x48)
        await guest.post(*guest.gpadl(1, 7, pfns))
        assert guest.post_bytes(guest.build(guest.open_message(1, 7, 4))) == 0
        await there.transport.pause()
        there.machine.memory.write(0x40 * 4096, bytes(8 * 4096))
        await trio.sleep(0.01)
        await there.settle()
        assert not any(there.machine.memory.read(0x40 * 4096, 8 * 4096))
        assert not device.lives
        await there.transport.resume()
        assert numbers(await guest.receive()) == [m.OpenChannelResult.TYPE]
        assert device.lives


async def test_a_machine_can_be_reset_while_it_is_paused():
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        pfns = range(0x40, 0x48)
        await guest.post(*guest.gpadl(1, 7, pfns))
        assert guest.post_bytes(guest.build(guest.open_message(1, 7, 4))) == 0
        await there.transport.pause()
        await there.transport.reset()
        assert not there.bus.runners
        assert not device.lives
        await there.transport.resume()
        guest = RawGuest(there)
        assert len(await guest.connect()) == 1


async def test_a_packet_that_no_driver_sends_does_not_keep_the_machine_from_pausing():
    store = controller()
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        adapter, disk = await first_disk(guest)
        for kind in (7, 8, 11, 15):
            await adapter.channels[0].send_packet(
                build_packet(kind, bytes(16), transaction_id=1, flags=0)
            )
        for kind in (7, 8, 15):
            reply = await adapter.channels[0].request(bytes(16), kind=kind)
            assert struct.unpack_from("<III", reply.payload) == (1, 0, 0xC0000010)
        await there.transport.pause()
        await there.transport.resume()
        await exercise(adapter, disk, tasks=1)


# --- Memory -------------------------------------------------------------------------------------


async def test_memory_is_added_and_taken_away_while_the_guest_works():
    async with world(controller(), megabytes=32) as there, there.boot(LINUX_6_1) as guest:
        adapter, disk = await first_disk(guest)
        gpa, size = 1 << 32, 8 << 20
        for _ in range(3):
            fd = there.machine.fds[0]
            there.machine.memory.add_region(gpa, size, fd)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(exercise, adapter, disk)
                await there.transport.remove_memory(gpa, size)
        assert there.machine.memory.drained()


async def test_monitor_and_interrupt_pages_do_not_keep_memory_from_leaving():
    from vmbus.wire.versions import Version

    async with world(EchoDevice()) as there:
        guest = RawGuest(there)
        gpa, size = 1 << 32, 1 << 20
        there.machine.memory.add_region(gpa, size, there.machine.fds[0])
        await guest.contact(Version.V5_3, monitor_page_1=gpa, monitor_page_2=gpa + 4096)
        await there.transport.remove_memory(gpa, size)
        there.machine.memory.add_region(gpa, size, there.machine.fds[0])
        await guest.contact(Version.V1_1, target_info=gpa + 0x2000)
        await there.transport.remove_memory(gpa, size)
        assert there.machine.memory.drained()


# --- Back-pressure ------------------------------------------------------------------------------


async def test_a_guest_that_takes_no_messages_is_held_up_and_nothing_else_is():
    async with world(*(EchoDevice(n) for n in range(100))) as there:
        guest = RawGuest(there)
        await guest.contact()
        statuses = []
        await there.settle()
        assert guest.post_bytes(guest.build(m.RequestOffers())) == 0
        for _ in range(100):
            statuses.append(guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=5))))
            await there.settle()
        assert statuses[0] == 0
        assert statuses[-1] == 19  # insufficient buffers
        waiting = there.bus.snapshot()["messages_waiting"]
        assert waiting <= 101 + 64
        await there.transport.pause()
        await there.transport.resume()
        replies = await guest.receive()
        assert numbers(replies)[:101] == [1] * 100 + [4]
        assert numbers(replies)[101:] == [12] * statuses.count(0)
        assert guest.post_bytes(guest.build(m.Unload())) == 0
        assert numbers(await guest.receive()) == [17]


async def test_a_guest_that_is_held_up_can_be_reset():
    async with world(*(EchoDevice(n) for n in range(100))) as there:
        guest = RawGuest(there)
        await guest.contact()
        guest.post_bytes(guest.build(m.RequestOffers()))
        await there.settle()
        statuses = [guest.post_bytes(b"") for _ in range(20)]
        assert statuses == [0] * 16 + [19] * 4
        await there.transport.reset()
        guest = RawGuest(there)
        assert len(await guest.connect()) == 100


async def test_a_host_that_ends_does_not_wait_for_a_guest_that_takes_no_messages():
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        pfns = range(0x40, 0x48)
        await guest.post(*guest.gpadl(1, 7, pfns))
        for _ in range(3):
            guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=5)))
        guest.post_bytes(guest.build(guest.open_message(1, 7, 4)))
        await there.settle()
        assert there.bus.runners
    assert device.closed == 1


@pytest.mark.parametrize("personality", [OPENBSD, MACOS, DPDK, LINUX_6_1, FREEBSD], ids=str)
async def test_a_full_ring_is_a_pause_and_not_the_end(personality):
    # checklist row 29: who never signals freed space is polled
    device = EchoDevice(monitor=1000 if personality.needs_monitor else None)
    async with world(device) as there, there.boot(personality) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(
            offer, ring_pages=2, contiguous=False, max_packet=1 << 14
        )
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(channel.request, number.to_bytes(8, "little") * 20)
        count = 60
        host = device.lives[0]
        for number in range(count):
            host.send(number.to_bytes(8, "little") * 100)
        received: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.flush)
            while len(received) < count:
                packets = await channel.receive_batch()
                received += [int.from_bytes(each.payload[:8], "little") for each in packets]
        assert received == list(range(count))
        assert host.statistics.ring_full


# --- The end of guests and hosts ----------------------------------------------------------------


async def test_a_guest_that_vanishes_takes_nothing_with_it():
    device = EchoDevice(sub_channels=2)
    async with world(device) as there:
        with trio.CancelScope() as life:
            async with there.boot(LINUX_6_1) as guest, trio.open_nursery() as nursery:
                (offer,) = await guest.connection.connect()
                channel = await guest.connection.open_channel(offer, ring_pages=4)

                async def ask() -> None:
                    # A request that begins after the end finds no doorbell any more.
                    with contextlib.suppress(GuestPanic):
                        await channel.request(bytes(64))

                for _ in range(20):
                    nursery.start_soon(ask)
                await trio.sleep(0)
                there.transport.close()
                life.cancel()
        await there.bus.wait_gone()
    assert device.running == 0
    assert device.closed == 1


async def test_a_guest_that_vanishes_with_messages_on_their_way_takes_nothing_with_it():
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        for _ in range(3):
            guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=5)))
        guest.post_bytes(guest.build(guest.open_message(1, 7, 4)))
        await there.settle()
        there.transport.close()
        await there.bus.wait_gone()
        await there.settle()
    assert device.closed == 1


async def test_a_body_that_fails_ends_the_bus_and_its_error_is_not_wrapped():
    device = EchoDevice()
    with pytest.raises(ZeroDivisionError):
        async with world(device) as there:
            guest = RawGuest(there)
            await guest.connect()
            await guest.open()
            raise ZeroDivisionError
    assert device.closed == 1
    assert device.running == 0


async def test_a_guest_notices_a_host_that_writes_to_memory_it_has_given_back():
    """The check that other tests rely on can fail."""
    device = EchoDevice()
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        (runner,) = there.bus.runners.values()
        pfn = runner.event.gpadl.pages[-1]
        await guest.connection.close_channel(channel)
        guest.check_memory()
        there.machine.memory.write(pfn * 4096, b"late")
        with pytest.raises(GuestPanic, match="after giving them back"):
            guest.check_memory()


async def test_many_lives_under_load_do_not_grow_the_host():
    """Ports, doorbells, runners and views of memory are all given back."""
    async with world(controller()) as there:
        sizes = []
        for turn in range(6):
            async with there.boot(LINUX_6_1, seed=turn) as guest:
                await whole_life(guest)
            await there.settle()
            assert not there.bus.runners
            sizes.append((len(there.transport._event_ports), len(there.bus.monitor._channels)))
        assert sizes == [(0, 0)] * 6
