"""Numbers of slots, and the buffers that the device may use."""

from __future__ import annotations

from netvsp.guest.shared import SharedBuffer, Slots
from tests.support.fake_nic_host import plugged


def test_the_lowest_free_slot_is_given_first():
    slots = Slots(3)
    assert [slots.take() for _ in range(4)] == [0, 1, 2, None]
    slots.give(2)
    slots.give(0)
    assert [slots.take() for _ in range(3)] == [0, 2, None]


def test_slots_without_an_end():
    slots = Slots()
    assert [slots.take() for _ in range(100)] == list(range(100))


async def test_a_buffer_has_whole_pages_and_is_described_once():
    async with plugged() as (adapter, nic):
        buffer = SharedBuffer(adapter.guest, 1, 5000, contiguous=False)
        assert buffer.size == 8192
        buffer.write(4000, b"across a page" * 20)
        assert buffer.read(4000, 13 * 20) == b"across a page" * 20
        before = len(nic.host.gpadls)
        await buffer.describe()
        await buffer.describe()
        assert len(nic.host.gpadls) == before + 1
        await buffer.take_back()
        await buffer.take_back()
        assert len(nic.host.gpadls) == before
