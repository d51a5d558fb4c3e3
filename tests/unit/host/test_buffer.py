"""Leases of GPADLs: the guest gets its pages back when the device has let go, never before."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.patience import until
from tests.support.worlds import EchoDevice, RawGuest, numbers, world
from vmbus.errors import GuestProtocolError
from vmbus.gpadl import Gpadl
from vmbus.host.buffer import GpadlLease, Leases
from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange

TORNDOWN = m.GpadlTorndown.TYPE


@pytest.fixture
def memory():
    made = allocate_memory(16 * PAGE_SIZE)
    for pfn in range(16):
        made.page(pfn)[:] = bytes([pfn]) * PAGE_SIZE
    yield made
    made.close()


def gpadl(*pfns: int, handle: int = 5) -> Gpadl:
    return Gpadl(handle, (GpaRange(len(pfns) * PAGE_SIZE, 0, tuple(pfns)),))


def leases(memory: GuestMemory) -> tuple[Leases, list[tuple[int, int]]]:
    released: list[tuple[int, int]] = []
    return Leases(memory, lambda key, handle: released.append((key, handle))), released


async def test_a_window_is_guest_memory_across_scattered_pages(memory):
    lease = leases(memory)[0].take(1, gpadl(3, 7, 8))
    assert lease.size == 3 * PAGE_SIZE
    assert b"".join(lease.window(PAGE_SIZE - 2, 4)) == b"\3\3\7\7"
    (inside,) = lease.window(PAGE_SIZE + 8, PAGE_SIZE)
    inside[:] = bytes(PAGE_SIZE)
    assert memory.read(7 * PAGE_SIZE + 8, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert b"".join(lease.window(3 * PAGE_SIZE - 1, 10)) == b"\x08", "no more than there is"
    inside.release()
    lease.release()


async def test_pages_that_are_no_memory_are_found_out_when_they_are_used(memory):
    lease = leases(memory)[0].take(1, gpadl(3, 99))
    with pytest.raises(GuestProtocolError, match="is not memory"):
        lease.views()
    lease.release()


async def test_without_a_lease_a_teardown_is_answered_at_once(memory):
    table, released = leases(memory)
    table.tear_down(1, 5)
    assert released == [(1, 5)]


async def test_a_teardown_waits_for_the_last_lease_and_tells_each_once(memory):
    table, released = leases(memory)
    told: list[str] = []
    first, second = table.take(1, gpadl(3)), table.take(1, gpadl(3))
    first.on_teardown = lambda: told.append("first")
    second.on_teardown = lambda: told.append("second")
    other = table.take(2, gpadl(4))
    table.tear_down(1, 5)
    assert told == ["first", "second"]
    assert first.torn_down.is_set()
    assert not other.torn_down.is_set(), "the same handle on another channel is another GPADL"
    first.tear_down()
    first.release()
    first.release()
    assert released == []
    second.release()
    assert released == [(1, 5)]
    assert len(table) == 1
    assert told == ["first", "second"]


async def test_a_device_may_let_go_while_it_is_told(memory):
    table, released = leases(memory)
    lease = table.take(1, gpadl(3))
    lease.on_teardown = lease.release
    table.tear_down(1, 5)
    assert released == [(1, 5)]
    assert not lease.held


async def test_what_a_device_leaves_behind_ends_with_its_channel(memory):
    table, released = leases(memory)
    ring, left = table.take(1, gpadl(3)), table.take(1, gpadl(4, handle=6))
    (view,) = left.views()
    table.tear_down(1, 6)
    assert table.end_channel(1, but=ring) == 1
    assert released == [(1, 6)]
    with pytest.raises(ValueError, match="released"):
        view[0]
    assert ring.held
    assert table.end_channel(1) == 1


# -- over a whole bus ------------------------------------------------------------------------------


class Holder(EchoDevice):
    """Holds GPADL 8, and lets go when a test says so."""

    def __init__(self) -> None:
        super().__init__(1)
        self.lease: GpadlLease | None = None
        self.let_go = trio.Event()
        self.gone = trio.Event()

    async def serve(self, channel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hold, channel)
            await super().serve(channel)
            await self.gone.wait()
            nursery.cancel_scope.cancel()

    async def _hold(self, channel):
        await until(lambda: channel.statistics.packets_in)
        self.lease = channel.lease_gpadl(8)
        self.lease.views()
        await self.let_go.wait()
        self.lease.release()
        self.gone.set()


async def holding(there, device):
    """Boot a guest whose device holds a GPADL."""
    guest = RawGuest(there)
    await guest.connect()
    await guest.open()
    assert numbers(await guest.post(*guest.gpadl(1, 8, range(0x80, 0x84)))) == [m.GpadlCreated.TYPE]
    device.lives[0].statistics.packets_in = 1
    await until(lambda: device.lease)
    return guest


async def test_torndown_is_sent_when_the_device_has_let_go():
    device = Holder()
    async with world(device) as there:
        guest = await holding(there, device)
        assert numbers(await guest.post(m.GpadlTeardown(relid=1, gpadl=8))) == []
        assert device.lease is not None
        assert device.lease.torn_down.is_set()
        with pytest.raises(GuestProtocolError, match="does not exist"):
            device.lives[0].lease_gpadl(8)
        device.let_go.set()
        assert numbers(await guest.receive()) == [TORNDOWN]


async def test_a_closed_channel_keeps_the_pages_until_its_device_returns():
    device = Holder()
    async with world(device) as there:
        guest = await holding(there, device)
        closing = [m.CloseChannel(relid=1), m.GpadlTeardown(relid=1, gpadl=8)]
        closing.append(m.GpadlTeardown(relid=1, gpadl=7))
        assert numbers(await guest.post(*closing)) == []
        device.let_go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(guest.parse(raw).gpadl for raw in await guest.receive()) == [7, 8]


async def test_a_device_that_forgets_to_let_go_is_named_and_the_guest_gets_its_pages(caplog):
    device = Holder()
    async with world(device) as there:
        guest = await holding(there, device)
        device.gone.set()
        replies = await guest.post(m.CloseChannel(relid=1), m.GpadlTeardown(relid=1, gpadl=8))
        await trio.testing.wait_all_tasks_blocked()
        replies += await guest.receive()
        assert numbers(replies) == [TORNDOWN]
        assert len(there.bus.leases) == 0
    assert "has returned without releasing 1 GPADL(s)" in caplog.text


async def test_an_unload_waits_for_leases_as_well():
    device = Holder()
    async with world(device) as there:
        guest = await holding(there, device)
        assert numbers(await guest.post(m.Unload())) == []
        device.let_go.set()
        assert numbers(await guest.receive()) == [m.UnloadResponse.TYPE]
