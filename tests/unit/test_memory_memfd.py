"""Sealed memfds and guest memory made of them."""

from __future__ import annotations

import fcntl
import os

import pytest

import vmbus.memory
from tests.support.leaks import count_fds
from vmbus.errors import ConfigError
from vmbus.memory import allocate_memory, create_memfd, is_sealed


def test_a_memfd_can_neither_shrink_nor_grow():
    fd = create_memfd("test", 8192)
    try:
        assert os.fstat(fd).st_size == 8192
        assert is_sealed(fd)
        for size in (4096, 12288):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, -4096, 1, 4097])
def test_memory_comes_in_whole_pages(size):
    with pytest.raises(ConfigError):
        create_memfd("test", size)


def test_memory_begins_at_zero_and_has_no_gaps():
    before = count_fds(collect=True)
    memory = allocate_memory(4096, 8192)
    assert [(region.gpa, region.size) for region in memory.regions] == [(0, 4096), (4096, 8192)]
    memory.write(4090, bytes(range(12)))
    assert memory.read(4090, 12) == bytes(range(12))
    memory.close()
    assert count_fds() == before


def test_a_memfd_that_cannot_be_sealed_is_not_left_open(monkeypatch):
    def refuse(*_args: int) -> int:
        raise PermissionError

    before = count_fds(collect=True)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(PermissionError):
        vmbus.memory.create_memfd("test", 4096)
    assert count_fds() == before


def test_half_made_memory_is_given_back():
    before = count_fds(collect=True)
    with pytest.raises(ConfigError):
        allocate_memory(4096, 5)
    assert count_fds() == before
