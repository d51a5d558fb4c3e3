"""The two ends of the client library: a server in a thread, a VMM, and a server played by hand."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import trio

from tests.support.attach import (
    KINDS,
    RAM_SIZE,
    Bus,
    Recorder,
    make_eventfd,
    make_memfd,
    running_server,
    send_raw,
)
from tests.support.patience import PATIENCE
from vmbus.attach.client.attachment import Attachment, Feature, Region
from vmbus.attach.protocol.framing import ERROR, REPLY, Frame, FrameReader, pack_frame, receive
from vmbus.attach.protocol.limits import ALL_FEATURES
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import HelloReply
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.attach.server.transport import SocketTransport

VM_ID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


class ServerThread:
    """The real server in a trio loop of its own; ``call`` runs something in it."""

    def __init__(self, path: Path, mode: str, **options: Any) -> None:
        self.path = path
        self.bus = Bus()
        self._mode = mode
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._main))
        self._token: trio.lowlevel.TrioToken
        self._stop: trio.Event

    async def _main(self) -> None:
        self._stop = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        handler = self._options.pop("handler", self.bus)
        async with running_server(self.path, handler, mode=self._mode, **self._options):
            self._started.set()
            await self._stop.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(PATIENCE)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
            self._thread.join(PATIENCE)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def call_sync(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    @property
    def transport(self) -> SocketTransport:
        return self.bus.transport


class Vmm:
    """An attachment with RAM and a thread that looks after it."""

    def __init__(
        self, target: Any, recorder: Recorder, *, threaded: bool = True, **options: Any
    ) -> None:
        self.ram = make_memfd()
        try:
            self.attachment = Attachment.connect(target, recorder, **options)
            try:
                self.attachment.vm_info(2, vm_id=VM_ID)
                self.attachment.set_memory_table([Region(0, RAM_SIZE, self.ram)])
            except BaseException:
                self.attachment.close()
                raise
        except BaseException:
            os.close(self.ram)
            raise
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self.attachment.run)
            self._thread.start()

    def __enter__(self) -> Attachment:
        return self.attachment

    def __exit__(self, *exc: object) -> None:
        self.attachment.close()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()
        os.close(self.ram)


class RudeServer:
    """The other end of a client's socket, under the test's control; frames are read by hand."""

    def __init__(self, mode: str = "seqpacket") -> None:
        self.client, self.sock = socket.socketpair(socket.AF_UNIX, KINDS[mode])
        self.sock.settimeout(PATIENCE)
        self.reader = FrameReader(stream=mode == "stream")
        self.fds: list[int] = []

    def eventfd(self) -> int:
        self.fds.append(make_eventfd())
        return self.fds[-1]

    def close(self) -> None:
        self.reader.close()
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def receive(self) -> Frame:
        while (frame := self.reader.next_frame()) is None:
            if not receive(self.sock, self.reader):
                raise EOFError
        frame.close()
        return frame

    def send(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        flags: int = 0,
        seq: int = 1,
        fds: tuple[int, ...] = (),
    ) -> None:
        send_raw(self.sock, pack_frame(kind, flags, seq, payload, len(fds)), fds)

    def reply(self, frame: Frame, payload: bytes = b"") -> None:
        self.send(frame.kind, payload, flags=REPLY, seq=frame.seq)

    def attach(self, recorder: Recorder, features: Feature = ALL_FEATURES) -> Attachment:
        """Play the server of a well-behaved boot."""
        ram = make_memfd()

        def serve() -> None:
            for _ in range(3):
                frame = self.receive()
                reply = HelloReply(1, 64, features, 32768, 2, "rude").encode()
                self.reply(frame, reply if frame.kind == Number.HELLO else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        attachment = Attachment.connect(self.client, recorder)
        attachment.vm_info(2)
        attachment.set_memory_table([Region(0, RAM_SIZE, ram)])
        thread.join(PATIENCE)
        os.close(ram)
        return attachment

    def ask(
        self,
        attachment: Attachment,
        kind: int,
        payload: bytes,
        *,
        fds: tuple[int, ...] = (),
        flags: int = 0,
    ) -> int:
        """Send a request, have the client process it, return 0 or the errno of its answer."""
        self.send(kind, payload, fds=fds, flags=flags, seq=77)
        assert attachment.process()
        frame = self.receive()
        assert (frame.kind, frame.seq) == (kind, 77)
        assert frame.flags & REPLY
        if frame.flags & ERROR:
            return ErrorReply.decode_untrusted(frame.payload).errno
        assert frame.payload == b""
        return 0
