"""The machine without processors."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.patience import waits
from vmbus.guest import Interrupt
from vmbus.partition.soft_machine import SoftMachine
from vmbus.synic import Features
from vmbus.wire.synic import Msr


@pytest.fixture
async def machine() -> AsyncIterator[SoftMachine]:
    made = SoftMachine(((0, 32 << 20), (1 << 32, 1 << 20)), vp_count=2)
    yield made
    made.close()
    made.close()


async def test_ram_is_where_it_was_asked_for(machine):
    assert [(region.gpa, region.size) for region in machine.regions] == [
        (0, 32 << 20),
        (1 << 32, 1 << 20),
    ]
    view = machine.view((1 << 32) + 8, 4)
    view[:] = b"data"
    assert machine.memory.read((1 << 32) + 8, 4) == b"data"
    for gpa, size in ((32 << 20, 1), ((32 << 20) - 1, 2), (1 << 40, 1)):
        with pytest.raises(ValueError, match="memory"):
            machine.view(gpa, size)


async def test_it_says_that_it_is_a_hypervisor(machine):
    assert machine.cpuid(1)[2] >> 31
    assert machine.cpuid(0x40000000)[1:] == (0x7263694D, 0x666F736F, 0x76482074)
    assert machine.cpuid(0x12345678) == (0, 0, 0, 0)


async def test_unknown_msrs_fault_and_known_ones_are_reported(machine):
    written: list[tuple[int, int]] = []
    machine.msr_written = lambda vp, index: written.append((vp, index))
    machine.write_msr(1, Msr.SIMP, 0x5001)
    assert machine.read_msr(1, Msr.SIMP) == 0x5001
    assert written == [(1, Msr.SIMP)]
    with pytest.raises(ValueError, match=r"."):
        machine.read_msr(0, 0x1234)
    with pytest.raises(ValueError, match=r"."):
        machine.write_msr(0, 0x1234, 0)
    assert written == [(1, Msr.SIMP)]


async def test_the_clock_runs_unless_it_is_not_wanted(machine):
    first = machine.read_msr(0, Msr.TIME_REF_COUNT)
    while machine.read_msr(0, Msr.TIME_REF_COUNT) == first:
        await trio.sleep(0)
    bare = SoftMachine(((0, 1 << 20),), features=Features())
    with pytest.raises(ValueError, match=r"."):
        bare.read_msr(0, Msr.TIME_REF_COUNT)
    bare.close()


async def test_interrupts_are_pending_once_and_come_from_any_thread(machine):
    machine.interrupt(0, 7)
    machine.interrupt(0, 7)
    await trio.to_thread.run_sync(machine.interrupt, 1, 8)
    await trio.testing.wait_all_tasks_blocked()
    assert await machine.wait_interrupt() == {Interrupt(0, 7), Interrupt(1, 8)}
    async with trio.open_nursery() as nursery:
        seen: list[Any] = []

        @nursery.start_soon
        async def wait() -> None:
            seen.append(await machine.wait_interrupt())

        await trio.testing.wait_all_tasks_blocked()
        machine.interrupt(0, 9)
    assert seen == [{Interrupt(0, 9)}]
    machine.interrupt(0, 9)
    machine.reset()
    assert await waits(machine.wait_interrupt)


def test_a_machine_outlives_its_loop():
    machine: Any = None

    async def make() -> None:
        nonlocal machine
        machine = SoftMachine(((0, 1 << 20),))

    trio.run(make)
    thread = threading.Thread(target=machine.interrupt, args=(0, 1))
    thread.start()
    thread.join()
    machine.close()
