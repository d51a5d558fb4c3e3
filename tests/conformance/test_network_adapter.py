"""Every network driver on the adapter: up, frames both ways, down, away, and again."""

from __future__ import annotations

import pytest
import trio

from netvsp.endpoints.loopback import LoopbackEndpoint
from netvsp.frames.frame import Frame
from netvsp.guest import HABITS, attach
from netvsp.wire import nvsp
from tests.support.nics import MAC, PEER, Wire, network_adapter, plain_frame
from tests.support.worlds import ALL, world
from vmbus.guest import PERSONALITIES

DRIVERS = [PERSONALITIES[key] for key in ALL if key in HABITS]


@pytest.fixture(params=DRIVERS, ids=str)
def driver(request):
    return request.param


async def started(guest, **options):
    (offer, *_) = await guest.connection.connect()
    adapter = await attach(guest, offer, **options)
    await adapter.up()
    return adapter


async def test_a_driver_comes_up_and_learns_its_address(driver):
    device = network_adapter(driver)
    async with world(device) as there, there.boot(driver) as guest:
        adapter = await started(guest, sub_channels=0)
        assert adapter.address == MAC
        assert adapter.link
        assert device.snapshot()["stage"] == "RNDIS"
        assert not there.bus.faults


async def test_frames_go_both_ways(driver):
    wire = Wire()
    async with world(network_adapter(driver, wire)) as there, there.boot(driver) as guest:
        adapter = await started(guest, contiguous=False)
        for size in (60, 61, 590, 1514):
            frame = plain_frame(size, seed=size)
            assert await adapter.send(frame) == nvsp.SUCCESS
            assert (await wire.wait_sent(1)).pop().tobytes() == frame
            back = plain_frame(size, to=MAC, source=PEER, seed=size + 1)
            assert wire.port is not None
            assert wire.port.receive([Frame(back)]) == 1
            assert (await adapter.receive()).data == back
        assert not there.bus.faults
        guest.check_memory()


async def test_many_frames_in_one_batch_come_in_order(driver):
    wire = Wire()
    async with world(network_adapter(driver, wire)) as there, there.boot(driver) as guest:
        adapter = await started(guest, sub_channels=0)
        frames = [plain_frame(64 + i, to=MAC, source=PEER, seed=i) for i in range(200)]
        left = [Frame(frame) for frame in frames]

        async def bring() -> None:
            assert wire.port is not None
            while left:
                taken = wire.port.receive(left)
                del left[:taken]
                if left:
                    await wire.port.wait_room()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring)
            for frame in frames:
                assert (await adapter.receive()).data == frame
        assert not there.bus.faults


async def test_a_driver_leaves_and_comes_back(driver):
    async with world(network_adapter(driver, LoopbackEndpoint())) as there:
        for _ in range(3):
            async with there.boot(driver) as guest:
                adapter = await started(guest)
                frame = plain_frame(100)
                await adapter.send(frame)
                back = (await adapter.receive()).data
                assert back == MAC + PEER + frame[12:]
                await adapter.down()
                await adapter.close()
                await guest.connection.unload()
                guest.check_memory()
        assert not there.bus.faults
