"""What runs in a worker: one VMM's connection, a bus, its devices, and a line to the supervisor.

A worker is made before it is needed. It then waits for a connection, greets the VMM, asks the
supervisor who the guest is, and serves it as a server in one process would. When the connection has
ended, so does the worker. Nothing here is read from another guest, so there is nothing to protect
one from but the kernel's own borders between processes.

Down come (JSON, the first with the connection as a descriptor)::

    {"serve": true}
    {"answer": n, "value": ...}  or  {"answer": n, "error": text, "errno": e}
    {"ask": n, "query": kind}
    {"ask": n, "command": {...}, "shared": [[spec, descriptors], ...]}, with those
    {"ask": n, "keep": [plugin, place, name], "specs": [...]}
                                 and then, with a line: {"connect": guest, "spec": spec}
    {"stop": true}

Up go::

    {"ready": true}
    {"ask": n, "admit": what the VMM calls its guest}
    {"claim": id}                    answered by one byte in a pipe of its own
    {"attached": true}, {"leaving": true}, {"left": true}
    {"answer": n, ...}
    {"log": {...}}
    {"ended": {"attached": ..., "failed": ..., "faults": ...}}
"""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
import select
import socket
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import trio

from vmbus.attach.protocol.layout import require
from vmbus.attach.server import SocketTransport, serve
from vmbus.attach.server.admission import Peer
from vmbus.errors import ConfigError, NotBackError, PeerProtocolError, ProtocolError, VMBusError
from vmbus.plugins.devices import load_device
from vmbus.plugins.sharing import Keeper, Line
from vmbus.server import DeviceSetup, GuestServer, raise_descriptor_limit
from vmbus.server.devices import SharedKey
from vmbus.server.keepers import KeeperKey, open_keeper, unshared
from vmbus.supervisor import garbage, relay, sandbox
from vmbus.supervisor.files import named_files
from vmbus.supervisor.parcels import Parcel, pack, receive_down, write_all
from vmbus.supervisor.plan import Plan

K = TypeVar("K")

CLAIM_PATIENCE = 5.0
"""Seconds for the supervisor to answer what a worker stops for."""


def prepare(plan: Plan) -> None:
    """Import what workers need, for the zygote. Starts nothing."""
    raise_descriptor_limit()
    for setup in plan.setups:
        plugin = load_device(setup.plugin)
        if plugin.backends is not None:
            for name in {spec.partition(":")[0] for spec in setup.specs}:
                try:
                    plugin.backends.load(name)
                except ConfigError:
                    continue  # the guest's own server will say it


def main(plan: Plan, levels: dict[str, int], down: int, up: int, claims: int) -> int:
    """Be a worker until its guest is gone; returns the exit code.

    Args:
        plan: What the supervisor wants.
        levels: Of the supervisor's loggers.
        down: Socket from the supervisor; owned.
        up: Pipe to it; owned.
        claims: Pipe with its answers to claims; owned.
    """
    sandbox.set_name("vmbus-worker")
    sandbox.leave_terminal()
    if plan.sandbox:
        sandbox.confine()
        sandbox.restrict_files(None)
    worker = Worker(plan, socket.socket(fileno=down), up, claims)
    relay.install(worker.send, levels)
    try:
        trio.run(worker.run)
    except Exception:
        logging.getLogger("vmbus").exception("a worker failed")
        return 1
    return 0


class Worker:
    """The line to the supervisor, and what it is about. Arguments as in :func:`main`."""

    def __init__(self, plan: Plan, down: socket.socket, up: int, claims: int) -> None:
        down.setblocking(False)
        self._plan = plan
        self._down = down
        self._up = up
        self._claims = claims
        self._server = GuestServer(plan.setups, plan.config, keepers=self, attached=self._is_there)
        self._lines: dict[SharedKey, Line] = {}
        self._keeper: Keeper | None = None
        self._asked: dict[int, tuple[trio.Event, list[tuple[Parcel, list[int]]]]] = {}
        self._asking = 0
        self.attached = False
        self.failed = False
        self.faults = 0

    def send(self, parcel: Parcel) -> None:
        """Send something up. Waits for the supervisor if that is slow."""
        write_all(self._up, pack(parcel))

    async def run(self) -> None:
        """Wait for a guest, serve it, end."""
        gc.collect()
        gc.freeze()
        self.send({"ready": True})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(garbage.collect_when_idle)
            try:
                await self._listen(nursery)
            finally:
                nursery.cancel_scope.cancel()
        if self._keeper is not None:
            await self._keeper.aclose()

    async def _listen(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                received = receive_down(self._down)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._down)
                continue
            if received is None:
                break  # the supervisor is gone, and its guests go with it
            parcel, fds = received
            match parcel:
                case {"serve": True}:
                    nursery.start_soon(self._serve, socket.socket(fileno=fds[0]), nursery)
                case {"answer": int(number)} if number in self._asked:
                    event, answers = self._asked.pop(number)
                    answers.append((parcel, fds))
                    event.set()
                case {"connect": str(guest), "spec": str(spec)}:
                    assert self._keeper is not None
                    nursery.start_soon(self._keeper.serve, Line.of(fds), guest, spec)
                case {"ask": int(number)}:
                    nursery.start_soon(self._answer, number, parcel, fds)
                case _:  # to stop
                    break

    # -- the guest -------------------------------------------------------------------------------

    async def _serve(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        plan = self._plan
        try:
            await serve(
                sock,
                self._handle,
                limits=plan.limits,
                trust_vmm=plan.trust_vmm,
                admission=self,
                query=self._server.query_own,
            )
        finally:
            ended = {"attached": self.attached, "failed": self.failed, "faults": self.faults}
            self.send({"ended": ended})
        nursery.cancel_scope.cancel()

    async def _handle(self, transport: SocketTransport) -> None:
        plan = self._plan
        self.attached = True
        try:
            if plan.sandbox and plan.allowed is not None:
                # No thread is there yet, or the guest is not served; those to come take this over.
                # What guests share is opened elsewhere.
                named = named_files(unshared(plan.setups), transport.name)
                sandbox.restrict_files([*plan.allowed, *named])
            await self._server.handle(transport)
        except ProtocolError:
            self.faults += 1
            raise
        except Exception:
            self.failed = True
            raise
        finally:
            self.faults += transport.dropped_messages + self._server.faults

    def _is_there(self) -> None:
        self.send({"attached": True})

    # -- vmbus.attach.server.Admission -----------------------------------------------------------

    async def admit(self, said: str, peer: Peer) -> str:
        """Ask the supervisor, which knows the peer and the other guests. A checkpoint."""
        del peer
        self._asking += 1
        number = self._asking
        event, answers = self._asked[number] = trio.Event(), []
        self.send({"ask": number, "admit": said})
        await event.wait()
        answer, fds = answers[0]
        if "error" in answer:
            raise PeerProtocolError(answer["error"], errno=answer["errno"])
        shared = [
            (SharedKey(place, spec), count) for place, spec, count in answer["value"]["shared"]
        ]
        self._lines = _take_lines(shared, fds)
        name: str = answer["value"]["name"]
        sandbox.set_name(f"vmbus:{name}")
        return name

    def claim(self, name: str, vm_id: uuid.UUID) -> None:
        """Ask the supervisor, and wait: there is nothing else to do here than this guest."""
        del name
        self.send({"claim": str(vm_id)})
        poll = select.poll()
        poll.register(self._claims, select.POLLIN)
        granted = poll.poll(CLAIM_PATIENCE * 1000) and os.read(self._claims, 1) == b"y"
        require(
            bool(granted),
            "VM_INFO: a VM with this vm_id is attached; if it was you, try again shortly",
            errno.EBUSY,
        )

    def leaving(self, name: str) -> None:
        """Tell the supervisor."""
        del name
        self.send({"leaving": True})

    def leave(self, name: str) -> None:
        """Tell the supervisor."""
        del name
        self.send({"left": True})

    # -- what guests share -----------------------------------------------------------------------

    async def lines(self, guest: str, added: DeviceSetup | None = None) -> Mapping[SharedKey, Line]:
        """See :class:`vmbus.server.keepers.LineMaker`: they came with the guest's name."""
        del guest, added  # of those that are added, they come with the command
        await trio.lowlevel.checkpoint()
        lines, self._lines = self._lines, {}
        return lines

    async def _keep(self, key: KeeperKey, specs: list[str]) -> None:
        """Keep something for all guests."""
        plan = self._plan
        sandbox.set_name("vmbus-keeper")
        if plan.sandbox and plan.allowed is not None:
            setup = DeviceSetup(key.plugin, tuple(specs))
            sandbox.restrict_files([*plan.allowed, *named_files([setup], "")])
        self._keeper = await open_keeper(key, specs)

    # -- operators -------------------------------------------------------------------------------

    async def _answer(self, number: int, parcel: Parcel, fds: list[int]) -> None:
        answer: dict[str, Any] = {"answer": number}
        try:
            match parcel:
                case {"keep": [str(plugin), int(place), str(name)], "specs": list(specs)}:
                    await self._keep(KeeperKey(plugin, place, name), specs)
                case {"query": str(kind)}:
                    answer["value"] = self._server.query(kind)
                case _:
                    lines = _take_lines(parcel["shared"], fds)
                    answer["value"] = await self._server.command(parcel["command"], lines)
        except VMBusError as error:
            code = errno.ETIMEDOUT if isinstance(error, NotBackError) else errno.EINVAL
            answer |= {"error": str(error), "errno": code}
        except OSError as error:
            answer |= {"error": str(error), "errno": error.errno or errno.EIO}
        self.send(answer)


def _take_lines(counts: Iterable[tuple[K, int]], fds: list[int]) -> dict[K, Line]:
    """Make lines of descriptors, which are owned from now on.

    Args:
        counts: For each line its key, and how many descriptors are its own.
        fds: All of them, in the same order.
    """
    found: dict[K, Line] = {}
    left = iter(fds)
    for key, count in counts:
        found[key] = Line.of(list(itertools.islice(left, count)))
    return found
