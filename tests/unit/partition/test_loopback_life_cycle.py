"""The in-process transport when its partition is reset, paused, closed, or in another thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.support.loopback import Rig, follow
from vmbus.errors import ConfigError, LocalProtocolError
from vmbus.memory import create_memfd
from vmbus.partition.events import (
    MemoryRemoval,
    PartitionEvent,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
)
from vmbus.wire.synic import HvStatus, Msr

# -- life cycle ------------------------------------------------------------------------------------


async def test_reset_waits_for_the_bus_and_resets_the_synic():
    rig = Rig()
    await rig.transport.add_message_port(1)
    rig.guest.post(1, b"stale")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.transport.reset)
        await trio.testing.wait_all_tasks_blocked()
        event = await anext(rig.transport.incoming())
        assert isinstance(event, PartitionReset)
        assert rig.synic.read_msr(0, Msr.SIMP) == rig.guest.simp | 1
        event.done()
        assert rig.synic.read_msr(0, Msr.SIMP) == 0
    assert rig.guest.post(1, b"fresh") == 0
    assert await anext(rig.transport.incoming()) == PostedMessage(1, 1, 0, b"fresh")


async def test_reset_drops_messages_that_wait():
    rig = Rig()
    await rig.transport.deliver(0, 2, 1, b"first")
    results: list[bool] = []

    async def deliver() -> None:
        results.append(await rig.transport.deliver(0, 2, 1, b"second"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(deliver)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(rig.transport.reset)
        await trio.testing.wait_all_tasks_blocked()
        assert results == [False]
        await deliver()
        assert results == [False, False]
        event = await anext(rig.transport.incoming())
        assert isinstance(event, PartitionReset)
        event.done()


async def test_nothing_touches_memory_while_paused():
    rig = Rig()
    events: list[PartitionEvent] = []
    call = rig.transport.open_call(0, 2, 9)
    results: list[bool] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rig.transport, events)
        await rig.transport.pause()
        before = rig.partition.memory.read(0, 0x8000)

        @nursery.start_soon
        async def deliver() -> None:
            results.append(await rig.transport.deliver(0, 2, 1, b"later"))

        await trio.testing.wait_all_tasks_blocked()
        call.signal()
        call.signal()
        assert rig.partition.memory.read(0, 0x8000) == before
        assert (results, rig.interrupts) == ([], [])

        await rig.transport.resume()
        await trio.testing.wait_all_tasks_blocked()
        assert results == [True]
        assert rig.guest.slot().payload == b"later"
        assert rig.guest.flags() == {9}
        assert [type(event) for event in events] == [PartitionPaused, PartitionResumed]
        rig.transport.close()


async def test_the_bus_may_deliver_and_signal_until_it_says_that_it_is_quiet():
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.transport.pause)
        event = await anext(rig.transport.incoming())
        assert isinstance(event, PartitionPaused)
        assert await rig.transport.deliver(0, 2, 1, b"in time")
        rig.transport.signal_flag(0, 2, 3)
        assert rig.guest.flags() == {3}
        event.done()
        rig.transport.signal_flag(0, 2, 4)
        assert rig.guest.flags() == set()


async def test_a_delivery_that_waits_for_a_slot_waits_on_through_a_pause(autojump_clock):
    rig = Rig()
    await rig.transport.deliver(0, 2, 1, b"first")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rig.transport, [])
        nursery.start_soon(rig.transport.deliver, 0, 2, 1, b"second")
        await trio.testing.wait_all_tasks_blocked()
        await rig.transport.pause()
        rig.guest.free()
        await trio.sleep(1)
        assert rig.guest.slot().message_type == 0
        await rig.transport.resume()
        await trio.sleep(1)
        assert rig.guest.slot().payload == b"second"
        rig.transport.close()


async def test_a_reset_ends_what_a_pause_held_back():
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rig.transport, [])
        await rig.transport.pause()
        rig.transport.signal_flag(0, 2, 9)
        results: list[bool] = []

        @nursery.start_soon
        async def deliver() -> None:
            results.append(await rig.transport.deliver(0, 2, 1, b"held"))

        await trio.testing.wait_all_tasks_blocked()
        await rig.transport.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert results == [False]
        rig.guest.enable()
        await rig.transport.resume()
        assert rig.guest.flags() == set()
        rig.transport.close()


async def test_pause_and_resume_take_turns():
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rig.transport, [])
        with pytest.raises(LocalProtocolError):
            await rig.transport.resume()
        await rig.transport.pause()
        with pytest.raises(LocalProtocolError):
            await rig.transport.pause()
        await rig.transport.resume()
        rig.transport.close()


async def test_removed_memory_is_unmapped_when_nobody_uses_it(autojump_clock):
    rig = Rig()
    end = rig.partition.memory.size
    extra = memory_of(rig, end)
    view = rig.partition.memory.page(end >> 12)
    events: list[PartitionEvent] = []
    removed = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rig.transport, events)

        @nursery.start_soon
        async def remove() -> None:
            await rig.transport.remove_memory(end, extra)
            removed.set()

        await trio.sleep(1)
        assert [
            (event.gpa, event.size) for event in events if isinstance(event, MemoryRemoval)
        ] == [(end, extra)]
        assert not rig.partition.memory.contains(end, 1)
        assert not removed.is_set()
        view.release()
        await removed.wait()
        with pytest.raises(ConfigError):
            await rig.transport.remove_memory(end, extra)
        rig.transport.close()


def memory_of(rig: Rig, gpa: int) -> int:
    fd = create_memfd("hot-plugged", 8192)
    rig.partition.memory.add_region(gpa, 8192, fd)
    os.close(fd)
    return 8192


async def test_closing_ends_everything():
    rig = Rig()
    await rig.transport.add_message_port(1)
    await rig.transport.add_event_port(17, 0)
    await rig.transport.deliver(0, 2, 1, b"first")
    rig.guest.post(1, b"unread")
    failures: list[type] = []

    async def fails(function: Callable[..., object], *args: object) -> None:
        try:
            await function(*args)  # type: ignore[misc]
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            failures.append(type(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, rig.transport.deliver, 0, 2, 1, b"second")
        nursery.start_soon(fails, rig.transport.pause)
        await trio.testing.wait_all_tasks_blocked()
        rig.transport.close()
        rig.transport.close()
    assert set(failures) == {trio.BrokenResourceError, trio.ClosedResourceError}
    assert [event async for event in rig.transport.incoming()] == []
    assert rig.guest.post(1, b"") == HvStatus.INVALID_CONNECTION_ID
    assert rig.guest.signal(17) == HvStatus.INVALID_CONNECTION_ID
    rig.transport.signal_flag(0, 2, 9)
    assert rig.guest.flags() == set()
    for method in (rig.transport.pause, rig.transport.resume, rig.transport.reset):
        with pytest.raises(trio.ClosedResourceError):
            await method()
    with pytest.raises(trio.BrokenResourceError):
        await rig.transport.deliver(0, 2, 1, b"")
    with pytest.raises(trio.BrokenResourceError):
        await rig.transport.add_message_port(1)
    with pytest.raises(trio.BrokenResourceError):
        await rig.transport.add_event_port(1, 0)
    await rig.transport.remove_event_port(17, 0)


async def test_leaving_the_block_closes():
    rig = Rig()
    with rig.transport as transport:
        await transport.add_message_port(1)
    with pytest.raises(trio.BrokenResourceError):
        await transport.add_message_port(1)


# -- threads ---------------------------------------------------------------------------------------


async def test_a_guest_in_another_thread_gets_and_posts_messages_in_order():
    """Checklist rows 2 and 30, with guest and host at the same time."""
    rig = Rig()
    interrupted = threading.Semaphore(0)
    rig.synic._interrupt = lambda vp, vector: interrupted.release()
    await rig.transport.add_message_port(1)
    doorbell = await rig.transport.add_event_port(17, 0)
    count = 200

    def run_guest() -> list[int]:
        received: list[int] = []
        while len(received) < count:
            interrupted.acquire()
            while message := rig.guest.receive():
                received.append(int.from_bytes(message.payload, "little"))
                while rig.guest.post(1, message.payload) == HvStatus.INSUFFICIENT_BUFFERS:
                    continue
        assert rig.guest.signal(17) == 0
        return received

    echoed: list[int] = []
    received: list[int] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def listen() -> None:
            async for event in rig.transport.incoming():
                assert isinstance(event, PostedMessage)
                echoed.append(int.from_bytes(event.payload, "little"))
                event.done()
                if len(echoed) == count:
                    return

        @nursery.start_soon
        async def guest() -> None:
            received.extend(await trio.to_thread.run_sync(run_guest))

        for number in range(count):
            assert await rig.transport.deliver(0, 2, 1, number.to_bytes(4, "little"))
        await trio.lowlevel.wait_readable(doorbell.fd)
    assert received == echoed == list(range(count))


def test_a_guest_that_outlives_the_host_is_not_disturbed():
    rig: Rig

    async def host() -> None:
        nonlocal rig
        rig = Rig()
        await rig.transport.add_message_port(1)

    trio.run(host)
    results: list[int] = []

    def run_guest() -> None:
        results.append(rig.guest.post(1, b"anybody?"))
        rig.synic.write_msr(0, Msr.EOM, 0)

    thread = threading.Thread(target=run_guest)
    thread.start()
    thread.join()
    assert results == [0]
