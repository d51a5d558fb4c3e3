"""One end of a line: what does not fit waits, and so does everybody who has some of it."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from netvsp.frames.frame import Frame
from netvsp.shared.line import FrameLine, make_buffer

FRAMES = [Frame(bytes(1514))] * 16


@pytest.fixture
async def ends():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lines = [FrameLine(each, make_buffer()) for each in ends]
    yield lines
    for each in lines:
        each.close()


def fill(line: FrameLine) -> None:
    while line.send_frames(FRAMES):
        pass


async def test_all_channels_of_an_adapter_may_wait_for_its_line(ends):
    line, other = ends
    fill(line)
    went_on = []

    async def wait(name: int) -> None:
        await line.wait_writable()
        went_on.append(name)

    async with trio.open_nursery() as nursery:
        for name in range(4):
            nursery.start_soon(wait, name)
        await trio.testing.wait_all_tasks_blocked()
        assert went_on == []
        while other.receive_nowait() is not None:
            pass
    assert sorted(went_on) == [0, 1, 2, 3]


async def test_whoever_waits_goes_on_when_the_line_is_closed(ends):
    line, _ = ends
    fill(line)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(line.wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        line.close()
    with trio.CancelScope() as scope:
        scope.cancel()
        await line.wait_writable()
    assert scope.cancelled_caught
