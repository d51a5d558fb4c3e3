"""Corners of a link, its descriptors and the event queue that no well-formed peer reaches."""

from __future__ import annotations

import errno
import os
import socket

import pytest
import trio

from tests.support.attach import count_fds, make_eventfd, make_memfd
from vmbus.attach.protocol.descriptors import (
    check_eventfd_untrusted,
    check_memory_untrusted,
    map_region_untrusted,
)
from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.messages import MessageSpec, Number, State
from vmbus.attach.protocol.to_server import MemoryRegion
from vmbus.attach.server import ServerLimits
from vmbus.attach.server.events import EventQueue
from vmbus.attach.server.link import Link
from vmbus.errors import PeerProtocolError
from vmbus.memory import GuestMemory
from vmbus.partition.events import PartitionReset, PostedMessage

REGION = MemoryRegion(0, 4096, 0, 0, 0)


class Silent:
    """A session that does nothing."""

    state = State.ATTACHED

    def __init__(self) -> None:
        self.requests: list[int] = []

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        self.requests.append(spec.number)

    def dropped(self, error: PeerProtocolError) -> None:
        raise AssertionError


def make_link() -> tuple[Link, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(ours, Silent(), ServerLimits()), theirs


async def test_a_link_that_failed_before_it_ran_is_over() -> None:
    before = count_fds()
    link, theirs = make_link()
    link.fail("no")
    link.fail("again")
    link.finish("again")
    link.post(Number.LOG, b"")
    link.reply(Number.QUERY, 1, b"", [make_eventfd()])
    answers: list[object] = []
    link.request_soon(Number.SET_CALL_FD, b"", [make_eventfd()], answers.append)
    assert [type(answer) for answer in answers] == [trio.BrokenResourceError]
    link.spawn(trio.sleep_forever)
    with trio.fail_after(10):
        await link.run()
    assert link.reason == "no"
    theirs.close()
    assert count_fds() == before


async def test_a_cancelled_link_closes_its_socket() -> None:
    link, theirs = make_link()
    with trio.move_on_after(0):
        await link.run()
    assert link.closed.is_set()
    assert theirs.recv(1) == b""
    theirs.close()


async def test_request_ids_wrap_around_without_zero() -> None:
    link, theirs = make_link()
    link._next_seq = 0xFFFFFFFF
    for _ in range(2):
        link.request_soon(Number.GOODBYE, b"", [], lambda _: None)
    assert [theirs.recv(16)[4:8] for _ in range(2)] == [b"\xff" * 4, b"\1\0\0\0"]
    link.fail("done")
    await link.run()
    theirs.close()


async def test_work_is_run_beside_the_link_and_ends_with_it() -> None:
    link, theirs = make_link()
    ended = trio.Event()

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await trio.testing.wait_all_tasks_blocked()
        link.spawn(work)
        await trio.testing.wait_all_tasks_blocked()
        theirs.close()
    assert ended.is_set()


@pytest.mark.parametrize("check", [check_eventfd_untrusted, None])
def test_a_descriptor_that_cannot_be_examined_is_refused(check: object) -> None:
    with pytest.raises(PeerProtocolError, match="examined") as caught:
        if check is None:
            check_memory_untrusted(-1, REGION, trusted=False)
        else:
            check_eventfd_untrusted(1 << 20, "X")
    assert caught.value.errno == errno.EINVAL


def test_what_guest_memory_refuses_is_an_error_of_the_peer() -> None:
    memory = GuestMemory()
    fd = make_memfd(4096)
    map_region_untrusted(memory, REGION, fd, trusted=False)
    with pytest.raises(PeerProtocolError, match="overlaps") as caught:
        map_region_untrusted(memory, REGION, fd, trusted=False)
    assert caught.value.errno == errno.EINVAL
    memory.close()
    os.close(fd)


async def test_events_come_in_order_and_end() -> None:
    granted: list[int] = []
    begun: list[int] = []
    events = EventQueue(4, granted.append, lambda: begun.append(1))
    post = PostedMessage(1, 1, 0, b"", events.message_done)
    reset = PartitionReset(lambda: None)
    for _ in range(2):
        events.take_credit()
        events.put(post)
    events.put(reset)
    assert begun == []
    assert [await anext(events) for _ in range(3)] == [post, post, reset]
    assert begun == [1]
    assert granted == []
    post.done()
    post.done()
    assert granted == [1, 1]
    events.drop_messages()
    events.put(reset)
    events.end()
    events.end()
    post.done()
    assert granted == [1, 1]
    assert [event async for event in events] == []


async def test_waiting_for_an_event_is_woken_by_the_end() -> None:
    events = EventQueue(4, lambda _: None, lambda: None)
    async with trio.open_nursery() as nursery:

        async def consume() -> None:
            assert [event async for event in events] == []

        nursery.start_soon(consume)
        await trio.testing.wait_all_tasks_blocked()
        events.end()
