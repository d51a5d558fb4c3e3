"""Descriptors that are not what a message says of them."""

from __future__ import annotations

import errno
import os

import pytest

from tests.support.attach import make_memfd
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
