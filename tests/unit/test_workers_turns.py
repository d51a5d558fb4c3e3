"""Who owns a call: owners take turns, and one that is gone is given up."""

import threading

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE, until
from vmbus import workers
from vmbus.workers import (
    DEFAULT_THREADS,
    AbandonedError,
    WorkerPool,
    abandon,
    abandoned,
    shared_pool,
    work_for,
)


class Gate:
    """Calls that wait until they are let through, and say in which order they began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.open = threading.Event()

    def block(self, name: str = "blocked") -> str:
        self.begun.append(name)
        assert self.open.wait(PATIENCE)
        return name


def queue_calls(nursery, pool, owner, part, count, function, outcomes=None):
    """Start tasks that each make a call for an owner; the calls are queued in this order."""

    async def task(name):
        work_for(owner, part)
        try:
            result = await pool.run(function, name)
        except AbandonedError as error:
            result = type(error)
        if outcomes is not None:
            outcomes.append(result)

    for number in range(count):
        nursery.start_soon(task, f"{owner}{part}{number}")


async def queued(pool, count):
    await until(lambda: sum(q.waiting for q in pool._threads._queues.values()) == count)


async def test_owners_take_turns_however_much_one_of_them_has_queued():
    pool = WorkerPool(1)
    gate = Gate()
    order: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, gate.block, "first")
        await until(lambda: gate.begun)
        queue_calls(nursery, pool, "busy", "", 200, order.append)
        await queued(pool, 200)
        queue_calls(nursery, pool, "quiet", "", 1, order.append)
        await queued(pool, 201)
        gate.open.set()
    assert order.index("quiet0") <= 1, "not behind the queue of somebody else"
    assert len(order) == 201
    await pool.aclose()


async def test_parts_of_one_owner_take_turns():
    pool = WorkerPool(1)
    gate = Gate()
    order: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, gate.block, "first")
        await until(lambda: gate.begun)
        for part, count in (("a", 4), ("b", 2), ("c", 1)):
            queue_calls(nursery, pool, "x", part, count, order.append)
            await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
    assert [each[1] for each in order] == ["a", "b", "c", "a", "b", "a", "a"]
    await pool.aclose()


async def test_an_owner_whose_calls_hang_leaves_threads_for_others():
    pool = shared_pool()
    hung = Gate()
    async with trio.open_nursery() as nursery:
        queue_calls(nursery, pool, "hung", "", 50, hung.block)
        await until(lambda: len(hung.begun) == DEFAULT_THREADS)
        assert await pool.run(divmod, 17, 5) == (3, 2)
        assert len(hung.begun) == DEFAULT_THREADS
        hung.open.set()
    assert len(hung.begun) == 50
    await pool.aclose()


async def test_the_tasks_of_an_owner_inherit_it():
    pool = WorkerPool(1)
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, gate.block, "first")
        await until(lambda: gate.begun)

        async def task():
            work_for("me", 1)
            async with trio.open_nursery() as inner:
                inner.start_soon(pool.run, abs, 1)

        nursery.start_soon(task)
        await queued(pool, 1)
        assert list(pool._threads._queues) == [None, "me"]
        gate.open.set()
    assert not pool._threads._queues, "nothing is kept of owners without calls"
    assert not pool._threads._ready
    await pool.aclose()


async def test_cancelled_calls_leave_the_queues_in_order():
    pool = WorkerPool(1)
    gate = Gate()
    order: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, gate.block, "first")
        await until(lambda: gate.begun)
        async with trio.open_nursery() as inner:
            queue_calls(inner, pool, "x", "a", 3, order.append)
            queue_calls(inner, pool, "x", "b", 3, order.append)
            queue_calls(inner, pool, "y", "a", 3, order.append)
            await queued(pool, 9)
            queue_calls(nursery, pool, "x", "c", 2, order.append)
            await queued(pool, 11)
            inner.cancel_scope.cancel()
        gate.open.set()
    assert sorted(order) == ["xc0", "xc1"]
    assert not pool._threads._queues
    assert not pool._threads._ready
    await pool.aclose()


async def test_calls_of_an_owner_that_is_gone_are_given_up_and_what_they_use_stays_in_use():
    pool = shared_pool()
    hung = Gate()
    outcomes: list[object] = []
    told: list[int] = []
    async with trio.open_nursery() as nursery:
        queue_calls(nursery, pool, "gone", "", DEFAULT_THREADS + 3, hung.block, outcomes)
        await until(lambda: len(hung.begun) == DEFAULT_THREADS)
        await queued(pool, 3)
        assert abandon("gone") == DEFAULT_THREADS
        assert abandon("gone") == 0
        assert abandon("nobody") == 0
    assert outcomes == [AbandonedError] * (DEFAULT_THREADS + 3)
    assert abandoned("gone") == DEFAULT_THREADS
    assert abandoned("nobody") == 0
    await pool.aclose()  # does not wait for them
    assert abandoned("gone") == DEFAULT_THREADS
    pool.when_back(lambda: told.append(abandoned("gone")))
    other = shared_pool()
    assert await other.run(int) == 0
    assert not told, "the descriptor that they use must stay open"
    hung.open.set()
    await until(lambda: told)
    assert told == [0]
    assert len(hung.begun) == DEFAULT_THREADS, "those that waited never ran"
    await other.aclose()


async def test_what_is_not_in_use_is_free_at_once():
    pool = WorkerPool(1)
    told: list[int] = []
    pool.when_back(lambda: told.append(1))
    assert told == [1]
    await pool.aclose()


async def test_abandoned_calls_cost_no_thread_of_the_others(monkeypatch):
    monkeypatch.setattr(workers, "SHARED_THREADS", 2)
    pool = shared_pool()
    hung = Gate()
    outcomes: list[object] = []
    async with trio.open_nursery() as nursery:
        queue_calls(nursery, pool, "gone", "", 2, hung.block, outcomes)
        await until(lambda: len(hung.begun) == 2)
        abandon("gone")
    assert await pool.run(int) == 0
    hung.open.set()
    await until(lambda: not abandoned("gone"))
    await pool.aclose()


def test_a_call_may_come_back_after_the_end_of_its_run():
    hung = Gate()
    done = threading.Event()

    def block():
        hung.block()
        done.set()

    async def main():
        async with trio.open_nursery() as nursery:
            queue_calls(nursery, WorkerPool(1), "gone", "", 1, lambda _: block())
            await until(lambda: hung.begun)
            abandon("gone")

    trio.run(main)
    threads = [each for each in threading.enumerate() if each.name.startswith("worker")]
    hung.open.set()
    assert done.wait(PATIENCE)
    for thread in threads:
        assert thread.daemon


@pytest.mark.parametrize("fails", [False, True])
async def test_an_abandoned_call_has_one_outcome(fails):
    pool = WorkerPool(1)
    hung = Gate()
    outcomes: list[object] = []

    def block(name):
        hung.block(name)
        if fails:
            raise ValueError(name)

    async with trio.open_nursery() as nursery:
        queue_calls(nursery, pool, "gone", "", 1, block, outcomes)
        await until(lambda: hung.begun)
        abandon("gone")
        hung.open.set()
    assert outcomes == [AbandonedError]
    await until(lambda: not abandoned("gone"))
    assert await pool.run(int) == 0
    await pool.aclose()
