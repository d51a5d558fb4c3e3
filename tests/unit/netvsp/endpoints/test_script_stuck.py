"""Functions that do not return: their frames wait, and nothing else does."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from netvsp.endpoint import EndpointError
from netvsp.endpoints.script import ScriptEndpoint
from netvsp.frames.frame import Frame
from netvsp.testing import ListeningPort
from tests.support.patience import until, until_in_thread


class Stuck:
    """A function that returns when it is let go."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.go = threading.Event()
        self.back = threading.Event()

    def __call__(self, frame: bytes) -> bytes:
        self.called.set()
        self.go.wait()
        self.back.set()
        return frame


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    function = Stuck()
    yield function
    function.go.set()
    until_in_thread(function.back.is_set)


FRAMES = [Frame(bytes(60))]


async def test_the_end_of_a_life_does_not_wait_for_a_function_that_does_not_return(stuck):
    closed = []
    endpoint = ScriptEndpoint(stuck, patience=0, closed=lambda: closed.append(True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, ListeningPort())
        await trio.testing.wait_all_tasks_blocked()
        endpoint.transmit(0, FRAMES)
        await until(stuck.called.is_set)
        nursery.cancel_scope.cancel()
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            endpoint.transmit(0, FRAMES)
    assert caught.group_contains(EndpointError, match="has not returned")
    await endpoint.aclose()
    assert not closed, "its file is in use still"
    stuck.go.set()
    await until(lambda: closed)


async def test_closing_does_not_wait_for_it_either(stuck):
    endpoint = ScriptEndpoint(stuck, patience=0)
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            endpoint.transmit(0, FRAMES)
            await until(stuck.called.is_set)
            await endpoint.aclose()
    assert caught.group_contains(EndpointError, match="has not returned")


async def test_a_function_that_takes_its_time_is_waited_for(stuck):
    endpoint = ScriptEndpoint(stuck, patience=math.inf)
    port = ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        endpoint.transmit(0, FRAMES)
        await until(stuck.called.is_set)
        nursery.cancel_scope.cancel()
        stuck.go.set()
    assert stuck.back.is_set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        endpoint.transmit(0, FRAMES)
        await until(lambda: port.frames)
        nursery.cancel_scope.cancel()
    await endpoint.aclose()
