"""Corners of a link that no well-formed peer reaches."""

from __future__ import annotations

import socket

import trio

from tests.support.attach import make_eventfd
from tests.support.leaks import count_fds
from tests.support.patience import PATIENCE
from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.messages import MessageSpec, Number, State
from vmbus.attach.server import ServerLimits
from vmbus.attach.server.link import Link, check_frame
from vmbus.errors import PeerProtocolError


class Silent:
    """A session that does nothing."""

    state = State.ATTACHED

    def __init__(self) -> None:
        self.requests: list[int] = []

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        self.requests.append(spec.number)

    def check(self, spec: MessageSpec, frame: Frame) -> None:
        check_frame(spec, self.state, frame)

    def dropped(self, kind: int, error: PeerProtocolError) -> None:
        raise AssertionError


def make_link() -> tuple[Link, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(ours, Silent(), ServerLimits()), theirs


async def test_a_link_that_failed_before_it_ran_is_over() -> None:
    before = count_fds(collect=True)
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
    with trio.fail_after(PATIENCE):
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
    link._questions._next_seq = 0xFFFFFFFF
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
