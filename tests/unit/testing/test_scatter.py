"""Guest memory in pieces, with guards around each of them."""

import pytest

from vmbus.testing.scatter import GuestPages, shapes


def test_guest_pages_notice_stray_writes():
    pages = GuestPages.holding(b"abcdef", [1, 0, 5])
    assert pages.contents() == b"abcdef"
    assert pages.guards_are_whole()
    buffer = pages.buffers[1]
    memory = buffer.obj
    assert isinstance(memory, bytearray)
    for position in (0, 16, len(memory) - 1):
        if memory[position] == 0xA5:
            memory[position] = 0
            assert not pages.guards_are_whole()
            memory[position] = 0xA5


@pytest.mark.parametrize("length", [512, 1024, 4096, 65536])
def test_shapes_cover_the_length(length):
    for lengths in shapes(length):
        assert sum(lengths) == length
