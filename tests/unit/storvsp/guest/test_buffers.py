"""Buffers that are used again."""

from __future__ import annotations

from storvsp.guest.buffers import BufferPool
from tests.support.fake_host import Machine
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
