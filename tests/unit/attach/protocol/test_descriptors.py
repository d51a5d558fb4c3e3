"""Descriptors that are not what a message says of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from tests.support.attach import make_eventfd, make_memfd
from tests.support.descriptors import o_path, pipe_end, regular_file
from vmbus.attach.protocol.descriptors import (
    check_eventfd_untrusted,
    check_memory_untrusted,
    map_region_untrusted,
)
from vmbus.attach.protocol.to_server import MemoryRegion
from vmbus.errors import PeerProtocolError
from vmbus.memory import GuestMemory

REGION = MemoryRegion(0, 4096, 0, 0, 0)


@pytest.mark.parametrize("check", [check_eventfd_untrusted, None])
def test_a_descriptor_that_cannot_be_examined_is_refused(check: object) -> None:
    with pytest.raises(PeerProtocolError, match="examined") as caught:
        if check is None:
            check_memory_untrusted(1 << 20, REGION, trusted=False)
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


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (regular_file, errno.EPERM),
        (lambda: os.open("/", os.O_RDONLY), errno.EPERM),
        (pipe_end, errno.EINVAL),
        (make_eventfd, errno.EINVAL),
        (o_path, errno.EINVAL),
        (lambda: make_memfd(seal=False), errno.EPERM),
    ],
)
def test_no_file_system_is_asked_about_what_is_no_sealed_memfd(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], int], code: int
) -> None:
    """It may be the peer's own, and never answer: fstat on a FUSE file waits for ever."""
    fd = make()
    asked: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(PeerProtocolError) as caught:
        patch.setattr(os, "fstat", asked.append)
        check_memory_untrusted(fd, REGION, trusted=False)
    assert fd not in asked
    assert caught.value.errno == code
    os.close(fd)


def test_a_trusted_vmm_may_bring_any_file_but_not_just_a_path_to_one() -> None:
    fd = o_path()
    with pytest.raises(PeerProtocolError, match="O_PATH"):
        check_memory_untrusted(fd, REGION, trusted=True)
    os.close(fd)
    fd = os.open("/", os.O_RDONLY)
    with pytest.raises(PeerProtocolError, match="must be a memfd"):
        check_memory_untrusted(fd, REGION, trusted=True)
    os.close(fd)
