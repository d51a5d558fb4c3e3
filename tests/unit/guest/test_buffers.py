"""The data buffers of the Python guest's drivers."""

from __future__ import annotations

import struct

import pytest

from tests.support.fake_host import Machine
from vmbus.guest.buffers import BufferPool
from vmbus.guest.ram import Ram


def test_buffers_are_reused_by_size():
    pool = BufferPool(Ram(Machine(pages=64)), contiguous=False)
    first = pool.take(5000)
    assert first.pages == 2
    first.write(4000, b"across pages" * 20)
    assert first.read(4000, 240) == b"across pages" * 20
    first.release()
    assert pool.take(8192) is first
    assert pool.take(8192) is not first
    assert pool.take(1).pages == 1


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_header_names_the_pages_that_hold_the_data(contiguous):
    ram = Ram(Machine(pages=64))
    buffer = BufferPool(ram, contiguous=contiguous).take(4 * 4096)
    buffer.write(4090, b"0123456789")
    header = buffer.header(4090, 10)
    assert struct.unpack_from("<IIII", header) == (0, 1, 10, 4090)
    first, second = struct.unpack_from("<2Q", header, 16)
    assert len(header) == 16 + 2 * 8
    assert bytes(ram.page(first)[4090:]) + bytes(ram.page(second)[:4]) == b"0123456789"
    assert len(buffer.header(0, 4 * 4096)) == 16 + 4 * 8


def test_a_range_may_begin_on_any_page_and_be_empty():
    buffer = BufferPool(Ram(Machine(pages=64)), contiguous=False).take(4 * 4096)
    numbers = struct.unpack("<4Q", buffer.range_at(0, 4 * 4096)[8:])
    assert len(set(numbers)) == 4
    assert buffer.range_at(2 * 4096 + 100, 4096) == struct.pack("<II2Q", 4096, 100, *numbers[2:])
    assert buffer.range_at(4096, 0) == struct.pack("<II", 0, 0)
    assert buffer.range_at(4096 + 8, 0) == struct.pack("<IIQ", 0, 8, numbers[1])


def test_a_buffer_that_the_ram_has_no_room_for_is_refused_and_costs_nothing():
    ram = Ram(Machine(pages=8))
    pool = BufferPool(ram, contiguous=False)
    free = ram.free_pages
    with pytest.raises(MemoryError):
        pool.take(9 * 4096)
    assert ram.free_pages == free
    assert pool.take(8 * 4096).pages == 8
