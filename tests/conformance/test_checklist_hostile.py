"""The rows of the acceptance checklist about guests that attack the bus.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
guest here has no habits: it posts bytes and looks at every message, flag and index that comes back.
"""

from __future__ import annotations

import struct
import sys

import pytest

from tests.support.worlds import (
    RAW_RING_PFN,
    EchoDevice,
    controller,
    numbers,
    ready,
    whole_life,
    world,
)
from vmbus.engine.channels import connection_id_of
from vmbus.errors import RingError
from vmbus.guest import LINUX_6_1
from vmbus.host.channel import Channel
from vmbus.wire import messages as m
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, IN_BAND, build_packet
from vmbus.wire.synic import HvStatus


async def test_row_40_any_message_at_any_length_is_survived():
    # fuzz scenarios G01 and G02: truncated and padded messages, and those that only hosts send
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        await guest.open()
        messages = [
            m.CloseChannel(relid=9),
            m.GpadlTeardown(relid=9, gpadl=9),
            m.RelidReleased(relid=9),
            m.ModifyChannel(relid=9, target_vp=9),
            guest.open_message(9, 9, 9),
            *guest.gpadl(9, 9, range(60)),
        ]
        for message in messages:
            raw = guest.build(message)
            for length in range(0, 241, 3):
                while guest.post_bytes(raw[:length].ljust(length, b"\xff")):
                    await guest.receive()
                await guest.receive()
        for kind in [*range(32), 0xFFFF, 0xFFFFFFFF]:
            if kind in {3, 14, 16, 27, 29}:
                continue
            assert guest.post_bytes(struct.pack("<II", kind, 0).ljust(240, b"\xff")) == 0
            await guest.receive()
        assert there.bus.snapshot()["version"] == "5.3"
        assert len(there.bus.runners) == 1


@pytest.mark.parametrize("index", [4096 * 3, 4096 * 3 + 8, 0xFFFFFFF8, 0xFFFFFFFF, 4, 1, 9])
@pytest.mark.parametrize("word", [0, 1])
async def test_row_40_an_impossible_index_is_the_end_of_its_channel(word, index):
    # fuzz scenario G12: rings of 3 data pages; the host reads the index of the one, writes beside
    # that of the other
    device = EchoDevice(1)
    async with world(device, EchoDevice(2)) as there:
        guest = await ready(there)
        await guest.open()
        if word == 0:
            there.machine.memory.page(RAW_RING_PFN).cast("I")[0] = index
            device.lives[0].poke()
        else:
            there.machine.memory.page(RAW_RING_PFN + 4).cast("I")[1] = index
            device.lives[0].send(bytes(8))
            there.bus.nursery.start_soon(_fails, device.lives[0])
            device.lives[0].poke()
            packet = build_packet(IN_BAND, bytes(8), flags=FLAG_COMPLETION_REQUESTED)
            there.machine.memory.write((RAW_RING_PFN + 1) * 4096, packet + bytes(8))
            there.machine.memory.page(RAW_RING_PFN).cast("I")[0] = len(packet) + 8
        assert numbers(await guest.receive()) == [2]
        assert there.bus.snapshot()["faults"] == 1
        assert device.running == 0


async def _fails(channel: Channel) -> None:
    with pytest.raises(RingError):
        await channel.flush()


async def test_row_40_guests_cannot_make_the_host_remember_their_faults():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)

        def size() -> int:
            return sum(sys.getsizeof(value) for value in vars(there.bus).values())

        before = size()
        for relid in range(2000):
            while guest.post_bytes(guest.build(m.CloseChannel(relid=0x10000 + relid))):
                await there.settle()
        await there.settle()
        assert there.bus.snapshot()["faults"] == 2000
        assert size() <= before + 256


async def test_row_40_signals_to_anything_are_harmless():
    # fuzz scenario G16
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        assert guest.synic.signal(connection_id_of(1)) == HvStatus.INVALID_CONNECTION_ID
        await guest.open()
        for connection in (0, 1, 2, 4, connection_id_of(2), 0xFFFFFF, 0xFFFFFFFF):
            assert guest.synic.signal(connection) != 0
        for _ in range(1000):
            assert guest.synic.signal(connection_id_of(1)) == 0
        await there.settle()
        assert device.running


async def test_row_40_a_life_is_whole_again_after_the_worst_of_guests():
    async with world(controller()) as there:
        guest = await ready(there)
        for relid in (0, 1, 2, 0xFFFFFFFF):
            for offset in (0, 1, 3, 7, 8, 0xFFFFFFFF):
                await guest.post(*guest.gpadl(relid, offset, range(0x40, 0x48)))
                await guest.post(guest.open_message(relid, offset, offset))
        await there.transport.reset()
        async with there.boot(LINUX_6_1) as kernel:
            await whole_life(kernel)
