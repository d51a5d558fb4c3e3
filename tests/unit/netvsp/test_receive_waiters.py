"""Several tasks of an endpoint may wait until the guest has room again."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import trio
import trio.testing

from netvsp.frames.frame import Frame
from netvsp.link import AdapterConfig, Link
from netvsp.receive import Receiver
from netvsp.statistics import Direction
from netvsp.wire import oids

MAC = b"\2\0\0\0\0\1"


async def test_all_who_wait_for_room_are_woken():
    control: Any = SimpleNamespace(filter=oids.FILTER_DIRECTED, scaling=None, rsc=False)
    link = Link(MAC, mtu=1500, speed=10**9)
    receiver = Receiver(control, AdapterConfig(), link, Direction(), lambda channel: None)
    receiver.buffer = full = SimpleNamespace(  # type: ignore[assignment]
        gone=False, free=[], parts={}, part_size=2048, count=1000
    )
    receiver.channels[0] = mock.Mock(pending=0, undertakings=SimpleNamespace(held=False))
    woken = []

    async def wait(number: int) -> None:
        assert receiver.receive([Frame(MAC * 10)]) == 0
        await receiver.wait_room()
        woken.append(number)

    assert not full.free
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
        assert not woken
        receiver.forget()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(woken) == [0, 1, 2]
        nursery.cancel_scope.cancel()
