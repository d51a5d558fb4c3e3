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
* A pool belongs to the trio run it was made in. :func:`shared_pool` gives every user in one run
  the same threads; each has a pool of its own and closes that.
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


class _Threads:
    """The threads of one trio run, or of one pool of it."""

    def __init__(self, limit: int, name: str) -> None:
        self.users = 0
        """Open pools on top of this."""
        self._name = name
        self._limit = limit
        self._started = 0
        self._idle = 0
        self._stopping = False
        self._wake = threading.Condition(threading.Lock())  # guards everything here but users
        self._waiting: deque[_Call[object]] = deque()
        self._finished: list[_Call[object]] = []
        self._token = trio.lowlevel.current_trio_token()

    async def run(self, call: _Call[object]) -> None:
        """Have a thread make the call, and wait for it. Raises as :meth:`WorkerPool.run`."""
        with self._wake:
            if self._started < self._limit and self._idle <= len(self._waiting):
                self._start_thread()
            self._waiting.append(call)
            self._wake.notify()

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._wake:
                try:
                    self._waiting.remove(call)
                except ValueError:
                    return trio.lowlevel.Abort.FAILED
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def stop(self) -> None:
        """End the threads; no call is under way or will be made. Cannot block."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

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


class WorkerPool:
    """Threads that run blocking calls for the tasks of one trio run.

    Must be made inside that run. :func:`shared_pool` makes one on the run's common threads.

    Args:
        threads: Most threads to use; they are started as they are needed.
        name: Prefix of the threads' names, for debuggers.
        on: Threads that there are already, instead of new ones.
    """

    def __init__(
        self,
        threads: int = DEFAULT_THREADS,
        *,
        name: str = "worker",
        on: _Threads | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError("a worker pool needs at least one thread")
        self._threads = on if on is not None else _Threads(threads, name)
        self._threads.users += 1
        self._closed = False
        self._active = 0
        self._idle = trio.Event()

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
        if self._closed:
            raise trio.ClosedResourceError("the worker pool is closed")
        call = _Call(lambda: function(*args), trio.lowlevel.current_task())
        self._active += 1
        try:
            await self._threads.run(cast("_Call[object]", call))
        finally:
            self._active -= 1
            if self._closed and not self._active:
                self._idle.set()
        if call.error is not None:
            try:
                raise call.error
            finally:
                del call  # break the cycle traceback -> frame -> call -> error
        return cast("T", call.value)

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way; the last pool ends its threads.

        Idempotent. Waits even if cancelled, so that what the calls use can be closed afterwards.
        """
        first, self._closed = not self._closed, True
        if self._active:
            # Shielded: the caller is about to close what the threads are still using.
            with trio.CancelScope(shield=True):
                await self._idle.wait()
        else:
            self._idle.set()
        if first:
            threads = self._threads
            threads.users -= 1
            if not threads.users:
                if _shared.get() is threads:
                    _shared.set(None)
                threads.stop()


_shared: trio.lowlevel.RunVar[_Threads | None] = trio.lowlevel.RunVar("vmbus workers", None)


def shared_pool() -> WorkerPool:
    """Return a pool on the threads that all users in this trio run share.

    It is the caller's, and closed with ``aclose`` as any other; that waits for its own calls only.
    """
    threads = _shared.get()
    if threads is None:
        threads = _Threads(DEFAULT_THREADS, "worker")
        _shared.set(threads)
    return WorkerPool(on=threads)
