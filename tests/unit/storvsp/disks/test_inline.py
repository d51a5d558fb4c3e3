"""When writes into the page cache are made on the loop's own thread."""

from __future__ import annotations

import errno
import os
import time

import pytest

from storvsp.disks.inline import (
    ALLOWANCE_PER_BYTE,
    BASE_ALLOWANCE,
    FIRST_PENALTY,
    MAX_PENALTY,
    InlineWrites,
)
from storvsp.disks.raw import RawDisk

SLOW = BASE_ALLOWANCE * 2
MIB = 1 << 20


def refused(gate: InlineWrites) -> int:
    """Count the writes that have to go elsewhere now."""
    count = 0
    while not gate.allowed():
        count += 1
    return count


def test_quick_writes_are_allowed():
    gate = InlineWrites()
    for _ in range(1000):
        assert gate.allowed()
        gate.took(BASE_ALLOWANCE / 2, 4096)


def test_long_writes_may_take_longer():
    gate = InlineWrites()
    gate.took(BASE_ALLOWANCE + MIB * ALLOWANCE_PER_BYTE / 2, MIB)
    assert gate.allowed()


def test_a_slow_write_sends_the_next_ones_elsewhere_and_more_each_time():
    gate = InlineWrites()
    counts = []
    for _ in range(20):
        gate.took(SLOW, 4096)
        counts.append(refused(gate))
    assert counts[:3] == [FIRST_PENALTY, 2 * FIRST_PENALTY, 4 * FIRST_PENALTY]
    assert max(counts) == MAX_PENALTY


def test_a_disk_that_has_become_quick_is_forgiven():
    gate = InlineWrites()
    gate.took(SLOW, 4096)
    gate.took(SLOW, 4096)
    refused(gate)
    for _ in range(2 * FIRST_PENALTY):
        gate.took(0, 4096)
    gate.took(SLOW, 4096)
    assert refused(gate) == FIRST_PENALTY


@pytest.fixture
async def disk(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    found = await RawDisk.open(path)
    # Whatever the temporary directory is made of.
    found._memory = False
    yield found
    await found.aclose()


async def test_a_file_that_cannot_be_asked_is_written_without_asking(disk, monkeypatch):
    flags = []
    write = os.pwritev

    def pwritev(fd, buffers, offset, flag=0):
        flags.append(flag)
        if flag:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    disk._write_flags = os.RWF_NOWAIT
    assert not disk.try_writev(0, [memoryview(b"a" * 4096)])
    assert disk.try_writev(4096, [memoryview(b"b" * 4096)])
    assert flags == [os.RWF_NOWAIT], "one buffer without flags needs no vector"
    assert disk.try_writev(0, [memoryview(b"c" * 1024), memoryview(b"d" * 3072)])
    assert flags == [os.RWF_NOWAIT, 0]
    assert disk.try_writev(0, []), "nothing is written, and that is no error"
    buffer = bytearray(4096)
    await disk.readv(4096, [memoryview(buffer)])
    assert buffer == b"b" * 4096


async def test_a_slow_disk_is_left_to_the_workers(disk, monkeypatch):
    times = iter([0.0, 1.0])
    disk._write_flags = 0
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert disk.try_writev(0, [memoryview(b"a" * 4096)])
    assert not disk.try_writev(0, [memoryview(b"a" * 4096)])


async def test_a_write_that_must_reach_the_disk_waits_for_it_elsewhere(disk):
    assert not disk.try_writev(0, [memoryview(b"a" * 4096)], fua=True)
