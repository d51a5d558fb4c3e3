"""What the drivers of all devices do alike, against a scripted host."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from tests.support.fake_host import Machine, cancelled, offer
from vmbus.guest import (
    LINUX_6_1,
    NETBSD,
    Driver,
    GuestChannel,
    GuestPanic,
    HostRefusedError,
    Incoming,
    boot,
)
from vmbus.wire.guids import CLASS_IDE


class EchoDriver(Driver):
    """Sends a payload over the next channel in turn and returns what comes back."""

    async def echo(self, payload: bytes, channel: GuestChannel | None = None) -> bytes:
        if channel is None:
            channel = await self.next_channel()
        reply = await channel.request(payload, release=self.finished)
        self.finished()
        return reply.payload


class Device:
    """The host's end: it echoes, or holds what it gets back."""

    def __init__(self, host, primary):
        self.host = host
        self.primary = primary
        self.holding = False
        self.held = []
        self.relids = []
        """Where the requests came in, in order."""
        self._echo = host.on_packet
        host.on_packet = self.packet

    def packet(self, channel, packet):
        self.relids.append(channel.offer.relid)
        if self.holding:
            self.held.append((channel, packet))
        else:
            self._echo(channel, packet)

    def release(self, count=None):
        for channel, packet in self.held[:count]:
            self._echo(channel, packet)
        del self.held[:count]

    def offer(self, count, **fields):
        self.host.offer_sub_channels(self.primary, count, **fields)


@asynccontextmanager
async def driven(personality=LINUX_6_1, *, vps=1, ring_pages=2, queue_depth=4, **options):
    """A guest with a driver whose primary channel is open, and the device it drives."""
    machine = Machine(vps=vps)
    machine.host.offers = [offer(1), offer(2)]
    async with boot(machine, personality) as guest:
        found, _other = await guest.connection.connect()
        driver = EchoDriver(guest, found, ring_pages=ring_pages, queue_depth=queue_depth, **options)
        await driver.open()
        yield driver, Device(machine.host, found)


async def settle():
    await trio.testing.wait_all_tasks_blocked()


# -- channels -------------------------------------------------------------------------------------


async def test_channels_open_primary_first_and_close_primary_last():
    async with driven(vps=3, ring_pages=3, contiguous=False) as (driver, device):
        device.offer(2)
        await driver.open_sub_channels(2)
        assert [channel.relid for channel in driver.channels] == [1, 10, 11]
        assert repr(driver) == f"<EchoDriver {driver.offer.instance_id}, 3 channels>"
        await driver.close()
        await driver.close()  # nothing is open any more
    log = device.host.log
    assert [item.relid for item in log if item.NAME == "OPENCHANNEL"] == [1, 10, 11]
    assert [item.downstream_page_offset for item in log if item.NAME == "OPENCHANNEL"] == [3] * 3
    assert [item.relid for item in log if item.NAME == "CLOSECHANNEL"] == [11, 10, 1]
    assert not device.host.gpadls


async def test_packets_that_are_no_completions_come_to_the_driver_from_every_channel():
    got: list[Incoming] = []
    async with driven(on_packet=got.append) as (driver, device):
        device.offer(1)
        await driver.open_sub_channels(1)
        for relid in (1, 10):
            device.host.channels[relid].send(6, b"notice %d" % relid)
        await settle()
        assert [packet.payload.rstrip(b"\0") for packet in got] == [b"notice 1", b"notice 10"]


async def test_a_driver_may_have_the_packets_of_each_channel_apart():
    got = []

    class Sorting(EchoDriver):
        def packet_handler(self, offer):
            return lambda packet: got.append((offer.subchannel_index, packet.payload))

    machine = Machine()
    machine.host.offers = [offer(1)]
    async with boot(machine, LINUX_6_1) as guest:
        (found,) = await guest.connection.connect()
        driver = Sorting(guest, found, ring_pages=2, queue_depth=1)
        await driver.open()
        machine.host.offer_sub_channels(found, 1)
        await driver.open_sub_channels(1)
        for relid in (10, 1):
            machine.host.channels[relid].send(6, bytes(8))
        await settle()
    assert sorted(got) == [(0, bytes(8)), (1, bytes(8))]


async def test_only_some_sub_channels_may_open_and_all_are_taken_back_at_the_end():
    async with driven() as (driver, device):
        device.offer(3)
        await driver.open_sub_channels(3, only={1, 3})
        assert [channel.relid for channel in driver.channels] == [1, 10, 12]
        await driver.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.reset)
            for relid in (10, 11):
                device.host.rescind(relid)
            await settle()
            assert driver.channels, "one offer is still there"
            device.host.rescind(12)
        assert not driver.channels
        driver.check_sub_channels()
        await driver.open()
        assert await driver.echo(b"again...") == b"again..."
        device.offer(1)
        await driver.open_sub_channels(1)
        assert len(driver.channels) == 2


async def test_the_drivers_limit_of_a_packet_holds_on_every_channel():
    with pytest.raises(GuestPanic, match="room for 24"):
        async with driven(max_packet=24) as (driver, device):
            device.offer(1)
            await driver.open_sub_channels(1)
            device.host.channels[10].send(6, bytes(16))
            await trio.sleep_forever()


async def test_the_driver_waits_for_offers_that_are_late():
    async with driven() as (driver, device), trio.open_nursery() as nursery:
        device.offer(1)
        nursery.start_soon(driver.open_sub_channels, 3)
        await settle()
        assert len(driver.channels) == 1
        device.offer(2, first=2)
        await settle()
        assert len(driver.channels) == 4


async def test_giving_up_the_wait_for_offers_leaves_the_primary_channel_usable():
    async with driven() as (driver, _device):
        await cancelled(driver.open_sub_channels, 1)
        assert await driver.echo(b"usable..") == b"usable.."
        await driver.close()


@pytest.mark.parametrize(
    ("granted", "offered", "fields", "reason"),
    [
        (2, 3, {}, "3 sub-channels offered, 2 wanted"),
        (0, 1, {}, "1 sub-channels offered, 0 wanted"),
        (2, 2, {"first": 2}, "sub-channel 2 where 1 was due"),
        (1, 1, {"class_id": CLASS_IDE}, "sub-channel 1 where 1 was due"),
    ],
)
async def test_wrong_sub_channels_crash_the_guest(granted, offered, fields, reason):
    """Checklist row 17."""
    with pytest.raises(GuestPanic, match=reason):
        async with driven() as (driver, device):
            device.offer(offered, **fields)
            await settle()
            await driver.open_sub_channels(granted)


async def test_a_gap_in_the_sub_channels_crashes_the_guest():
    """Checklist row 17."""
    with pytest.raises(GuestPanic, match="sub-channel 3 where 2 was due"):
        async with driven() as (driver, device):
            device.offer(1)
            device.offer(1, first=3)
            await driver.open_sub_channels(2)


async def test_one_sub_channel_more_crashes_the_guest_when_the_others_are_open():
    """Checklist row 17."""
    with pytest.raises(GuestPanic, match="2 sub-channels offered, 1 wanted"):
        async with driven() as (driver, device):
            ordinary = device.host.on_openchannel

            def one_more(item):
                device.offer(1, first=2)
                ordinary(item)

            device.host.handlers["OPENCHANNEL"] = one_more
            device.offer(1)
            await driver.open_sub_channels(1)


async def test_sub_channels_that_nobody_asked_for_crash_the_guest_when_it_closes():
    """Checklist row 17."""
    with pytest.raises(GuestPanic, match="1 sub-channels offered, 0 wanted"):
        async with driven() as (driver, device):
            driver.check_sub_channels()
            device.offer(1)
            await settle()
            await driver.close()


async def test_sub_channels_of_another_device_are_none_of_the_drivers_business():
    async with driven() as (driver, device):
        other = driver.guest.connection.offers[2]
        device.host.offer_sub_channels(other, 1)
        device.offer(1, first=2)
        await settle()
        with pytest.raises(GuestPanic, match="sub-channel 2 where 1 was due"):
            await driver.open_sub_channels(1)
        device.host.rescind(11)
        await driver.guest.connection.wait_gone(11)
        driver.check_sub_channels()


async def test_a_refused_sub_channel_is_told_and_the_others_close():
    async with driven() as (driver, device):
        ordinary = device.host.on_openchannel

        def refuse(item):
            if item.relid == 11:
                device.host.send(b"\x06".ljust(8, b"\0") + bytes([11, 0, 0, 0] * 2 + [1, 0, 0, 0]))
            else:
                ordinary(item)

        device.host.handlers["OPENCHANNEL"] = refuse
        device.offer(2)
        with pytest.raises(HostRefusedError, match="OPENCHANNEL 11"):
            await driver.open_sub_channels(2)
        assert [channel.relid for channel in driver.channels] == [1, 10]


# -- removal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("personality", [LINUX_6_1, NETBSD], ids=str)
async def test_a_device_that_goes_while_its_sub_channels_are_awaited_is_told(personality):
    async with driven(personality) as (driver, device), trio.open_nursery() as nursery:
        device.offer(1)

        async def wait():
            with pytest.raises(trio.BrokenResourceError, match="rescinded"):
                await driver.open_sub_channels(2)

        nursery.start_soon(wait)
        await settle()
        device.host.rescind(10)
        device.host.rescind(1)


async def test_a_device_that_goes_while_its_sub_channels_open_is_told():
    async with driven() as (driver, device):

        def take_away(item):
            if item.relid == 11:
                for relid in (11, 10, 1):
                    device.host.rescind(relid)
            else:
                device.host.on_openchannel(item)

        device.host.handlers["OPENCHANNEL"] = take_away
        device.offer(2)
        removed = []
        driver.on_removed = lambda: removed.append(True)
        with pytest.raises(trio.BrokenResourceError):
            await driver.open_sub_channels(2)
        for relid in (1, 10, 11):
            await driver.guest.connection.wait_gone(relid)
        assert len(removed) == 2  # those that were open
        await driver.close()  # finds nothing to do


async def test_removal_ends_requests_and_those_who_wait_for_room_or_for_silence():
    async with driven(queue_depth=1) as (driver, device):
        device.offer(1)
        await driver.open_sub_channels(1)
        device.holding = True
        ended = []

        async def echo():
            with pytest.raises(trio.BrokenResourceError):
                await driver.echo(b"")
            ended.append("echo")

        async def idle():
            await driver.wait_idle()
            ended.append("idle")

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(echo)
            await settle()
            nursery.start_soon(idle)
            driver.on_removed = lambda: ended.append("removed")
            await settle()
            assert ended == []
            device.host.rescind(10)
            device.host.rescind(1)
        assert sorted(ended) == ["echo"] * 5 + ["idle"] + ["removed"] * 2


async def test_removal_without_anybody_watching_is_fine():
    async with driven() as (driver, device):
        device.host.rescind(1)
        await driver.guest.connection.wait_gone(1)
        with pytest.raises(trio.BrokenResourceError):
            await driver.echo(b"")


# -- queues ---------------------------------------------------------------------------------------


async def test_channels_take_turns():
    async with driven() as (driver, device):
        device.offer(2)
        await driver.open_sub_channels(2)
        for number in range(6):
            assert await driver.echo(b"%08d" % number) == b"%08d" % number
        assert device.relids == [10, 11, 1] * 2


async def test_a_full_queue_is_passed_over_and_full_queues_are_waited_for():
    async with driven(queue_depth=2) as (driver, device):
        device.offer(1)
        await driver.open_sub_channels(1)
        device.holding = True
        done = []

        async def echo(number):
            await driver.echo(b"%08d" % number)
            done.append(number)

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(driver.echo, b"direct..", driver.channels[1])
            await settle()
            for number in range(20):
                nursery.start_soon(echo, number)
            await settle()
            assert device.relids == [10, 10, 1, 1]
            for count in range(16):
                assert [channel.outstanding for channel in driver.channels] == [2, 2], count
                device.release(1)
                await settle()
            device.holding = False
            device.release()
        assert sorted(done) == list(range(20))


async def test_closing_lets_those_go_who_wait_for_room():
    async with driven(queue_depth=1) as (driver, device):
        device.holding = True
        ended = []

        async def echo():
            with pytest.raises(trio.ClosedResourceError):
                await driver.echo(b"")
            ended.append(True)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(echo)
            await settle()
            await driver.close()
        assert len(ended) == 3


async def test_a_cancelled_request_keeps_its_place_until_the_host_is_done_with_it():
    async with driven(queue_depth=1) as (driver, device), trio.open_nursery() as nursery:
        device.holding = True
        await cancelled(driver.echo, b"gone....")
        nursery.start_soon(driver.echo, b"next....")
        await settle()
        assert len(device.relids) == 1
        assert driver.channels[0].outstanding == 1
        device.release()
        await settle()
        assert len(device.relids) == 2
        device.release()


async def test_those_who_give_up_waiting_for_room_do_not_take_it_from_others():
    async with driven(queue_depth=1) as (driver, device), trio.open_nursery() as nursery:
        device.holding = True
        nursery.start_soon(driver.echo, b"first...")
        await settle()
        await cancelled(driver.echo, b"gives up")
        nursery.start_soon(driver.echo, b"second..")
        await settle()
        device.release()
        await settle()
        assert [packet[16:] for _, packet in device.held] == [b"second.."]
        device.release()


async def test_silence_is_waited_for_on_all_channels_and_includes_what_was_cancelled():
    async with driven() as (driver, device):
        device.offer(1)
        await driver.open_sub_channels(1)
        await driver.wait_idle()  # it is silent already
        device.holding = True
        await cancelled(driver.echo, b"on 10...")
        await cancelled(driver.echo, b"on 1....")
        idle = trio.Event()

        async def wait():
            await driver.wait_idle()
            idle.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await settle()
            device.release(1)
            await settle()
            assert not idle.is_set()
            device.release(1)
        assert idle.is_set()


async def test_who_waits_for_room_is_not_overtaken_by_who_has_just_had_an_answer():
    turns: list[int] = []
    async with driven(queue_depth=2) as (driver, _device), trio.open_nursery() as nursery:

        async def busy(task: int) -> None:
            for _ in range(30):
                await driver.echo(b"x" * 8)
                turns.append(task)

        for task in range(5):
            nursery.start_soon(busy, task)
    for start in range(0, 100, 10):
        assert len(set(turns[start : start + 10])) == 5, turns


async def test_all_who_wait_for_room_hear_of_the_end_of_the_channel_and_who_comes_then_does():
    ends: list[int] = []
    async with driven(queue_depth=1) as (driver, device), trio.open_nursery() as nursery:
        device.holding = True

        async def one(task: int) -> None:
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await driver.echo(b"x" * 8)
            ends.append(task)

        for task in range(5):
            nursery.start_soon(one, task)
        await settle()
        device.host.rescind(driver.offer.relid)
        await settle()
        await one(5)
    assert sorted(ends) == [0, 1, 2, 3, 4, 5]
