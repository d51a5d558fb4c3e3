"""Guests that pause, whose memory comes and goes, and that take nothing."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from tests.support.worlds import (
    EchoDevice,
    RawGuest,
    controller,
    exercise,
    first_disk,
    numbers,
    world,
)
from vmbus.guest import DPDK, FREEBSD, LINUX_6_1, MACOS, OPENBSD, PERSONALITIES
from vmbus.wire import messages as m
from vmbus.wire.packets import build_packet

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


async def test_a_paused_bus_touches_no_memory_and_does_no_errand(autojump_clock):
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
            await trio.sleep(60)
            await there.settle()
            assert memory.read(0x40 * 4096, 4 * 4096) == before
            assert guest.synic.receive() is None
            await there.transport.resume()
            assert numbers(await guest.receive()) == [m.GpadlTorndown.TYPE]
            page[1] = page[0]
            await there.settle()
            page[1] = page[0]
        assert not channel.pending


async def test_a_channel_that_opens_while_the_machine_pauses_waits_with_its_rings(autojump_clock):
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        pfns = range(0x40, 0x48)
        await guest.post(*guest.gpadl(1, 7, pfns))
        assert guest.post_bytes(guest.build(guest.open_message(1, 7, 4))) == 0
        await there.transport.pause()
        there.machine.memory.write(0x40 * 4096, bytes(8 * 4096))
        await trio.sleep(60)
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
