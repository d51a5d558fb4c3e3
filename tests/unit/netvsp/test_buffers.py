"""Receive and send buffers: wherever their pages lie, and however they come back."""

from __future__ import annotations

import os
import random

import pytest

from netvsp.buffers import ReceiveBuffer, SendBuffer
from vmbus.errors import GuestProtocolError
from vmbus.gpadl import Gpadl
from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory, create_memfd
from vmbus.testing.channels import LoneHost
from vmbus.wire.gpa import GpaRange

PAGES = 64


def shuffled(seed: int) -> tuple[int, ...]:
    pfns = list(range(PAGES))
    random.Random(seed).shuffle(pfns)
    return tuple(pfns)


def whole(pfns: tuple[int, ...]) -> GpaRange:
    return GpaRange(len(pfns) * PAGE_SIZE, 0, pfns)


LAYOUTS = {
    "contiguous": (whole(tuple(range(8, 56))),),
    "scattered": (whole(shuffled(1)[:48]),),
    "backwards": (whole(tuple(reversed(range(48)))),),
    "inside-pages": (GpaRange(40 * PAGE_SIZE, 0x123, tuple(range(10, 51))),),
    "inside-scattered-pages": (GpaRange(40 * PAGE_SIZE + 5, 4095, shuffled(2)[:42]),),
    "several-ranges": (
        GpaRange(5 * PAGE_SIZE + 7, 100, tuple(range(6))),
        GpaRange(3, 4093, (63,)),
        whole((40, 30, 20)),
        GpaRange(
            30 * PAGE_SIZE - 10,
            0,
            tuple(each for each in shuffled(3) if each not in {*range(6), 63, 40, 30, 20})[:30],
        ),
    ),
}


class Place:
    """Guest memory, and a GPADL in it."""

    def __init__(self, ranges: tuple[GpaRange, ...], memory: GuestMemory | None = None) -> None:
        self.memory = memory or allocate_memory(PAGES * PAGE_SIZE)
        self.host = LoneHost(self.memory)
        self.gpadl = self.host.gpadls[1] = Gpadl(1, ranges)

    def send_buffer(self, part_size: int) -> SendBuffer:
        return SendBuffer(self.host.lease_gpadl(1), self.memory, part_size)

    def receive_buffer(self, part_size: int) -> ReceiveBuffer:
        return ReceiveBuffer(self.host.lease_gpadl(1), self.memory, part_size)

    def contents(self) -> bytes:
        return b"".join(self.gpadl.views(self.memory))

    def fill(self, data: bytes) -> None:
        for view in self.gpadl.views(self.memory):
            view[:] = data[: len(view)]
            data = data[len(view) :]


@pytest.fixture(params=LAYOUTS.values(), ids=list(LAYOUTS))
def place(request) -> Place:
    return Place(request.param)


@pytest.mark.parametrize("size", [512, 2048, 6144, 12288])
async def test_parts_are_read_where_the_guest_wrote_them(place, size):
    data = random.Random(size).randbytes(place.gpadl.size)
    place.fill(data)
    buffer = place.send_buffer(size)
    assert buffer.size == place.gpadl.size
    assert buffer.count == buffer.size // size
    for index in range(buffer.count):
        start = index * size
        for length in (0, 1, size // 2 + 1, size):
            assert buffer.read_untrusted(index, length) == data[start : start + length]
    buffer.release()
    assert len(place.host.leases) == 0


@pytest.mark.parametrize("size", [512, 2048, 6144, 12288])
async def test_parts_are_written_and_nothing_beside_them(place, size):
    place.fill(b"\xa5" * place.gpadl.size)
    buffer = place.receive_buffer(size)
    wanted = bytearray(b"\xa5" * place.gpadl.size)
    order = list(range(buffer.count))
    random.Random(size).shuffle(order)
    for index in order:
        for length in (size, size // 2 + 1, 1, 0):
            data = random.Random(index).randbytes(length)
            buffer.write(index, data)
            wanted[index * size : index * size + length] = data
    assert place.contents() == wanted
    buffer.release()


async def test_parts_in_pages_of_their_own_are_one_piece():
    """A part of half a page is never in two, so that writing it is one copy."""
    place = Place(LAYOUTS["scattered"])
    buffer = place.receive_buffer(2048)
    assert all(len(buffer.part(index)) == 1 for index in range(buffer.count))
    assert buffer.part(3) is buffer.part(3), "views are made once"
    buffer.release()


async def test_all_parts_are_free_and_the_first_one_goes_first():
    buffer = Place(LAYOUTS["contiguous"]).receive_buffer(2048)
    assert sorted(buffer.free) == list(range(96))
    assert buffer.free[-1] == 0
    buffer.release()


async def test_a_part_has_its_views_when_it_is_used_first():
    """Thousands of views, most of them never used, would be megabytes for an idle adapter."""
    buffer = Place(LAYOUTS["contiguous"]).receive_buffer(2048)
    assert not buffer.parts
    buffer.write(7, b"x")
    assert list(buffer.parts) == [7]
    buffer.release()


async def test_the_guest_gets_its_pages_when_we_give_them_up(place):
    buffer = place.send_buffer(2048)
    views = [*buffer.part(0), *buffer.part(buffer.count - 1)]
    assert len(place.host.leases) == 1
    buffer.release()
    buffer.release()
    assert buffer.gone
    assert len(place.host.leases) == 0
    assert place.host.torn_down == []
    place.host.leases.tear_down(0, 1)
    assert place.host.torn_down == [1]
    for view in views:
        with pytest.raises(ValueError, match="released"):
            view[0]


async def test_the_guest_gets_its_pages_when_it_asks_for_them(place):
    buffer = place.receive_buffer(2048)
    (view, *_rest) = buffer.part(5)
    place.host.leases.tear_down(0, 1)
    assert buffer.gone
    assert place.host.torn_down == [1]
    with pytest.raises(ValueError, match="released"):
        view[0]
    buffer.release()
    assert place.host.torn_down == [1], "once"
    assert len(place.host.leases) == 0


async def test_a_buffer_that_is_taken_back_holds_no_memory():
    place = Place(LAYOUTS["several-ranges"])
    buffer = place.receive_buffer(2048)
    for index in range(buffer.count):
        buffer.write(index, b"x" * 2048)
    place.host.leases.tear_down(0, 1)
    place.memory.close()
    assert place.memory.drained()


async def test_two_buffers_of_the_same_pages_go_one_after_the_other():
    place = Place(LAYOUTS["contiguous"])
    first, second = place.send_buffer(6144), place.receive_buffer(2048)
    first.release()
    place.host.leases.tear_down(0, 1)
    assert second.gone
    assert place.host.torn_down == [1]


@pytest.mark.parametrize("pfns", [(1, 2, PAGES), (PAGES + 5,), (0, 1 << 51), (1 << 60,)])
async def test_pages_that_are_no_memory_are_refused(pfns):
    place = Place((whole(pfns),))
    lease = place.host.lease_gpadl(1)
    with pytest.raises(GuestProtocolError, match="is not memory"):
        SendBuffer(lease, place.memory, 512)
    assert lease.held, "it is still the caller's"


async def test_pages_that_may_not_be_written_are_refused():
    memory = allocate_memory(PAGES * PAGE_SIZE)
    rom = create_memfd("rom", PAGE_SIZE)
    memory.add_region(PAGES * PAGE_SIZE, PAGE_SIZE, rom, read_only=True)
    os.close(rom)
    place = Place((whole((1, PAGES)),), memory)
    with pytest.raises(GuestProtocolError, match="read-only"):
        place.receive_buffer(512)


async def test_pages_that_go_away_are_no_memory_any_more():
    place = Place(LAYOUTS["contiguous"])
    buffer = place.receive_buffer(2048)
    buffer.write(0, b"there")
    place.memory.remove_region(0, PAGES * PAGE_SIZE)
    with pytest.raises(GuestProtocolError):
        buffer.write(1, b"gone")
    buffer.release()
    assert place.memory.drained()
