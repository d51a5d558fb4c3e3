"""The guest memory that a VMM brings: its descriptors, its regions, and their end."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from tests.support.attach import (
    INFO,
    RAM_SIZE,
    TABLE,
    Bus,
    make_eventfd,
    make_memfd,
    raw_vmm,
    running_server,
)
from tests.support.descriptors import (
    o_path,
    pipe_end,
    read_only_memfd,
    regular_file,
    write_sealed_memfd,
)
from tests.support.leaks import count_fds
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import MemoryRegion, RemMem, SetMemTable
from vmbus.errors import ConfigError
from vmbus.partition.events import MemoryRemoval

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (pipe_end, errno.EINVAL),
        (make_eventfd, errno.EINVAL),
        (o_path, errno.EINVAL),
        (regular_file, errno.EPERM),
        (lambda: make_memfd(seal=False), errno.EPERM),
        (lambda: make_memfd(RAM_SIZE // 2), errno.EINVAL),
        (read_only_memfd, errno.EACCES),
        (write_sealed_memfd, errno.EPERM),
    ],
)
async def test_a_descriptor_that_is_not_what_it_claims_is_refused(
    tmp_path: Path, make: Any, code: int
) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            fd = make()
            try:
                before = count_fds()
                got, text = await vmm.refused(Number.SET_MEM_TABLE, TABLE.encode(), fds=(fd,))
                assert (got, count_fds()) == (code, before), text
            finally:
                os.close(fd)


async def test_a_trusted_vmm_may_bring_files_that_shrink(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, trust_vmm=True) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            fd = make_memfd(seal=False)
            region = MemoryRegion(1 << 32, RAM_SIZE, 0, 0, 0).encode()
            await vmm.ok(Number.ADD_MEM, region, fds=(fd,))
            os.close(fd)
            assert bus.transport.memory.size == 2 * RAM_SIZE


@pytest.mark.parametrize(
    ("table", "nfds"),
    [
        (SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 1),)), 1),
        (SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),)), 2),
        (SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),)), 0),
    ],
)
async def test_descriptors_and_regions_must_match(
    tmp_path: Path, table: SetMemTable, nfds: int
) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            fd = make_memfd()
            code, _ = await vmm.refused(Number.SET_MEM_TABLE, table.encode(), fds=(fd,) * nfds)
            os.close(fd)
            assert code == errno.EINVAL


async def test_memory_is_added_and_taken_away_once_nobody_uses_it(tmp_path: Path) -> None:
    bus = Bus()
    bus.auto = False
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            fd = make_memfd()
            region = MemoryRegion(1 << 32, RAM_SIZE, 0, MemoryRegion.READ_ONLY, 0)
            await vmm.ok(Number.ADD_MEM, region.encode(), fds=(fd,))
            assert memory.contains(1 << 32, RAM_SIZE)
            assert not memory.contains(1 << 32, RAM_SIZE, write=True)
            code, _ = await vmm.refused(Number.ADD_MEM, region.encode(), fds=(fd,))
            assert code == errno.EEXIST
            odd = MemoryRegion(1 << 33, RAM_SIZE, 0, 0, 1)
            assert (await vmm.refused(Number.ADD_MEM, odd.encode(), fds=(fd,)))[0] == errno.EINVAL
            os.close(fd)
            for gpa, size in ((1 << 33, RAM_SIZE), (1 << 32, 4096)):
                code, _ = await vmm.refused(Number.REM_MEM, RemMem(gpa, size).encode())
                assert code == errno.ENOENT
            held = memory.views(1 << 32, 16)
            seq = await vmm.send(Number.REM_MEM, RemMem(1 << 32, RAM_SIZE).encode())
            await bus.wait_events(1)
            event = bus.events[0]
            assert isinstance(event, MemoryRemoval)
            assert (event.gpa, event.size) == (1 << 32, RAM_SIZE)
            assert not memory.contains(1 << 32, 1)
            assert (await vmm.refused(Number.REM_MEM, RemMem(0, RAM_SIZE).encode()))[
                0
            ] == errno.EBUSY
            event.done()
            held.clear()
            await vmm.expect_answer(Number.REM_MEM, seq)


async def test_memory_that_stays_in_use_is_told_to_the_vmm(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            held = bus.transport.memory.views(0, 16)
            code, _ = await vmm.refused(Number.REM_MEM, RemMem(0, RAM_SIZE).encode())
            assert code == errno.EBUSY
            assert not bus.transport.memory.contains(0, 1)
            held.clear()


async def test_a_new_table_replaces_the_old_one_and_keeps_what_stays(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            ring = memory.views(0, 16)
            more = make_memfd()
            both = SetMemTable(
                (
                    MemoryRegion(1 << 32, RAM_SIZE, 0, 0, 1),
                    MemoryRegion(0, RAM_SIZE, 0, 0, 0),
                )
            )
            await vmm.ok(Number.SET_MEM_TABLE, both.encode(), fds=(vmm.memfd, more))
            assert memory.size == 2 * RAM_SIZE
            ring[0][:4] = b"ring"
            assert memory.read(0, 4) == b"ring"
            # Refused as a whole: nothing changes.
            code, _ = await vmm.refused(
                Number.SET_MEM_TABLE,
                SetMemTable(
                    (MemoryRegion(0, RAM_SIZE, 0, 0, 0), MemoryRegion(1 << 33, 1 << 40, 0, 0, 1))
                ).encode(),
                fds=(more, vmm.memfd),
            )
            assert code == errno.EINVAL
            assert memory.size == 2 * RAM_SIZE
            assert memory.read(0, 4) == b"ring"
            ring.clear()
            await vmm.ok(
                Number.SET_MEM_TABLE,
                SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),)).encode(),
                fds=(more,),
            )
            os.close(more)
            assert [type(event) for event in bus.events] == [MemoryRemoval, MemoryRemoval]
            assert memory.read(0, 4) == bytes(4)


async def test_a_failed_change_of_the_table_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel said yes to the trial and no to the real mapping."""
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            real = type(memory).add_region

            def add_region(self: Any, *arguments: Any, **options: Any) -> Any:
                if self is memory:
                    raise ConfigError("no more mappings")
                return real(self, *arguments, **options)

            monkeypatch.setattr(type(memory), "add_region", add_region)
            more = make_memfd()
            await vmm.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(more,))
            os.close(more)
            assert await vmm.receive() is None
