"""Frames that come back to their sender."""

import pytest
import trio

from netvsp.endpoints.loopback import MAX_FRAMES, MAX_SIZE
from netvsp.endpoints.specs import open_endpoint
from netvsp.frames.frame import Frame, Offload
from netvsp.testing import ListeningPort
from tests.support.patience import waits

ONE, OTHER = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"


async def returned(spec, *frames):
    endpoint, port = await open_endpoint(spec), ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        assert endpoint.transmit(0, frames) == len(frames)
        await port.changed()
        nursery.cancel_scope.cancel()
    await endpoint.aclose()
    return port.frames


async def test_the_addresses_are_exchanged():
    offload = Offload(1, 0, 0, 0, 34, 6)
    frame = Frame(ONE + OTHER + b"\x08\0" + bytes(50), (b"rest",), offload, 7, 9)
    (back,) = await returned("loopback:", frame)
    assert back.tobytes() == OTHER + ONE + b"\x08\0" + bytes(50) + b"rest"
    assert (back.offload, back.tci, back.flow) == (offload, 7, 9)


async def test_the_addresses_stay_if_that_is_asked_for():
    (back,) = await returned("loopback:[as-is]", Frame(ONE + OTHER + bytes(50)))
    assert back.head == ONE + OTHER + bytes(50)


async def test_what_does_not_come_back_makes_the_sender_wait():
    endpoint, port = await open_endpoint("loopback:"), ListeningPort(room=0)
    frames = [Frame(ONE + OTHER + bytes(50))] * (MAX_FRAMES + 10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        assert endpoint.transmit(0, frames) == MAX_FRAMES
        assert await waits(lambda: endpoint.wait_writable(0))
        assert endpoint.transmit(0, frames[:1]) == 0
        assert endpoint.snapshot() == {"returned": 0, "waiting": MAX_FRAMES}
        port.make_room(5)
        await endpoint.wait_writable(0)
        assert endpoint.transmit(0, frames) == 5
        nursery.cancel_scope.cancel()


async def test_what_does_not_come_back_is_bounded_in_bytes():
    endpoint, port = await open_endpoint("loopback:"), ListeningPort(room=0)
    frames = [Frame(ONE + OTHER + bytes(60000))] * 200
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        taken = endpoint.transmit(0, frames)
        assert taken == MAX_SIZE // len(frames[0]) + 1
        assert await waits(lambda: endpoint.wait_writable(0))
        port.make_room(3)
        await endpoint.wait_writable(0)
        assert endpoint.transmit(0, frames) == 3
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("close", [False, True])
async def test_what_was_on_its_way_is_forgotten(close):
    endpoint = await open_endpoint("loopback:")
    endpoint.transmit(0, [Frame(ONE + OTHER + bytes(50))] * 3)
    if close:
        await endpoint.aclose()
        assert endpoint.snapshot()["waiting"] == 0
    port = ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        assert not port.frames
        nursery.cancel_scope.cancel()
