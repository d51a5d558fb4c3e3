"""The worker pool: what started is waited for, what was cancelled never begins."""

import subprocess
import sys
import threading
import weakref

import pytest
import trio

from tests.support.patience import PATIENCE
from vmbus.workers import WorkerPool, shared_pool


class Gate:
    """Blocking calls that say they have begun and wait to be let through."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        self.calls = 0

    def block(self):
        self.calls += 1
        self.begun.release()
        assert self.open.wait(PATIENCE)
        return "done"

    async def wait_begun(self):
        await trio.to_thread.run_sync(self.begun.acquire)


async def test_a_call_gets_its_arguments_and_its_result_comes_back():
    pool = WorkerPool()
    assert await pool.run(divmod, 17, 5) == (3, 2)
    assert await pool.run(threading.get_ident) != threading.get_ident()
    await pool.aclose()


@pytest.mark.parametrize("error", [ValueError, OSError, SystemExit])
async def test_what_a_call_raises_comes_back_and_the_thread_lives_on(error):
    pool = WorkerPool(1)

    def fail():
        raise error("text")

    for _ in range(2):
        with pytest.raises(error, match="text"):
            await pool.run(fail)
    assert await pool.run(int) == 0
    await pool.aclose()


async def test_calls_run_side_by_side_in_as_many_threads_as_allowed_and_no_more():
    pool = WorkerPool(3)
    meet = threading.Barrier(3, timeout=PATIENCE)
    names = set()

    def call():
        names.add(threading.current_thread().name)
        meet.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(pool.run, call)
    assert names == {"worker 1", "worker 2", "worker 3"}
    await pool.aclose()


async def test_idle_threads_are_used_again_before_new_ones_are_started():
    pool = WorkerPool(4)
    names = {await pool.run(lambda: threading.current_thread().name)}
    while pool._threads._idle == 0:
        await trio.lowlevel.checkpoint()
    names.add(await pool.run(lambda: threading.current_thread().name))
    assert len(names) == 1
    await pool.aclose()


async def test_a_call_that_was_cancelled_before_it_started_never_runs():
    pool = WorkerPool(1)
    gate, never = Gate(), Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, gate.block)
        await gate.wait_begun()
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.run(never.block)
        assert scope.cancelled_caught
        async with trio.open_nursery() as inner:
            inner.start_soon(pool.run, never.block)
            await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        gate.open.set()
    assert await pool.run(int) == 0
    assert never.calls == 0
    await pool.aclose()


async def test_a_started_call_is_waited_for_and_its_result_kept_when_the_task_is_cancelled():
    pool = WorkerPool()
    gate = Gate()
    results = []

    async def task():
        results.append(await pool.run(gate.block))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        await gate.wait_begun()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            assert results == []
        gate.open.set()
    assert results == ["done"]
    await pool.aclose()


async def test_calls_that_end_while_the_loop_is_busy_come_back_in_one_batch():
    pool = WorkerPool(2)
    gate = Gate()
    wakeups = 0
    token = pool._threads._token

    class CountingToken:
        def run_sync_soon(self, function):
            nonlocal wakeups
            wakeups += 1
            token.run_sync_soon(function)

    pool._threads._token = CountingToken()  # type: ignore[assignment]
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(pool.run, gate.block)
        await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
        for _ in range(40):  # without a checkpoint: the loop is busy
            assert gate.begun.acquire(timeout=PATIENCE)
    # All had begun before the loop came back: at most one more wake-up for each thread's last.
    assert 1 <= wakeups <= 3
    await pool.aclose()


async def test_an_idle_pool_keeps_nothing_of_a_call_alive():
    class Page:
        pass

    pool = WorkerPool(1)
    page = Page()
    watch = weakref.ref(page)
    await pool.run(id, page)
    await pool.run(int)
    del page
    assert watch() is None
    await pool.aclose()


async def test_closing_waits_for_started_and_queued_calls_even_if_cancelled():
    pool = WorkerPool(1)
    gate = Gate()
    ended = []

    async def call(name):
        await pool.run(gate.block)
        ended.append(name)

    async def close():
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.aclose()
        ended.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, "first")
        await gate.wait_begun()
        nursery.start_soon(call, "second")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        with pytest.raises(trio.ClosedResourceError):
            await pool.run(int)
        gate.open.set()
    assert set(ended[:2]) <= {"first", "second", "closed"}
    assert len(ended) == 3
    assert ended.index("closed") > 0
    await pool.aclose()


async def test_closing_ends_the_threads():
    pool = WorkerPool(2)
    thread = await pool.run(threading.current_thread)
    await pool.aclose()
    await pool.aclose()
    thread.join(PATIENCE)
    assert not thread.is_alive()


async def test_a_pool_needs_a_thread():
    with pytest.raises(ValueError, match="at least one"):
        WorkerPool(0)


async def test_without_a_single_thread_a_call_fails_at_once(monkeypatch):
    pool = WorkerPool(2)

    def no_more(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(BlockingIOError, match="no worker thread"):
            await pool.run(int)
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, gate.block)
        await gate.wait_begun()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            nursery.start_soon(pool.run, gate.block)  # waits for the thread there is
            await trio.testing.wait_all_tasks_blocked()
        gate.open.set()
    assert gate.calls == 2
    await pool.aclose()


def test_threads_do_not_keep_the_interpreter_alive():
    program = (
        "import trio\n"
        "from vmbus.workers import WorkerPool\n"
        "async def main():\n"
        "    await WorkerPool().run(int)\n"
        "    print('ended', flush=True)\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == ("ended\n", 0)


async def test_leases_of_one_run_share_the_threads_until_the_last_is_closed():
    first, second = shared_pool(), shared_pool()
    thread = await first.run(threading.current_thread)
    await first.aclose()
    await first.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await first.run(int)
    assert await second.run(int) == 0
    assert thread.is_alive()
    await second.aclose()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    third = shared_pool()
    assert await third.run(int) == 0
    await third.aclose()


async def test_closing_a_lease_waits_for_its_own_calls_only():
    mine, other = shared_pool(), shared_pool()
    my_gate, other_gate = Gate(), Gate()
    events = []

    async def close():
        await mine.aclose()
        events.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.run, other_gate.block)
        nursery.start_soon(mine.run, my_gate.block)
        await my_gate.wait_begun()
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert events == []
        my_gate.open.set()
        while not events:
            await trio.sleep(0)
        other_gate.open.set()
    await other.aclose()


def test_runs_do_not_share_threads():
    async def main():
        lease = shared_pool()
        thread = await lease.run(threading.current_thread)
        await lease.aclose()
        return thread

    assert trio.run(main) is not trio.run(main)
