"""A worker's line to its supervisor without a process: the test has the worker's ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.support.patience import PATIENCE
from vmbus.attach.server import Names, Roll, open_listener
from vmbus.plugins.sharing import Line
from vmbus.server import DeviceSetup
from vmbus.server.devices import SharedKey
from vmbus.supervisor import Plan, Supervisor
from vmbus.supervisor.parcels import pack, receive_down
from vmbus.supervisor.workers import Worker, make_ends


class FakeOwner:
    """A supervisor that only takes notes."""

    def __init__(self, full: str = "") -> None:
        self.killed: list[int] = []
        self.attached = 0
        self.gone: list[Worker] = []
        self.expected: list[Worker] = []
        self._full = full

    def kill(self, pid: int) -> None:
        self.killed.append(pid)

    def came(self) -> None:
        self.attached += 1

    def left(self, worker: Worker) -> None:
        self.gone.append(worker)

    def expect_end(self, worker: Worker) -> None:
        self.expected.append(worker)

    def full(self) -> str:
        return self._full

    async def lines(self, _guest: str) -> dict[SharedKey, Line]:
        await trio.lowlevel.checkpoint()
        return {}


class Ends:
    """What a worker process has of its line."""

    def __init__(self, down: int, up: int, claims: int) -> None:
        self.down = socket.socket(fileno=down)
        self.up = up
        self.claims = claims

    def say(self, **parcel: Any) -> None:
        os.write(self.up, pack(parcel))

    def hear(self) -> dict[str, Any]:
        """Take the next message; the descriptors that came with it are closed."""
        self.down.settimeout(PATIENCE)
        received = receive_down(self.down)
        assert received is not None
        for fd in received[1]:
            os.close(fd)
        return json.loads(json.dumps(received[0]))  # type: ignore[no-any-return]

    def hang_up(self) -> None:
        if self.up >= 0:
            os.close(self.up)
            self.up = -1

    def close(self) -> None:
        self.hang_up()
        self.down.close()
        os.close(self.claims)


@contextlib.asynccontextmanager
async def fake_worker(owner: FakeOwner) -> AsyncIterator[tuple[Worker, Ends]]:
    """A worker as the supervisor sees it, running, with the test at its other end."""
    down, up, claims, theirs = make_ends()
    worker, ends = Worker(owner, down, up, claims), Ends(*theirs)
    worker.pid = 4711
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            yield worker, ends
            nursery.cancel_scope.cancel()
    finally:
        ends.close()


class Served:
    """A supervisor with a socket."""

    def __init__(self, supervisor: Supervisor, path: str) -> None:
        self.supervisor = supervisor
        self.path = path

    async def guest(self, name: str) -> dict[str, Any]:
        """What the supervisor says of a guest."""
        guests = (await self.supervisor.query("guests"))["guests"]
        (found,) = (guest for guest in guests if guest["name"] == name)
        return dict(found)


@contextlib.asynccontextmanager
async def supervised(folder: Path, plan: Plan | None = None) -> AsyncIterator[Served]:
    """A supervisor that serves guests; each of them has a disk unless the plan says otherwise."""
    path = str(folder / "s")
    plan = plan or Plan(setups=(DeviceSetup("storvsp", ("ram:1M",)),))
    with open_listener(path) as listener:
        async with Supervisor.open(plan) as supervisor, trio.open_nursery() as nursery:
            nursery.start_soon(partial(supervisor.serve, listener, admission=Names(Roll())))
            yield Served(supervisor, path)
            nursery.cancel_scope.cancel()
