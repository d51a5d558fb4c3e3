"""The supervisor: accepts VMMs, gives each a worker, and speaks for all guests to operators.

It reads nothing that a VMM sends, not a byte, and takes no descriptor of one: those belong to the
worker from the beginning. So there is nothing that a VMM could hold it up with. What it keeps is
small: names, ids, and a pipe for each worker.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from vmbus import __version__
from vmbus.attach.server import Admission, Names, accept
from vmbus.attach.server.admission import Peer
from vmbus.errors import AttachError, ConfigError
from vmbus.log_budget import LogBudget
from vmbus.plugins.sharing import Line
from vmbus.server.attached import wanted_setup
from vmbus.server.devices import SharedKey, need_names
from vmbus.server.guests import check_kind, pick_guest
from vmbus.server.process import resident_bytes
from vmbus.supervisor.keeping import Keeping
from vmbus.supervisor.parcels import MAX_DOWN, send_down
from vmbus.supervisor.plan import Plan, send_plan
from vmbus.supervisor.workers import Gone, Worker, describe_status, make_ends

_log = logging.getLogger("vmbus.server")

RETRY = 0.5
"""Seconds until making a worker is tried again."""
MAX_GREETING = 16
"""Connections that have not said who they are; the oldest has to go when there are more."""
QUERY_PATIENCE = 2.0
"""Seconds for a worker to describe its guest."""
KILL_PATIENCE = 2.0
"""Seconds for the killed to be gone; one that closes a VMM's FUSE file waits on."""
STOP_PATIENCE = 8.0
"""Seconds for workers to say goodbye; longer than a handler has for its end."""


async def start_zygote() -> tuple[socket.socket, Callable[[], Awaitable[object]]]:
    """Start the process that workers are copies of; return a socket to it and what awaits its end.

    A program of its own, since a supervisor has threads and modules that no worker needs.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "vmbus.supervisor.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's signals, and a group's, are for us alone
            )
    except BaseException:
        ours.close()
        raise
    return ours, process.wait


class Supervisor:
    """Serves any number of guests, each in a process of its own. Use :func:`Supervisor.open`.

    Args:
        plan: What each worker has to know.
        zygote: Socket to the zygote; owned.
    """

    def __init__(self, plan: Plan, zygote: socket.socket) -> None:
        zygote.setblocking(False)
        self.plan = plan
        self._zygote = zygote
        self._down = trio.Lock()
        self._nursery: trio.Nursery
        self._workers: dict[int, Worker] = {}
        """Those whose process is there, by pid."""
        self._past: deque[int] = deque(maxlen=256)
        """The pids of the last ones that have ended."""
        self._spare_in, self._spare = trio.open_memory_channel[Worker](0)
        self._starting: dict[int, tuple[trio.Event, Worker]] = {}
        self._making = trio.CancelScope()
        self._listening: set[trio.CancelScope] = set()
        self.keeping = Keeping(plan.setups, self._spare, partial(self._spawn, programs=True))
        self._evictions = LogBudget()
        self._greeting: list[Worker] = []
        self._ended = trio.Event()
        self._count = 0
        self._stopping = False
        self.served = 0
        """Guests that were attached, in all."""
        self.failed = False
        """Whether serving a guest that has left failed."""
        self.faults = 0
        """Rules broken by guests and VMMs that have left."""

    @classmethod
    @asynccontextmanager
    async def open(cls, plan: Plan) -> AsyncIterator[Supervisor]:
        """Run a supervisor for the length of a ``async with`` block. Is a checkpoint.

        At its end the guests are told goodbye, and all processes have ended when it is left.

        Raises:
            AttachError: Processes cannot be started here.
        """
        ours, wait = await start_zygote()
        try:
            try:
                send_plan(ours, plan)
            except OSError as error:
                raise AttachError("the process that starts workers has ended") from error
            supervisor = cls(plan, ours)
            async with trio.open_nursery() as nursery:
                supervisor._nursery = nursery
                await nursery.start(supervisor._to_the_end, supervisor._listen)
                nursery.start_soon(supervisor._keep_spare)
                try:
                    yield supervisor
                finally:
                    with trio.CancelScope(shield=True):
                        await supervisor._stop()
                    for scope in tuple(supervisor._listening):
                        scope.cancel()
                    nursery.cancel_scope.cancel()
        finally:
            ours.close()
            with trio.CancelScope(shield=True):
                await wait()

    # -- workers ---------------------------------------------------------------------------------

    async def _to_the_end(
        self,
        listen: Callable[..., Awaitable[None]],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen until all has ended: whoever cancels us waits for what is heard then."""
        with trio.CancelScope(shield=True) as scope:
            self._listening.add(scope)
            try:
                await listen(task_status)
            finally:
                self._listening.discard(scope)

    async def _listen(self, task_status: trio.TaskStatus[None]) -> None:
        """Hear what the zygote has to say."""
        while True:
            await trio.lowlevel.wait_readable(self._zygote)
            try:
                data = self._zygote.recv(MAX_DOWN)
            except ConnectionResetError:  # it ended before it had read everything
                data = b""
            if not data:
                break
            parcel = json.loads(data)
            match parcel:
                case {"ready": True}:
                    task_status.started()
                case {"spawned": number, "pid": pid}:
                    # At once: the next thing heard may be that it has ended.
                    event, worker = self._starting.pop(number)
                    worker.pid = pid
                    self._workers[pid] = worker
                    event.set()
                case {"failed": number, "error": text}:
                    _log.warning("cannot make a worker now: %s", text)
                    self._starting.pop(number)[0].set()
                case {"exited": pid, "status": status}:
                    self._exited(pid, status)
                case _:
                    raise AssertionError(f"the zygote says what it cannot: {parcel}")
        if not self._stopping:
            # The kernel ends its workers with it, and nobody is left to tell of that.
            self._workers.clear()
            self._ended.set()
            raise AttachError("the process that starts workers has ended")

    def _exited(self, pid: int, status: int) -> None:
        worker = self._workers.pop(pid, None)
        if worker is None:
            return
        # What it had connected may live on, with whoever it has passed that to.
        self._past.append(pid)
        worker.status = status
        how = describe_status(status)
        in_use = worker.peer is not None or worker.keeps is not None
        if how and in_use and not (self._stopping or worker.evicted):
            _log.error("%s: its worker %s", worker.label, how)
            self.failed = self.failed or worker.attached
        self._ended.set()
        self._ended = trio.Event()

    def kill(self, pid: int) -> None:
        """Internal: see :class:`vmbus.supervisor.workers.Owner`."""
        try:
            send_down(self._zygote, {"kill": pid})
        except BlockingIOError:
            self._nursery.start_soon(self._to_the_end, partial(self._kill_later, pid))
        except OSError:
            return  # it has ended, and so do all workers

    async def _kill_later(self, pid: int, _: object) -> None:
        # Several workers may have to be killed at once, and one task can wait for a socket.
        async with self._down:
            await trio.lowlevel.wait_writable(self._zygote)
        self.kill(pid)

    def came(self) -> None:
        """Internal: see :class:`vmbus.supervisor.workers.Owner`."""
        self.served += 1

    def left(self, worker: Worker) -> None:
        """Internal: see :class:`vmbus.supervisor.workers.Owner`."""
        self.failed = self.failed or worker.failed
        self.faults += worker.faults

    def expect_end(self, worker: Worker) -> None:
        """Internal: see :class:`vmbus.supervisor.workers.Owner`."""
        self._nursery.start_soon(self._to_the_end, partial(self._wait_for_end, worker))

    async def _wait_for_end(self, worker: Worker, _: object) -> None:
        with trio.move_on_after(STOP_PATIENCE):
            await worker.gone.wait()
        # At most what the end of its line does again.
        self.kill(worker.pid)

    def full(self) -> str:
        """Internal: see :class:`vmbus.supervisor.workers.Owner`."""
        limit = self.plan.limits.max_connections
        if sum(worker.name is not None for worker in self._workers.values()) < limit:
            return ""
        return f"this server has its {limit} guest(s), the limit; try again later"

    async def _keep_spare(self) -> None:
        """Have one worker ready at any time."""
        with self._making:
            while True:
                worker = await self._spawn()
                if worker is None:
                    await trio.sleep(RETRY)
                    continue
                await worker.ready.wait()
                await self._spare_in.send(worker)

    async def _spawn(self, *, programs: bool = False) -> Worker | None:
        """Make a worker, one that may start programs if need be; None: impossible now."""
        try:
            down, up, claims, theirs = make_ends()
        except OSError as error:
            _log.warning("cannot make a worker now: %s", error.strerror)
            return None
        worker = Worker(self, down, up, claims)
        try:
            await self._ask_for_process(theirs, worker, programs=programs)
        except BaseException:
            worker.discard()
            raise
        if not worker.pid:
            worker.discard()
            return None
        self._nursery.start_soon(self._to_the_end, worker.run)
        return worker

    async def _ask_for_process(self, theirs: list[int], worker: Worker, *, programs: bool) -> None:
        """Have the zygote make a process with these descriptors, which are owned here.

        The worker has a pid then, if that was possible.
        """
        self._count += 1
        number = self._count
        event, _ = self._starting[number] = trio.Event(), worker
        try:
            send_down(self._zygote, {"spawn": number, "programs": programs}, theirs)
        finally:
            for fd in theirs:
                os.close(fd)
        await event.wait()

    async def _stop(self) -> None:
        self._stopping = True
        self._making.cancel()
        keepers = set(self.keeping.workers.values())  # until the last guest has let go of them
        await self._end([each for each in self._workers.values() if each not in keepers])
        await self._end(list(self._workers.values()))

    async def _end(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.stop()
        for worker in await self._left_after(STOP_PATIENCE, workers):
            _log.warning("%s: did not end by itself", worker.label)
            self.kill(worker.pid)
        for worker in await self._left_after(KILL_PATIENCE, workers):
            _log.error("%s: process %d cannot be killed", worker.label, worker.pid)
            del self._workers[worker.pid]

    async def _left_after(self, seconds: float, workers: list[Worker]) -> list[Worker]:
        with trio.move_on_after(seconds):
            while any(each.pid in self._workers for each in workers):
                await self._ended.wait()
        return [each for each in workers if each.pid in self._workers]

    async def lines(self, guest: str) -> dict[SharedKey, Line]:
        """Internal: see :class:`vmbus.supervisor.workers.Owner`."""
        return await self.keeping.lines(guest)

    # -- VMMs ------------------------------------------------------------------------------------

    async def serve(
        self,
        listener: socket.socket,
        *,
        admission: Admission | None = None,
        exit_after_guest: bool = False,
    ) -> None:
        """Serve the VMMs that come by a socket, until cancelled.

        Args:
            listener: As in :func:`vmbus.attach.server.serve`.
            admission: Says what a guest is called.
            exit_after_guest: Return when the first guest that was attached is gone.

        Raises:
            OSError: The listener is broken.
        """
        admission = admission or Names(anonymous=not need_names(self.plan.setups))
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            worker = await self._hand_over(listener, admission)
            await worker.gone.wait()
            return
        async with trio.open_nursery() as nursery:

            async def watch(worker: Worker) -> None:
                await worker.gone.wait()
                if (worker.attached or worker.failed) and exit_after_guest:
                    nursery.cancel_scope.cancel()

            while True:
                sock = await accept(listener)
                if self.is_own(Peer.of(sock)):
                    sock.close()
                    continue
                nursery.start_soon(watch, await self._hand_over(sock, admission))

    async def _hand_over(self, sock: socket.socket, admission: Admission) -> Worker:
        """Give a connection to a worker. Owns the socket."""
        with sock:
            peer = Peer.of(sock)
            while True:
                worker = await self._spare.receive()
                self._count += 1
                try:
                    worker.serve(sock, peer, admission, self._count)
                except Gone:
                    continue
                break
        self._greeting = [each for each in self._greeting if _is_greeting(each)]
        while len(self._greeting) >= MAX_GREETING:
            oldest = self._greeting.pop(0)
            oldest.evicted = True
            if self._evictions.spend():
                words = self._evictions.left_out()
                _log.warning("a VMM that has not said who it is makes room for others%s", words)
            self.kill(oldest.pid)
        self._greeting.append(worker)
        return worker

    def is_own(self, peer: Peer) -> bool:
        """Whether somebody is one of our workers, taken over then: none has a reason to connect.

        It has our user, so sockets let it in; it can make no process that would not be known here.
        """
        return peer.pid in self._workers or peer.pid in self._past

    # -- operators -------------------------------------------------------------------------------

    def _attached(self) -> dict[str, Worker]:
        return {
            worker.name: worker
            for worker in self._workers.values()
            if worker.name is not None and worker.attached and not worker.gone.is_set()
        }

    async def query(self, kind: str) -> dict[str, Any]:
        """Answer a QUERY: ``"status"`` or ``"guests"``. Is a checkpoint.

        A guest whose worker does not answer in time is described by its name only.

        Raises:
            ConfigError: There is no such kind.
        """
        check_kind(kind)
        attached = self._attached()
        status: dict[str, Any] = {
            "server": f"vmbus {__version__}",
            "pid": os.getpid(),
            "guests_served": self.served,
            "guests_attached": len(attached),
            "rss": resident_bytes(),
        }
        found: dict[str, dict[str, Any]] = {}

        async def describe(name: str, worker: Worker) -> None:
            known = {"name": name, "number": worker.number, "pid": worker.pid}
            known["rss"] = resident_bytes(worker.pid)
            found[name] = {**_UNKNOWN, **known, "answers": False}
            with trio.move_on_after(QUERY_PATIENCE):
                try:
                    answer = await worker.ask({"query": "guests"})
                    (guest,) = answer["guests"]
                    found[name] = {**guest, **known, "answers": True}
                except Gone:
                    del found[name]
                except (ConfigError, OSError, KeyError, TypeError, ValueError) as error:
                    _log.debug("%s: cannot be described: %r", name, error)

        if kind == "guests":
            async with trio.open_nursery() as nursery:
                for name, worker in attached.items():
                    nursery.start_soon(describe, name, worker)
            status["guests"] = sorted(found.values(), key=lambda guest: int(guest["number"]))
        return status

    async def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a COMMAND: pass it on to the guest's worker. Is a checkpoint.

        See :meth:`vmbus.server.GuestServer.command`. To what an added device shares, the worker
        gets lines with it.

        Raises:
            ConfigError: There is no such guest or device, or it cannot do that.
            NotBackError: The disk does not give back what it was handed.
            OSError: The disk cannot.
        """
        worker = pick_guest(self._attached(), request.get("guest"))
        setup = wanted_setup(request)
        lines: dict[SharedKey, Line] = {}
        try:
            if setup is not None:
                lines = await self.keeping.lines(worker.label, setup)
            parcel = {
                "command": request,
                "shared": [[key.spec, len(line.filenos())] for key, line in lines.items()],
            }
            return await worker.ask(
                parcel, [fd for each in lines.values() for fd in each.filenos()]
            )
        except Gone:
            raise OSError(errno.ENOTCONN, f"{worker.label} has left") from None
        finally:
            for line in lines.values():
                line.close()


_UNKNOWN: dict[str, Any] = {
    "version": None, "memory": 0, "paused": False, "faults": 0, "gpadls": 0, "messages_waiting": 0,
    "monitor_polls": 0, "devices": [], "channels": [],
}  # fmt: skip
"""A guest of which nothing is known now."""


def _is_greeting(worker: Worker) -> bool:
    return worker.name is None and not worker.gone.is_set()
