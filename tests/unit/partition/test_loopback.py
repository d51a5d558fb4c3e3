"""The in-process transport, with a guest of a few lines: messages, doorbells, flags."""

from __future__ import annotations

import gc
import os

import pytest
import trio
import trio.testing

from tests.support.loopback import Rig, follow
from tests.support.synic import VECTOR, Guest
from vmbus.errors import AttachError, LocalProtocolError
from vmbus.partition.events import (
    PartitionEvent,
    PartitionReset,
    PostedMessage,
)
from vmbus.partition.transport import Transport
from vmbus.wire.synic import HvStatus, Msr


def as_transport(transport: Transport) -> Transport:
    return transport


async def test_it_is_a_transport():
    rig = Rig(name="vm7")
    transport = as_transport(rig.transport)
    assert transport.name == "vm7"
    assert transport.vp_count == 2
    assert transport.memory is rig.partition.memory


async def test_a_posted_message_comes_in():
    rig = Rig()
    await rig.transport.add_message_port(1)
    await rig.transport.add_message_port(4)
    await rig.transport.add_message_port(4)
    assert rig.guest.post(1, b"old") == 0
    assert rig.guest.post(4, b"new", message_type=2) == 0
    incoming = rig.transport.incoming()
    assert await anext(incoming) == PostedMessage(1, 1, 0, b"old")
    assert await anext(incoming) == PostedMessage(4, 2, 0, b"new")


async def test_waiting_for_a_message_ends_when_one_is_posted():
    rig = Rig()
    await rig.transport.add_message_port(1)
    events: list[PartitionEvent] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rig.transport, events)
        await trio.testing.wait_all_tasks_blocked()
        rig.guest.post(1, b"wake")
        await trio.testing.wait_all_tasks_blocked()
        assert events == [PostedMessage(1, 1, 0, b"wake")]
        rig.transport.close()


async def test_a_guest_that_posts_too_much_has_to_try_again():
    rig = Rig(post_limit=2)
    await rig.transport.add_message_port(1)
    assert [rig.guest.post(1, b"x") for _ in range(3)] == [0, 0, HvStatus.INSUFFICIENT_BUFFERS]
    taken = await anext(rig.transport.incoming())
    assert isinstance(taken, PostedMessage)
    assert rig.guest.post(1, b"x") == HvStatus.INSUFFICIENT_BUFFERS
    taken.done()
    assert rig.guest.post(1, b"x") == 0
    assert rig.guest.post(1, b"x") == HvStatus.INSUFFICIENT_BUFFERS


async def test_a_message_of_a_former_life_makes_no_room_in_the_next():
    rig = Rig(post_limit=1)
    await rig.transport.add_message_port(1)
    rig.guest.post(1, b"old")
    incoming = rig.transport.incoming()
    taken = await anext(incoming)
    assert isinstance(taken, PostedMessage)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.transport.reset)
        event = await anext(incoming)
        assert isinstance(event, PartitionReset)
        event.done()
    rig.guest.enable()
    assert rig.guest.post(1, b"new") == 0
    taken.done()
    assert rig.guest.post(1, b"x") == HvStatus.INSUFFICIENT_BUFFERS


async def test_calls_to_the_wrong_port_have_a_status():
    rig = Rig()
    guest = rig.guest
    await rig.transport.add_message_port(1)
    await rig.transport.add_event_port(17, 0)
    assert guest.post(2, b"") == HvStatus.INVALID_CONNECTION_ID
    assert guest.post(17, b"") == HvStatus.INVALID_PORT_ID
    assert guest.signal(2) == HvStatus.INVALID_CONNECTION_ID
    assert guest.signal(1) == HvStatus.INVALID_PORT_ID
    assert guest.signal(17, 1) == HvStatus.INVALID_PARAMETER


async def test_a_doorbell_rings():
    rig = Rig()
    doorbell = await rig.transport.add_event_port(17, 0)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(doorbell.fd)
    assert rig.guest.signal(17) == 0
    assert rig.guest.signal(17, fast=False) == 0
    await trio.lowlevel.wait_readable(doorbell.fd)
    assert os.eventfd_read(doorbell.fd) == 2
    assert not os.get_inheritable(doorbell.fd)


async def test_a_doorbell_that_nobody_answers_never_blocks_the_guest():
    rig = Rig()
    doorbell = await rig.transport.add_event_port(17, 0)
    os.eventfd_write(doorbell.fd, (1 << 64) - 2)
    assert rig.guest.signal(17) == 0


async def test_a_removed_doorbell_wakes_its_waiters_and_is_gone():
    rig = Rig()
    doorbell = await rig.transport.add_event_port(17, 0)
    fd = doorbell.fd
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(fd)

        await trio.testing.wait_all_tasks_blocked()
        await rig.transport.remove_event_port(17, 0)
    assert doorbell.fd == -1
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    assert rig.guest.signal(17) == HvStatus.INVALID_CONNECTION_ID
    with pytest.raises(AttachError):
        await rig.transport.remove_event_port(17, 0)


async def test_a_cancelled_removal_has_removed():
    rig = Rig()
    doorbell = await rig.transport.add_event_port(17, 0)
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.transport.remove_event_port(17, 0)
    assert scope.cancelled_caught
    assert doorbell.fd == -1


async def test_forgotten_doorbells_are_closed_in_the_end():
    rig = Rig()
    doorbell = await rig.transport.add_event_port(17, 0)
    fd = doorbell.fd
    rig.transport.close()
    os.fstat(fd)
    del doorbell, rig
    gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


async def test_a_connection_id_belongs_to_one_kind_of_port():
    rig = Rig()
    await rig.transport.add_message_port(1)
    await rig.transport.add_event_port(17, 0)
    await rig.transport.add_event_port(17, 1)
    with pytest.raises(AttachError):
        await rig.transport.add_event_port(17, 1)
    with pytest.raises(AttachError):
        await rig.transport.add_event_port(1, 0)
    with pytest.raises(AttachError):
        await rig.transport.add_message_port(17)


async def test_a_message_is_delivered():
    rig = Rig()
    assert await rig.transport.deliver(0, 2, 1, b"offer")
    assert rig.guest.slot().payload == b"offer"
    assert rig.interrupts == [(0, VECTOR)]


async def test_a_message_waits_until_the_guest_writes_eom(autojump_clock):
    """Checklist row 2. The clock stands still, so only the EOM can have ended the wait."""
    rig = Rig()
    await rig.transport.deliver(0, 2, 1, b"first")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.transport.deliver, 0, 2, 1, b"second")
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        now = trio.current_time()
        message = rig.guest.receive()
        assert message is not None
        assert message.pending
    assert trio.current_time() == now
    assert rig.guest.slot().payload == b"second"


async def test_an_eom_that_nobody_waits_for_is_no_trouble():
    rig = Rig()
    rig.synic.write_msr(0, Msr.EOM, 0)
    assert await rig.transport.deliver(0, 2, 1, b"offer")


async def test_a_message_waits_for_a_guest_that_writes_no_eom(autojump_clock):
    rig = Rig()
    await rig.transport.deliver(0, 2, 1, b"first")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.transport.deliver, 0, 2, 1, b"second")
        await trio.sleep(1)
        assert rig.guest.slot().payload == b"first"
        rig.guest.free()
        freed = trio.current_time()
    assert trio.current_time() - freed <= 0.0011
    assert rig.guest.slot().payload == b"second"


async def test_messages_to_two_sints_of_one_vp_can_wait_together():
    rig = Rig()
    rig.synic.write_msr(0, Msr.SINT0 + 3, 0x40)
    for sint in (2, 3):
        await rig.transport.deliver(0, sint, 1, b"first")
    async with trio.open_nursery() as nursery:
        for sint in (2, 3):
            nursery.start_soon(rig.transport.deliver, 0, sint, 1, b"second")
        for sint in (3, 2):
            await trio.testing.wait_all_tasks_blocked()
            assert rig.guest.receive(sint)
    assert rig.guest.slot(2).payload == rig.guest.slot(3).payload == b"second"


async def test_a_message_for_a_synic_that_is_off_is_dropped():
    rig = Rig()
    rig.synic.write_msr(0, Msr.SIMP, 0)
    assert not await rig.transport.deliver(0, 2, 1, b"lost")
    assert not await rig.transport.deliver(9, 2, 1, b"lost")


async def test_a_message_that_waits_is_dropped_when_the_synic_goes_off():
    rig = Rig()
    await rig.transport.deliver(0, 2, 1, b"first")
    results: list[bool] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def deliver() -> None:
            results.append(await rig.transport.deliver(0, 2, 1, b"second"))

        await trio.testing.wait_all_tasks_blocked()
        rig.synic.write_msr(0, Msr.SCONTROL, 0)
    assert results == [False]


async def test_a_cancelled_delivery_has_not_delivered():
    rig = Rig()
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.transport.deliver(0, 2, 1, b"never")
    assert scope.cancelled_caught
    assert rig.guest.slot().message_type == 0


async def test_messages_that_cannot_be_sent_are_the_callers_fault():
    rig = Rig()
    with pytest.raises(LocalProtocolError):
        await rig.transport.deliver(0, 2, 1, bytes(241))


async def test_a_call_sets_its_flag_until_it_is_closed():
    """Checklist row 33, the transport's part: no flag outside a call's life."""
    rig = Rig()
    second = Guest(rig.synic, 1, base=0x8000).enable()
    call = rig.transport.open_call(0, 2, 9)
    assert rig.guest.flags() == set()
    call.signal()
    assert rig.guest.flags() == {9}
    call.retarget(1)
    call.signal()
    assert rig.guest.flags() == set()
    assert second.flags() == {9}
    call.retarget(77)
    call.signal()
    call.retarget(0)
    call.close()
    call.close()
    call.signal()
    assert rig.guest.flags() == second.flags() == set()
    assert rig.interrupts == [(0, VECTOR), (1, VECTOR)]


async def test_misbehaviour_is_reported_to_those_who_want_to_know():
    texts: list[str] = []
    Rig(report=texts.append).transport.report("bad ring")
    Rig().transport.report("bad ring")
    assert texts == ["bad ring"]
