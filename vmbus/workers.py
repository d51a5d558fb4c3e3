"""Worker threads for blocking calls, at a price a disk can afford.

``trio.to_thread.run_sync`` costs about 40 us per call, most of it for waking the loop once per
call. Here a few long-lived threads pull calls from one deque, and the results of all calls that
end before the loop gets round to them come back together: one wake-up per batch.

Rules of the pool
-----------------
* **A call that has started is never abandoned.** Its buffers are guest memory: if the awaiting
  task were allowed to leave, the guest could reuse the pages while a thread is still writing
  them. A cancelled task therefore waits for its started call and gets its result; a call that has
  not started is taken off the queue and never runs.
* Threads are started when there is work for them, and never keep the interpreter alive.
* A pool belongs to the trio run it was made in. :func:`shared_pool` gives every disk of one run
  the same threads; each user holds a lease of its own and closes that.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar, TypeVarTuple, cast

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DEFAULT_THREADS = 4


class _Call(Generic[T]):
    """One call: what to do, who waits for it, and how it ended."""

    __slots__ = ("error", "task", "value", "work")

    def __init__(self, work: Callable[[], T], task: trio.lowlevel.Task) -> None:
        self.work: Callable[[], T] | None = work
        self.task = task
        self.value: T | None = None
        self.error: BaseException | None = None


class _Gate:
    """Counts the calls under way, so that closing can refuse new ones and wait for the rest."""

    __slots__ = ("_active", "_idle", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._active = 0
        self._idle = trio.Event()

    def enter(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("the worker pool is closed")
        self._active += 1

    def leave(self) -> None:
        self._active -= 1
        if self.closed and not self._active:
            self._idle.set()

    async def close(self) -> None:
        """Refuse new calls and wait for those under way, even if the caller is cancelled."""
        self.closed = True
        if self._active:
            # Shielded: the caller is about to close what the threads are still using.
            with trio.CancelScope(shield=True):
                await self._idle.wait()
        else:
            self._idle.set()


class WorkerPool:
    """A few threads that run blocking calls for the tasks of one trio run.

    Must be made inside that run.

    Args:
        threads: Most threads to use; they are started as they are needed.
        name: Prefix of the threads' names, for debuggers.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, *, name: str = "disk worker") -> None:
        if threads < 1:
            raise ValueError("a worker pool needs at least one thread")
        self._name = name
        self._limit = threads
        self._started = 0
        self._idle = 0
        self._stopping = False
        self._wake = threading.Condition(threading.Lock())  # guards everything here but _gate
        self._waiting: deque[_Call[object]] = deque()
        self._finished: list[_Call[object]] = []
        self._token = trio.lowlevel.current_trio_token()
        self._gate = _Gate()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run ``function(*args)`` in a worker and return what it returns. A checkpoint.

        If the awaiting task is cancelled before a worker took the call, the call never runs and
        Cancelled is raised; afterwards the call's own outcome is delivered instead.

        Raises:
            trio.ClosedResourceError: The pool is closed.
            OSError: Not one worker thread could be started (EAGAIN).
            BaseException: Whatever the call raised.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        call = _Call(lambda: function(*args), trio.lowlevel.current_task())
        self._gate.enter()
        try:
            self._submit(cast("_Call[object]", call))

            def abort(_: object) -> trio.lowlevel.Abort:
                with self._wake:
                    try:
                        self._waiting.remove(cast("_Call[object]", call))
                    except ValueError:
                        return trio.lowlevel.Abort.FAILED
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            self._gate.leave()
        if call.error is not None:
            try:
                raise call.error
            finally:
                del call  # break the cycle traceback -> frame -> call -> error
        return cast("T", call.value)

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way, end the threads.

        Idempotent. Waits even if cancelled: see the module text.
        """
        await self._gate.close()
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def _submit(self, call: _Call[object]) -> None:
        with self._wake:
            if self._started < self._limit and self._idle <= len(self._waiting):
                self._start_thread()
            self._waiting.append(call)
            self._wake.notify()

    def _start_thread(self) -> None:
        number = self._started + 1
        thread = threading.Thread(target=self._work, name=f"{self._name} {number}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads
            if not self._started:
                raise OSError(errno.EAGAIN, "no worker thread could be started") from error
        else:
            self._started = number

    def _work(self) -> None:
        """The life of one thread."""
        while True:
            with self._wake:
                while not self._waiting:
                    if self._stopping:
                        return
                    self._idle += 1
                    self._wake.wait()
                    self._idle -= 1
                call = self._waiting.popleft()
            work, call.work = call.work, None
            assert work is not None
            try:
                call.value = work()
            except BaseException as error:
                call.error = error
            with self._wake:
                self._finished.append(call)
                first = len(self._finished) == 1
            if first:  # the others of this batch ride along
                self._token.run_sync_soon(self._deliver)
            del call, work  # an idle thread must not keep guest memory referenced

    def _deliver(self) -> None:
        """Wake the tasks of all calls that have ended. Runs on the trio thread."""
        with self._wake:
            batch, self._finished = self._finished, []
        for call in batch:
            trio.lowlevel.reschedule(call.task)


_shared: trio.lowlevel.RunVar[_Shared | None] = trio.lowlevel.RunVar("storvsp workers", None)


class _Shared:
    """The pool of one trio run and how many leases of it are open."""

    __slots__ = ("leases", "pool")

    def __init__(self) -> None:
        self.pool = WorkerPool()
        self.leases = 0


class PoolLease:
    """One user's share of the run's common pool; made by :func:`shared_pool`."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._gate = _Gate()
        shared.leases += 1

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """The same as :meth:`WorkerPool.run`, refused once this lease is closed."""
        self._gate.enter()
        try:
            return await self._shared.pool.run(function, *args)
        finally:
            self._gate.leave()

    async def aclose(self) -> None:
        """Wait for this user's calls; the last lease to close ends the pool.

        Idempotent. Waits even if cancelled, so that what the calls use can be closed afterwards.
        """
        first = not self._gate.closed
        await self._gate.close()
        if first:
            self._shared.leases -= 1
            if not self._shared.leases:
                _shared.set(None)
                await self._shared.pool.aclose()


def shared_pool() -> PoolLease:
    """Take a lease of the pool shared by all disks of this trio run; close it with ``aclose``."""
    shared = _shared.get()
    if shared is None:
        shared = _Shared()
        _shared.set(shared)
    return PoolLease(shared)
