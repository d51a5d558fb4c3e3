"""Worker threads for blocking calls, at a price a disk can afford, shared fairly.

``trio.to_thread.run_sync`` costs about 40 us per call, most of it for waking the loop once per
call. Here a few long-lived threads pull calls from queues, and the results of all calls that
end before the loop gets round to them come back together: one wake-up per batch.

Rules of the pool
-----------------
* **A call that has started is never abandoned** by a task that is merely cancelled. Its buffers
  are guest memory: if the awaiting task were allowed to leave, the guest could reuse the pages
  while a thread is still writing them. A cancelled task therefore waits for its started call and
  gets its result; a call that has not started is taken off the queue and never runs.
* The exception is said aloud: :func:`abandon` gives up the calls of an owner that is gone, which
  may never come back (a dead disk, a file server that hangs). Each keeps its buffers until it
  does, and what it uses may be closed by :meth:`WorkerPool.when_back` only.
* **Owners take turns**, and so do the parts of an owner: a guest that has queued thousands of
  calls keeps another one waiting for no more than the calls that threads have taken already. Of
  those an owner has :data:`DEFAULT_THREADS` at most, so that one whose disks hang leaves threads
  for others. Who owns a call is a property of the task that makes it: :func:`work_for`.
* Threads are started when there is work for them, and never keep the interpreter alive.
* A pool belongs to the trio run it was made in. :func:`shared_pool` gives every user in one run
  the same threads; each has a pool of its own and closes that.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, TypeVarTuple, cast

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DEFAULT_THREADS = 4
"""Threads of a pool of its own, and those that one owner may have of the shared ones."""
SHARED_THREADS = 32
"""Threads that all owners of a trio run share: eight may have all theirs blocked."""

Owner = tuple[Hashable, Hashable]
_owner: contextvars.ContextVar[Owner] = contextvars.ContextVar("owner", default=(None, None))


def work_for(owner: Hashable, part: Hashable = None) -> None:
    """Say whose calls this task makes from now on, and the tasks that it starts. Cannot block.

    Args:
        owner: Who takes turns with other owners; a guest.
        part: What takes turns with other parts of the owner; a channel.
    """
    _owner.set((owner, part))


class AbandonedError(OSError):
    """A call has not come back, and nobody waits for it any more; it may still do its work."""

    def __init__(self) -> None:
        super().__init__(errno.ETIMEDOUT, "it has not come back, and is not waited for")

    def __reduce__(self) -> tuple[type[AbandonedError], tuple[()]]:
        """Be copied: one call may have been made for several."""
        return type(self), ()


class _Away:
    """Calls of a pool that were abandoned and have not come back."""

    def __init__(self) -> None:
        self.count = 0
        self.told: list[Callable[[], None]] = []
        """Called when there are none."""

    def came_back(self) -> None:
        """One has."""
        self.count -= 1
        self.tell()

    def tell(self) -> None:
        """Tell those who wait for it, if there are none."""
        while self.told and not self.count:
            self.told.pop()()


class _Call(Generic[T]):
    """One call: what to do, who waits for it, and how it ended."""

    __slots__ = ("away", "error", "owner", "part", "task", "value", "work")

    def __init__(self, work: Callable[[], T], task: trio.lowlevel.Task, away: _Away) -> None:
        self.work: Callable[[], T] | None = work
        self.task: trio.lowlevel.Task | None = task
        """Who waits; None: nobody any more."""
        self.away = away
        self.owner, self.part = _owner.get()
        self.value: T | None = None
        self.error: BaseException | None = None


class _Queue:
    """The calls of one owner, by part."""

    __slots__ = ("in_turn", "parts", "started", "turns", "waiting")

    def __init__(self) -> None:
        self.parts: dict[Hashable, deque[_Call[object]]] = {}
        self.turns: deque[deque[_Call[object]]] = deque()
        """Those with calls that wait, the next one first."""
        self.waiting = 0
        self.started: dict[_Call[object], None] = {}
        self.in_turn = False
        """Whether a thread may take a call of it."""

    def put(self, call: _Call[object]) -> None:
        """Add a call to those that wait."""
        part = self.parts.get(call.part)
        if part is None:
            part = self.parts[call.part] = deque()
            self.turns.append(part)
        part.append(call)
        self.waiting += 1

    def take(self) -> _Call[object]:
        """Take the next call; the part that it is of goes to the end."""
        part = self.turns.popleft()
        call = part.popleft()
        if part:
            self.turns.append(part)
        else:
            del self.parts[call.part]
        self.waiting -= 1
        self.started[call] = None
        return call

    def remove(self, call: _Call[object]) -> bool:
        """Take out a call that still waits. Returns False if it does not."""
        part = self.parts.get(call.part, ())
        if call not in part:
            return False
        assert isinstance(part, deque)
        part.remove(call)
        if not part:
            del self.parts[call.part]
            # By identity: all empty ones are equal.
            self.turns = deque(each for each in self.turns if each is not part)
        self.waiting -= 1
        return True


class _Threads:
    """The threads of one trio run, or of one pool of it."""

    def __init__(self, limit: int, name: str, share: int) -> None:
        self.users = 0
        """Open pools on top of this."""
        self._name = name
        self._limit = limit
        self._share = share
        self._started = 0
        self._lost = 0
        """Threads in calls that were abandoned."""
        self._idle = 0
        self._stopping = False
        self._wake = threading.Condition(threading.Lock())  # guards everything here but users
        self._queues: dict[Hashable, _Queue] = {}
        self._turns: deque[_Queue] = deque()
        """Owners with a call that a thread may take, the next one first."""
        self._ready = 0
        """Calls that threads may take, if there are enough of those."""
        self._finished: list[_Call[object]] = []
        self._token = trio.lowlevel.current_trio_token()
        _all_threads().add(self)

    async def run(self, call: _Call[object]) -> None:
        """Have a thread make the call, and wait for it. Raises as :meth:`WorkerPool.run`."""
        with self._wake:
            queue = self._queues.get(call.owner)
            if queue is None:
                queue = _Queue()
            ready = queue.waiting < self._share - len(queue.started)
            if ready and self._started - self._lost < self._limit and self._idle <= self._ready:
                self._start_thread()
            self._queues[call.owner] = queue
            queue.put(call)
            if ready:
                self._ready += 1
                self._list(queue)
                self._wake.notify()

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._wake:
                if not self._remove(queue, call):
                    return trio.lowlevel.Abort.FAILED
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def abandon(self, owner: Hashable) -> int:
        """See :func:`abandon`."""
        with self._wake:
            queue = self._queues.get(owner)
            if queue is None:
                return 0
            started = [call for call in queue.started if call.task is not None]
            waiting = [call for part in queue.turns for call in part]
            for call in waiting:
                self._remove(queue, call)
            tasks = [call.task for call in started + waiting]
            for call in started + waiting:
                call.error = AbandonedError()
                call.task = None
            for call in started:
                call.away.count += 1
            for call in waiting:
                call.work = None
            self._lost += len(started)
        for task in tasks:
            assert task is not None
            trio.lowlevel.reschedule(task)
        return len(started)

    def abandoned(self, owner: Hashable) -> int:
        """See :func:`abandoned`."""
        with self._wake:
            queue = self._queues.get(owner)
            return sum(not call.task for call in queue.started) if queue is not None else 0

    def stop(self) -> None:
        """End the threads; no call is under way or will be made. Cannot block."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._forget_if_stopped()

    def _forget_if_stopped(self) -> None:
        with self._wake:
            over = self._stopping and not self._lost
        if over:  # else there are calls still that somebody may ask about
            _all_threads().discard(self)

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

    def _list(self, queue: _Queue) -> None:
        """Give an owner its turn, after the others."""
        if not queue.in_turn:
            queue.in_turn = True
            self._turns.append(queue)

    def _take(self) -> _Call[object]:
        queue = self._turns.popleft()
        call = queue.take()
        self._ready -= 1
        if queue.waiting and len(queue.started) < self._share:
            self._turns.append(queue)
        else:
            queue.in_turn = False
        return call

    def _remove(self, queue: _Queue, call: _Call[object]) -> bool:
        if not queue.remove(call):
            return False
        if queue.waiting < self._share - len(queue.started):
            self._ready -= 1
        if not queue.waiting and queue.in_turn:
            queue.in_turn = False
            self._turns.remove(queue)
        self._forget(queue, call.owner)
        return True

    def _end(self, call: _Call[object]) -> None:
        queue = self._queues[call.owner]
        del queue.started[call]
        if queue.waiting >= self._share - len(queue.started):
            self._ready += 1
            self._list(queue)
        self._forget(queue, call.owner)
        if call.task is None:
            self._lost -= 1

    def _forget(self, queue: _Queue, owner: Hashable) -> None:
        if not queue.waiting and not queue.started:
            del self._queues[owner]

    def _work(self) -> None:
        """The life of one thread."""
        while True:
            with self._wake:
                while not self._ready:
                    if self._stopping:
                        return
                    self._idle += 1
                    self._wake.wait()
                    self._idle -= 1
                call = self._take()
            work, call.work = call.work, None
            assert work is not None
            value: object = None
            error: BaseException | None = None
            try:
                value = work()
            except BaseException as caught:
                error = caught
            with self._wake:
                if call.task is not None:
                    call.value, call.error = value, error
                self._end(call)
                self._finished.append(call)
                first = len(self._finished) == 1
            if first:  # the others of this batch ride along
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._deliver)
            del call, work, value, error  # an idle thread must not keep guest memory referenced

    def _deliver(self) -> None:
        """Wake the tasks of all calls that have ended. Runs on the trio thread."""
        with self._wake:
            batch, self._finished = self._finished, []
        for call in batch:
            if call.task is not None:
                trio.lowlevel.reschedule(call.task)
            else:
                call.away.came_back()
                self._forget_if_stopped()


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
        self._threads = on if on is not None else _Threads(threads, name, threads)
        self._threads.users += 1
        self._closed = False
        self._active = 0
        self._idle = trio.Event()
        self._away = _Away()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run ``function(*args)`` in a worker and return what it returns. A checkpoint.

        If the awaiting task is cancelled before a worker took the call, the call never runs and
        Cancelled is raised; afterwards the call's own outcome is delivered instead.

        Raises:
            trio.ClosedResourceError: The pool is closed.
            OSError: Not one worker thread could be started (EAGAIN).
            AbandonedError: Nobody waits for the call any more, see :func:`abandon`; what it uses
                stays in use.
            BaseException: Whatever the call raised.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError("the worker pool is closed")
        call = _Call(lambda: function(*args), trio.lowlevel.current_task(), self._away)
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

    @property
    def away(self) -> int:
        """Calls that were abandoned and are under way still."""
        return self._away.count

    def when_back(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called when no call that was abandoned is under way. Cannot block.

        That is at once, if none is. For what such calls use: the number of a file that is closed
        under them would be given to another one. It must not raise, and is not called if the trio
        run ends before.
        """
        self._away.told.append(tell)
        self._away.tell()

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way; the last pool ends its threads.

        Idempotent. Waits even if cancelled, so that what the calls use can be closed afterwards;
        not for those that were abandoned, see :meth:`when_back`.
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
_all: trio.lowlevel.RunVar[set[_Threads]] = trio.lowlevel.RunVar("vmbus worker threads")


def _all_threads() -> set[_Threads]:
    """Return all threads of this trio run."""
    try:
        return _all.get()
    except LookupError:
        found: set[_Threads] = set()
        _all.set(found)
        return found


def shared_pool() -> WorkerPool:
    """Return a pool on the threads that all users in this trio run share.

    It is the caller's, and closed with ``aclose`` as any other; that waits for its own calls only.
    """
    threads = _shared.get()
    if threads is None:
        threads = _Threads(SHARED_THREADS, "worker", DEFAULT_THREADS)
        _shared.set(threads)
    return WorkerPool(on=threads)


def abandon(owner: Hashable) -> int:
    """Give up all calls of an owner that is gone. Cannot block.

    Those that wait never run. Those that threads have taken go on, with their buffers, until they
    are done; :class:`AbandonedError` is raised to who awaits them. Only for an owner whose memory
    nobody is told to be free: what its calls read into it, they may still write.

    Returns:
        How many calls are under way still.
    """
    return sum(threads.abandon(owner) for threads in _all_threads())


def abandoned(owner: Hashable) -> int:
    """Return how many abandoned calls of an owner have not come back. Cannot block."""
    return sum(threads.abandoned(owner) for threads in _all_threads())
