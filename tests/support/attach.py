"""Peers for the tests of ``vmbus.attach``: a raw VMM, a scripted bus, a recording delegate."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from tests.support.patience import PATIENCE
from vmbus.attach.client import Done
from vmbus.attach.protocol.framing import (
    ASYNC,
    ERROR,
    REPLY,
    Frame,
    FrameReader,
    pack_frame,
    receive,
)
from vmbus.attach.protocol.limits import Feature, Role
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.attach.protocol.to_server import (
    Goodbye,
    Hello,
    MemoryRegion,
    PostMessage,
    SetMemTable,
    VmInfo,
)
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.attach.server import Handler, ServerLimits, open_listener, serve, serve_operators
from vmbus.attach.server.management import CommandCallback, QueryCallback
from vmbus.attach.server.transport import SocketTransport
from vmbus.partition.events import (
    MemoryRemoval,
    PartitionEvent,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
)

RAM_SIZE = 1 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def make_memfd(size: int = RAM_SIZE, *, seal: bool = True) -> int:
    """Return a memfd as VMMs make them."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def make_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def send_raw(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    import array

    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


NO_FEATURES = Feature(0)
HELLO = Hello(1, 1, NO_FEATURES, 64, Role.VMM, "")
INFO = VmInfo(2, 4096, bytes(range(16)), 0, 0)
TABLE = SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),))


class RawVmm:
    """Speaks frames from within the trio loop; nothing is checked or answered by itself."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reader = FrameReader(stream=sock.type == socket.SOCK_STREAM)
        self.seq = 0
        self.memfd = -1

    async def send_bytes(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        while True:
            try:
                send_raw(self.sock, data, fds)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            else:
                return

    async def send(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        fds: tuple[int, ...] = (),
        flags: int = 0,
        seq: int | None = None,
    ) -> int:
        if seq is None:
            self.seq += 1
            seq = self.seq
        await self.send_bytes(pack_frame(kind, flags, seq, payload, len(fds)), fds)
        return seq

    async def post(self, kind: int, payload: bytes) -> None:
        await self.send(kind, payload, flags=ASYNC, seq=0)

    async def receive(self) -> Frame | None:
        """The next frame, None at the end of the connection. The caller closes it."""
        with trio.fail_after(PATIENCE):
            while (frame := self.reader.next_frame()) is None:
                try:
                    if not receive(self.sock, self.reader):
                        return None
                except ConnectionResetError:
                    return None
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self.sock)
            return frame

    async def receive_and_drop(self) -> None:
        frame = await self.receive()
        assert frame is not None
        frame.close()

    async def expect(self, kind: int) -> Frame:
        frame = await self.receive()
        assert frame is not None, "the server closed the connection"
        assert frame.kind == kind, (hex(frame.kind), frame.payload)
        return frame

    async def ask(self, kind: int, payload: bytes = b"", *, fds: tuple[int, ...] = ()) -> Frame:
        """Send a request and return the next frame, which must answer it."""
        seq = await self.send(kind, payload, fds=fds)
        return await self.expect_answer(kind, seq)

    async def expect_answer(self, kind: int, seq: int) -> Frame:
        frame = await self.expect(kind)
        assert frame.flags & REPLY
        assert frame.seq == seq
        return frame

    async def refused(
        self, kind: int, payload: bytes = b"", *, fds: tuple[int, ...] = ()
    ) -> tuple[int, str]:
        """Send a request that must be refused; return errno and text."""
        frame = await self.ask(kind, payload, fds=fds)
        assert frame.flags == REPLY | ERROR, frame.payload
        error = ErrorReply.decode_untrusted(frame.payload)
        return error.errno, error.text

    async def ok(self, kind: int, payload: bytes = b"", *, fds: tuple[int, ...] = ()) -> bytes:
        frame = await self.ask(kind, payload, fds=fds)
        assert frame.flags == REPLY, ErrorReply.decode_untrusted(frame.payload)
        return frame.payload

    async def answer(self, frame: Frame, code: int = 0) -> None:
        if code:
            payload = ErrorReply(code, "no").encode()
            await self.send(frame.kind, payload, flags=REPLY | ERROR, seq=frame.seq)
        else:
            await self.send(frame.kind, flags=REPLY, seq=frame.seq)

    async def greet(self, features: Feature = NO_FEATURES) -> None:
        hello = Hello(1, 1, features, 64, Role.VMM, "")
        await self.ok(Number.HELLO, hello.encode())

    async def attach(self, features: Feature = NO_FEATURES, *, info: VmInfo = INFO) -> None:
        """Go through the boot order; takes the message ports the bus adds."""
        await self.greet(features)
        await self.ok(Number.VM_INFO, info.encode())
        self.memfd = make_memfd()
        seq = await self.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(self.memfd,))
        while True:
            frame = await self.receive()
            assert frame is not None
            if frame.flags & REPLY:
                assert (frame.kind, frame.seq, frame.flags) == (Number.SET_MEM_TABLE, seq, REPLY)
                return
            await self.answer(frame)

    def close(self) -> None:
        self.reader.close()
        self.sock.close()
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1


class Bus:
    """A handler that records; tests reach into its transport."""

    def __init__(self) -> None:
        self.transports: list[SocketTransport] = []
        self.events: list[PartitionEvent] = []
        self.ready = trio.Event()
        self.seen = trio.Event()
        self.ended = trio.Event()
        self.auto = True
        """Answer life-cycle events at once."""

    @property
    def transport(self) -> SocketTransport:
        return self.transports[-1]

    async def __call__(self, transport: SocketTransport) -> None:
        self.transports.append(transport)
        await transport.add_message_port(1)
        await transport.add_message_port(4)
        self.ready.set()
        async for event in transport.incoming():
            self.events.append(event)
            self.seen.set()
            self.seen = trio.Event()
            if self.auto:
                event.done()
        self.ended.set()

    async def wait_events(self, count: int) -> None:
        with trio.fail_after(PATIENCE):
            while len(self.events) < count:
                await self.seen.wait()


def done_of(event: PartitionEvent) -> Callable[[], None]:
    assert isinstance(event, PartitionReset | PartitionPaused | PartitionResumed | MemoryRemoval)
    return event.done


def control(path: Path) -> Path:
    """Where the operators of a server at ``path`` connect."""
    return Path(f"{path}{CONTROL_SUFFIX}")


@contextlib.asynccontextmanager
async def running_server(
    path: Path,
    handler: Handler,
    *,
    mode: str = "seqpacket",
    limits: ServerLimits | None = None,
    query: QueryCallback | None = None,
    command: CommandCallback | None = None,
    **options: Any,
) -> AsyncIterator[Path]:
    """Serve on ``path``, and operators beside it, while the block runs."""
    with (
        open_listener(path, mode=mode) as listener,
        open_listener(control(path), mode=mode) as operators,
    ):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                own = None if query is None else lambda _, kind: query(kind)
                await serve(listener, handler, limits=limits, query=own, **options)

            async def run_operators() -> None:
                await serve_operators(operators, limits=limits, query=query, command=command)

            nursery.start_soon(run)
            nursery.start_soon(run_operators)
            yield path
            nursery.cancel_scope.cancel()


KINDS = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}


@contextlib.contextmanager
def raw_vmm(path: Path, mode: str = "seqpacket") -> Iterator[RawVmm]:
    sock = socket.socket(socket.AF_UNIX, KINDS[mode])
    sock.connect(os.fspath(path))
    vmm = RawVmm(sock)
    try:
        yield vmm
    finally:
        vmm.close()


class Recorder:
    """A delegate that writes down everything and answers deliveries at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.condition = threading.Condition()
        self.hold_deliveries = False
        self.deliver_code = 0
        self.pending: list[Done] = []
        self.take_call_fds = False
        self.raise_on: dict[str, BaseException] = {}
        self.event_fds: dict[tuple[int, int], int] = {}

    def _note(self, *call: Any) -> None:
        with self.condition:
            self.calls.append(call)
            self.condition.notify_all()
        error = self.raise_on.get(call[0])
        if error is not None:
            raise error

    def wait_for(self, test: Callable[[list[tuple[Any, ...]]], bool]) -> None:
        with self.condition:
            assert self.condition.wait_for(lambda: test(self.calls), PATIENCE), self.calls

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def deliver_message(
        self, vp: int, sint: int, message_type: int, payload: bytes, done: Done
    ) -> None:
        if self.hold_deliveries:
            self.pending.append(done)
        self._note("deliver", vp, sint, message_type, payload)
        if not self.hold_deliveries:
            done(self.deliver_code)

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        self._note("flag", vp, sint, flag)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        self.event_fds[connection_id, flag] = eventfd
        self._note("port", connection_id, flag)

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        self._note("no port", connection_id, flag)

    def call_fd(self, port: int, vp: int, sint: int, flag: int, fd: int | None) -> bool:
        self._note("call", port, vp, sint, flag, fd)
        return self.take_call_fds

    def log(self, text: str) -> None:
        self._note("log", text)

    def closed(self, reason: str) -> None:
        self._note("closed", reason)


POST = PostMessage(4, 1, 0, b"hello").encode()


async def still_served(path: Path, mode: str = "seqpacket") -> None:
    """Another guest attaches and is served: the server is alive."""
    with raw_vmm(path, mode) as vmm:
        await vmm.attach(info=VmInfo(1, 4096, bytes(16), 0, 0))
        await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
