"""The eventfd behind a doorbell: it rings once or often, and its number is not used any more."""

from __future__ import annotations

import gc
import os

import pytest
import trio
import trio.testing

from vmbus.partition.doorbell import EventfdDoorbell


async def test_rings_are_counted_and_never_block():
    doorbell = EventfdDoorbell()
    doorbell.ring()
    doorbell.ring()
    assert os.eventfd_read(doorbell.fd) == 2
    os.eventfd_write(doorbell.fd, (1 << 64) - 2)
    doorbell.ring()
    assert os.eventfd_read(doorbell.fd) == (1 << 64) - 2
    doorbell.close()


async def test_a_closed_doorbell_rings_nobody_elses_descriptor():
    doorbell = EventfdDoorbell()
    number = doorbell.fd
    doorbell.close()
    doorbell.close()
    assert doorbell.fd == -1
    other = os.eventfd(0, os.EFD_NONBLOCK)
    assert other == number, "the system gives out the lowest free number"
    doorbell.ring()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


async def test_closing_wakes_who_waits():
    doorbell = EventfdDoorbell()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(doorbell.fd)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        doorbell.close()


async def test_one_that_is_forgotten_leaks_no_descriptor():
    doorbell = EventfdDoorbell()
    number = doorbell.fd
    del doorbell
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
