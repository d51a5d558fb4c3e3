"""The process that all workers are copies of.

It has everything imported that a worker needs and nothing running: no loop, no threads. So a fork
is safe, takes a few milliseconds, and what has been imported is shared by all workers. It is
started as a program of its own, since a supervisor has threads, and modules that no worker needs.

::

    python -m vmbus.supervisor.zygote FD     # FD: a SOCK_SEQPACKET to the supervisor

The supervisor first sends the :class:`Plan`, pickled, in a memfd. Then, as JSON:

==============================  ==================================================================
``{"spawn": n}`` with 3 fds      make a worker of them; answered ``{"spawned": n, "pid": ...}`` or
                                 ``{"failed": n, "error": text}``; with ``"programs": true`` one
                                 that may start programs
``{"kill": pid}``                SIGKILL, unless it has ended already
``{"exited": pid, "status": s}`` unasked: a worker ended, with this ``waitpid`` status
==============================  ==================================================================

When the supervisor goes, so does the zygote, after :data:`GRACE` seconds in which workers can say
goodbye; and with it goes, by PR_SET_PDEATHSIG, every worker that has not, whatever holds it up.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import select
import signal
import socket
import sys
import time

from vmbus.supervisor import sandbox, worker
from vmbus.supervisor.parcels import MAX_DOWN, receive_down
from vmbus.supervisor.plan import Plan

GRACE = 10.0
"""Seconds that workers have once the supervisor is gone."""


def load(plan_fd: int) -> tuple[Plan, dict[str, int]]:
    """Return what the supervisor wrote: the plan, and the levels of its loggers."""
    with os.fdopen(plan_fd, "rb") as file:
        file.seek(0)
        found: tuple[Plan, dict[str, int]] = pickle.load(file)  # noqa: S301 - our own parent's
    return found


class Zygote:
    """Forks workers.

    Args:
        sock: To the supervisor.
        plan: What workers have to know.
        levels: Of the supervisor's loggers.
    """

    def __init__(self, sock: socket.socket, plan: Plan, levels: dict[str, int]) -> None:
        self._sock = sock
        self._plan = plan
        self._levels = levels
        self._children: dict[int, int] = {}
        """Pidfds of the workers, by pid."""
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def run(self) -> None:
        """Serve the supervisor until it is gone. In a worker, this does not return."""
        supervised = True
        deadline = float("inf")
        while supervised or self._children:
            left = max(0.0, deadline - time.monotonic())
            if not left:
                return
            for fd, _ in self._poll.poll(None if supervised else left * 1000):
                if fd != self._sock.fileno():
                    self._reap(fd)
                elif (parcel := receive_down(self._sock)) is not None:
                    self._obey(*parcel)
                else:
                    self._poll.unregister(self._sock)
                    supervised = False
                    deadline = time.monotonic() + GRACE

    def _obey(self, parcel: dict[str, object], fds: list[int]) -> None:
        match parcel:
            case {"spawn": int(number), "programs": bool(programs)}:
                try:
                    self._spawn(number, fds, programs=programs)
                finally:
                    for fd in fds:
                        os.close(fd)
            case {"kill": int(pid)} if pid in self._children:
                os.kill(pid, signal.SIGKILL)

    def _spawn(self, number: int, fds: list[int], *, programs: bool) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._say({"failed": number, "error": error.strerror})
            return
        if not pid:
            self._become_worker(fds, programs=programs)
        self._children[pid] = pidfd = os.pidfd_open(pid)
        self._poll.register(pidfd, select.POLLIN)
        self._say({"spawned": number, "pid": pid})

    def _become_worker(self, fds: list[int], *, programs: bool) -> None:
        code = 1
        plan = self._plan
        if programs:
            plan = dataclasses.replace(plan, sandbox=False, allowed=None)
        try:
            sandbox.die_with_parent()
            self._sock.close()
            for pidfd in self._children.values():
                os.close(pidfd)
            code = worker.main(plan, self._levels, *fds)
        finally:
            # Not through the interpreter's own end: what is registered for that is the zygote's.
            os._exit(code)

    def _reap(self, pidfd: int) -> None:
        pid = next(pid for pid, fd in self._children.items() if fd == pidfd)
        _, status = os.waitpid(pid, 0)
        del self._children[pid]
        self._poll.unregister(pidfd)
        os.close(pidfd)
        self._say({"exited": pid, "status": status})

    def _say(self, parcel: dict[str, object]) -> None:
        try:
            self._sock.send(json.dumps(parcel).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            return  # the supervisor is gone; the poll will say so


def main() -> None:
    """Be the zygote."""
    # The terminal's signals are for the supervisor, which tells the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sandbox.set_name("vmbus-zygote")
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    _, _, _, _ = received = sock.recvmsg(MAX_DOWN, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    plan, levels = load(int.from_bytes(received[1][0][2], sys.byteorder))
    worker.prepare(plan)
    gc.collect()
    # What is there now is never collected: no collection writes to pages that all share.
    gc.freeze()
    sock.send(b'{"ready": true}')
    Zygote(sock, plan, levels).run()


if __name__ == "__main__":
    main()
