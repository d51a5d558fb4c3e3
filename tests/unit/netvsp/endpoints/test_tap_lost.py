"""Frames that the kernel drops since nobody reads a TAP interface."""

import pytest
import trio
import trio.testing

from netvsp.endpoints import tun
from netvsp.endpoints.specs import open_endpoint
from netvsp.testing import ListeningPort
from netvsp.testing.frames import Packet
from tests.support.network import packet_socket, setting
from tests.support.patience import until

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("namespace")]


async def test_frames_that_a_guest_without_room_has_lost_are_counted():
    setting("ipv6/conf/default/disable_ipv6", 1)
    endpoint, port = await open_endpoint("tap:t0"), ListeningPort(room=1)
    assert tun.dropped("t0") == 0
    assert tun.dropped("t1") is None
    count = 3 * tun.queue_length("t0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await until(lambda: port.up is not None)
        with packet_socket("t0") as sock:
            for number in range(count):
                sock.send(Packet(source_port=number % 60_000).build())
            await until(lambda: port.frames)
            assert port.lost_frames == 0
            port.make_room()
            await until(lambda: port.lost_frames)
            await until(lambda: len(port.frames) + port.lost_frames == count)
        nursery.cancel_scope.cancel()
    await endpoint.aclose()


async def test_what_was_lost_before_a_guest_came_is_not_its_own():
    setting("ipv6/conf/default/disable_ipv6", 1)
    endpoint, port = await open_endpoint("tap:t0"), ListeningPort()
    with packet_socket("t0") as sock:
        for _ in range(2 * tun.queue_length("t0")):
            sock.send(Packet().build())
        assert tun.dropped("t0")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, port)
            await until(lambda: port.up is not None)
            await trio.testing.wait_all_tasks_blocked()
            sock.send(Packet().build())
            await until(lambda: port.frames)
            nursery.cancel_scope.cancel()
    assert port.lost_frames == 0
    await endpoint.aclose()
