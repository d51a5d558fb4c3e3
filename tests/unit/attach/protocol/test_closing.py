"""Descriptors whose last close takes its time, or is never heard of again."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.attach import make_eventfd, make_memfd
from tests.support.leaks import count_fds
from vmbus.attach.protocol import closing
from vmbus.attach.protocol.closing import close_all, close_foreign, closing_backlog, wait_closed

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files that are no eventfds are closed once this is set, and not before."""
    let_go = threading.Event()
    real = closing._close_foreign_now

    def close(fd: int) -> None:
        let_go.wait()
        real(fd)

    monkeypatch.setattr(closing, "_close_foreign_now", close)
    yield let_go
    let_go.set()
    assert wait_closed(20)


def test_what_is_closed_already_is_harmless() -> None:
    fd = make_eventfd()
    close_all([fd, fd])
    close_foreign([fd])
    assert wait_closed(20)


def test_an_eventfd_is_closed_at_once(held: threading.Event) -> None:
    before = len(os.listdir("/proc/self/fd"))
    close_foreign([make_eventfd(), make_eventfd()])
    assert len(os.listdir("/proc/self/fd")) == before
    assert closing_backlog() == 0


def test_nobody_waits_for_the_close_of_anything_else(held: threading.Event) -> None:
    before = len(os.listdir("/proc/self/fd"))
    close_foreign([make_memfd(), socket.socket().detach(), os.dup(2)])
    assert closing_backlog() == 3
    assert len(os.listdir("/proc/self/fd")) == before + 3
    assert not wait_closed(0)
    held.set()
    assert wait_closed(20)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_that_is_held_up_does_not_hold_up_the_next(held: threading.Event) -> None:
    """A thread each, up to a limit; the rest waits its turn and is not forgotten."""
    for _ in range(closing.MAX_THREADS + 3):
        close_foreign([make_memfd()])
    assert closing_backlog() == closing.MAX_THREADS + 3
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("vmbus-close") == closing.MAX_THREADS


@contextlib.contextmanager
def lingering_socket() -> Iterator[int]:
    """A TCP socket whose last close waits: its peer reads nothing, so its end cannot be sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        with listener.accept()[0]:
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    ours.send(bytes(1 << 20))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
            yield ours.detach()


def test_a_lingering_socket_is_closed_without_lingering() -> None:
    with lingering_socket() as fd:
        close_foreign([fd])
        assert wait_closed(60)  # it would linger for an hour


def test_a_lingering_socket_in_the_rest_of_a_connection_is_closed_elsewhere(
    held: threading.Event,
) -> None:
    """What was never received is closed with the connection, unless it is received first."""
    from tests.support.attach import send_raw
    from vmbus.attach.protocol.framing import close_connection

    before = count_fds()
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.setblocking(False)
        fd = make_memfd()
        send_raw(theirs, b"never read", (fd, fd))
        if kind is socket.SOCK_SEQPACKET:
            theirs.send(b"")
        send_raw(theirs, b"nor this", (fd,))
        theirs.close()
        os.close(fd)
        close_connection(ours)
    assert closing_backlog() == 6
    held.set()
    assert count_fds() == before


def test_a_connection_that_never_was_is_closed() -> None:
    from vmbus.attach.protocol.framing import close_connection

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    close_connection(sock)
    assert sock.fileno() == -1


def test_with_too_much_left_to_close_the_connection_itself_waits_its_turn(
    held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.attach import send_raw
    from vmbus.attach.protocol import framing

    monkeypatch.setattr(framing, "MAX_CLOSING", 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    fd = make_memfd()
    for _ in range(5):
        send_raw(theirs, b"x", (fd,))
    os.close(fd)
    framing.close_connection(ours)
    assert closing_backlog() == 3  # two of its descriptors, and itself with the others
    theirs.close()
