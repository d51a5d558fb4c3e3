"""The client library: against the real server in another thread, and against a raw, rude one."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import trio

from tests.support.attach import (
    KINDS,
    RAM_SIZE,
    Bus,
    Recorder,
    count_fds,
    make_eventfd,
    make_memfd,
    running_server,
    send_raw,
)
from vmbus.attach.client.attachment import (
    HV_STATUS_INSUFFICIENT_BUFFERS,
    HV_STATUS_INVALID_CONNECTION_ID,
    HV_STATUS_INVALID_PARAMETER,
    Attachment,
    Feature,
    Region,
)
from vmbus.attach.client.channel_io import MAX_OUTGOING
from vmbus.attach.client.connect import connect_socket
from vmbus.attach.client.operator import command, query
from vmbus.attach.protocol import framing
from vmbus.attach.protocol.framing import (
    ASYNC,
    ERROR,
    REPLY,
    Frame,
    FrameReader,
    pack_frame,
    receive,
)
from vmbus.attach.protocol.limits import ALL_FEATURES, PortKind
from vmbus.attach.protocol.messages import Number, RefusedError, State
from vmbus.attach.protocol.to_server import HelloReply, JsonObject, PostMessage
from vmbus.attach.protocol.to_vmm import (
    AddEventPort,
    AddMsgPort,
    DeliverMessage,
    DelPort,
    ErrorReply,
    Log,
    PostCredit,
    SetCallFd,
    SignalFlag,
)
from vmbus.attach.server import ServerLimits
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import AttachError, ConfigError, LocalProtocolError
from vmbus.partition.transport import PartitionReset, PostedMessage

VM_ID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.fixture(autouse=True)
def _no_descriptor_is_leaked() -> Iterator[None]:
    before = count_fds(collect=True)
    yield
    assert count_fds() == before


@pytest.fixture(params=["seqpacket", "stream"])
def mode(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


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
        assert self._started.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
            self._thread.join(20)

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
            self._thread.join(20)
            assert not self._thread.is_alive()
        os.close(self.ram)


def test_a_guest_lives_a_whole_life(tmp_path: Path, mode: str) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", mode, query=lambda kind: {"kind": kind}) as server,
        Vmm(tmp_path / "s", recorder) as vmm,
    ):
        assert vmm.server_name == "vmbus"
        assert vmm.features == ALL_FEATURES
        assert vmm.post_message(4, 1, 1, b"hello") == 0
        server.call(server.bus.wait_events, 1)
        assert server.bus.events == [PostedMessage(4, 1, 1, b"hello")]
        assert server.call(server.transport.deliver, 1, 2, 1, b"answer")
        assert recorder.named("deliver") == [("deliver", 1, 2, 1, b"answer")]
        bell = server.call(server.transport.add_event_port, 17, 0)
        assert vmm.signal_event(17) == 0
        assert vmm.signal_event(17, 1) == HV_STATUS_INVALID_CONNECTION_ID
        assert os.eventfd_read(bell.fd) == 1
        os.eventfd_write(bell.fd, 0xFFFFFFFFFFFFFFFE)
        assert vmm.signal_event(17) == 0
        server.call(server.transport.remove_event_port, 17, 0)
        assert vmm.signal_event(17) == HV_STATUS_INVALID_CONNECTION_ID
        assert recorder.named("no port") == [("no port", 17, 0)]
        more = make_memfd()
        vmm.add_memory(Region(1 << 32, RAM_SIZE, more))
        vmm.remove_memory(1 << 32, RAM_SIZE)
        vmm.set_memory_table([Region(0, RAM_SIZE, more), Region(1 << 32, RAM_SIZE, more)])
        os.close(more)
        vmm.pause()
        assert vmm.state is State.PAUSED
        vmm.resume()
        vmm.reset()
        assert vmm.query("status") == {"kind": "status"}
        with pytest.raises(RefusedError) as caught:
            vmm.remove_memory(4096, 4096)
        assert caught.value.errno == errno.ENOENT
        vmm.goodbye()
        recorder.wait_for(lambda calls: any(call[0] == "closed" for call in calls))
        assert vmm.post_message(4, 1, 0, b"x") == HV_STATUS_INVALID_CONNECTION_ID
        with pytest.raises(AttachError):
            vmm.pause()
    assert vmm.fileno() == -1
    assert len(recorder.named("closed")) == 1


def test_blocking_calls_look_after_frames_while_nobody_else_does(tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", "seqpacket") as server,
        Vmm(tmp_path / "s", recorder, threaded=False) as vmm,
    ):
        server.call_sync(server.transport.report, "hello")
        vmm.pause()
        assert recorder.named("log") == [("log", "hello")]


def test_an_event_loop_can_look_after_it(tmp_path: Path, mode: str) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", mode) as server,
        Vmm(tmp_path / "s", recorder, threaded=False) as vmm,
    ):
        call = server.call_sync(server.transport.open_call, 0, 2, 5)
        server.call_sync(call.signal)
        poll = select.poll()
        poll.register(vmm.fileno(), select.POLLIN)
        while not recorder.named("flag"):
            assert poll.poll(20_000)
            assert vmm.process()
        server.stop()
        while vmm.fileno() >= 0 and poll.poll(20_000):
            if not vmm.process():
                break
        assert recorder.named("closed")
        assert not vmm.process()


def test_many_threads_share_an_attachment(tmp_path: Path) -> None:
    recorder = Recorder()
    statuses: list[int] = []
    with (
        ServerThread(tmp_path / "s", "seqpacket", query=lambda kind: {"kind": kind}) as server,
        Vmm(tmp_path / "s", recorder, threaded=False) as vmm,
    ):

        def work(number: int) -> None:
            for _ in range(20):
                while (status := vmm.post_message(4, 1, 0, b"x")) == HV_STATUS_INSUFFICIENT_BUFFERS:
                    # As the guest does; somebody's request below brings the credits.
                    time.sleep(0.001)
                statuses.append(status)
                try:
                    assert vmm.query(f"q{number}") == {"kind": f"q{number}"}
                except RefusedError as error:
                    if error.errno != errno.EBUSY:
                        raise

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert statuses == [0] * 80
        server.call(server.bus.wait_events, 80)


@pytest.mark.parametrize("take", [False, True])
def test_call_eventfds_are_watched_for_the_vmm_or_given_to_it(
    tmp_path: Path, *, take: bool
) -> None:
    recorder = Recorder()
    recorder.take_call_fds = take
    with ServerThread(tmp_path / "s", "seqpacket") as server, Vmm(tmp_path / "s", recorder) as vmm:
        call = server.call_sync(server.transport.open_call, 0, 2, 5)
        recorder.wait_for(lambda calls: any(c[0] == "call" for c in calls))
        (seen,) = recorder.named("call")
        server.call_sync(call.signal)
        if take:
            assert select.select([seen[5]], [], [], 20)[0]
            assert os.eventfd_read(seen[5]) == 1
        else:
            recorder.wait_for(lambda calls: ("flag", 0, 2, 5) in calls)
        server.call_sync(call.signal)
        server.call_sync(call.retarget, 1)
        server.call_sync(call.signal)
        recorder.wait_for(lambda calls: sum(c[0] == "call" for c in calls) == 2)
        if not take:
            recorder.wait_for(lambda calls: ("flag", 1, 2, 5) in calls)
        server.call_sync(call.close)
        recorder.wait_for(lambda calls: sum(c[0] == "call" for c in calls) == 3)
        assert recorder.named("call")[2][1:] == (seen[1], 1, 2, 5, None)
        if take:
            for _, _, _, _, _, fd in recorder.named("call")[:2]:
                os.close(fd)
        vmm.pause()


def test_flags_travel_directly_when_the_vmm_allows_it(tmp_path: Path) -> None:
    recorder = Recorder()
    sint = make_eventfd()
    with ServerThread(tmp_path / "s", "seqpacket") as server:
        vmm = Vmm(tmp_path / "s", recorder)
        with vmm as attachment:
            attachment.set_sint_fd(1, sint)
            attachment.synic_state(1, 1, 0x3001, 0x4001, 0xF3)
            call = server.call_sync(server.transport.open_call, 1, 2, 10)
            server.call_sync(call.signal)
            assert os.eventfd_read(sint) == 1
            assert os.pread(vmm.ram, 2, 0x4000 + 512) == b"\0\4"
            assert recorder.named("flag") == []
    os.close(sint)


def test_events_can_be_signalled_by_message(tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", "seqpacket") as server,
        Vmm(tmp_path / "s", recorder, signal_by_message=True) as vmm,
    ):
        bell = server.call(server.transport.add_event_port, 17, 0)
        assert vmm.signal_event(17) == 0
        assert vmm.signal_event(18) == HV_STATUS_INVALID_CONNECTION_ID
        assert select.select([bell.fd], [], [], 20)[0]
        vmm.close()
        recorder.wait_for(lambda calls: bool(calls) and calls[-1][0] == "closed")
        assert vmm.signal_event(17) == HV_STATUS_INVALID_CONNECTION_ID


def test_a_reset_calls_deliveries_off(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.hold_deliveries = True
    with ServerThread(tmp_path / "s", "seqpacket") as server, Vmm(tmp_path / "s", recorder) as vmm:
        results = []

        def deliver() -> None:
            results.append(server.call(server.transport.deliver, 0, 2, 1, b"x"))

        thread = threading.Thread(target=deliver)
        thread.start()
        recorder.wait_for(lambda calls: any(c[0] == "deliver" for c in calls))
        (done,) = recorder.pending
        assert done.pending
        vmm.reset()
        assert not done.pending
        done()
        thread.join(20)
        assert results == [False]
        assert isinstance(server.bus.events[-1], PartitionReset)


def test_the_vmm_can_come_back(tmp_path: Path) -> None:
    with ServerThread(tmp_path / "s", "seqpacket") as server:
        for life in range(1, 4):
            deadline = time.monotonic() + 20
            while True:
                try:
                    vmm = Vmm(tmp_path / "s", Recorder())
                except RefusedError as error:
                    # The server is still cleaning up after us.
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                else:
                    break
            with vmm as attachment:
                attachment.post_message(4, 1, 0, b"life")
                server.call(server.bus.wait_events, life)


def test_a_server_that_goes_is_noticed(tmp_path: Path) -> None:
    recorder = Recorder()
    with ServerThread(tmp_path / "s", "seqpacket") as server, Vmm(tmp_path / "s", recorder) as vmm:
        server.stop()
        recorder.wait_for(lambda calls: bool(calls) and calls[-1][0] == "closed")
        assert "goodbye" in recorder.calls[-1][1]
        with pytest.raises(AttachError, match="goodbye"):
            vmm.reset()


def test_posts_beyond_the_credits_are_for_the_guest_to_repeat(tmp_path: Path) -> None:
    gate = threading.Event()

    async def handler(transport: SocketTransport) -> None:
        await transport.add_message_port(4)
        async for event in transport.incoming():
            await trio.to_thread.run_sync(gate.wait)
            event.done()

    limits = ServerLimits(post_credits=4)
    with (
        ServerThread(tmp_path / "s", "seqpacket", handler=handler, limits=limits),
        Vmm(tmp_path / "s", Recorder()) as vmm,
    ):
        statuses = [vmm.post_message(4, 1, 0, b"x") for _ in range(10)]
        assert statuses[:4] == [0] * 4
        assert HV_STATUS_INSUFFICIENT_BUFFERS in statuses
        gate.set()
        deadline = time.monotonic() + 20
        while vmm.post_message(4, 1, 0, b"x"):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert vmm.post_message(5, 1, 0, b"") == HV_STATUS_INVALID_CONNECTION_ID
        assert vmm.post_message(4, 0, 0, b"") == HV_STATUS_INVALID_PARAMETER
        assert vmm.post_message(4, 1 << 31, 0, b"") == HV_STATUS_INVALID_PARAMETER
        assert vmm.post_message(4, 1, 0, bytes(241)) == HV_STATUS_INVALID_PARAMETER


def test_operators_ask_and_command(tmp_path: Path, mode: str) -> None:
    big = {"x": "y" * 100_000}
    options: dict[str, Any] = {"query": lambda _: big, "command": lambda value: {"did": value}}
    with ServerThread(tmp_path / "s", mode, **options):
        assert query(tmp_path / "s", "all") == big
        assert command(tmp_path / "s", {"a": 1}) == {"did": {"a": 1}}
        with pytest.raises(RefusedError, match="EMSGSIZE"):
            query(tmp_path / "s", "")
        with Vmm(tmp_path / "s", Recorder()) as vmm:
            assert vmm.query("all") == big


def test_nobody_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="No such file"):
        query(tmp_path / "s", "all")
    with pytest.raises(AttachError, match="No such file"):
        Attachment.connect(tmp_path / "s", Recorder(), mode="stream")
    with pytest.raises(ConfigError, match="mode"):
        connect_socket(tmp_path / "s", "datagram")


# -- a rude server -------------------------------------------------------------------------------


class RudeServer:
    """The other end of a client's socket, under the test's control; frames are read by hand."""

    def __init__(self, mode: str = "seqpacket") -> None:
        self.client, self.sock = socket.socketpair(socket.AF_UNIX, KINDS[mode])
        self.sock.settimeout(20)
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
        thread.join(20)
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


@pytest.fixture
def rude(mode: str) -> Iterator[RudeServer]:
    server = RudeServer(mode)
    yield server
    server.close()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def attached(rude: RudeServer, recorder: Recorder) -> Iterator[Attachment]:
    with rude.attach(recorder) as attachment:
        yield attachment


@pytest.mark.parametrize(
    "reply",
    [
        HelloReply(2, 64, 0, 32768, 1, ""),
        HelloReply(1, 64, 1 << 63, 32768, 1, ""),
        HelloReply(1, 64, 0, 32768, 0, ""),
    ],
)
def test_a_server_that_answers_hello_beyond_the_offer_is_left(
    rude: RudeServer, recorder: Recorder, reply: HelloReply
) -> None:
    thread = threading.Thread(target=lambda: rude.reply(rude.receive(), reply.encode()))
    thread.start()
    with pytest.raises(AttachError, match="HELLO reply"):
        Attachment.connect(rude.client, recorder)
    thread.join(20)
    with pytest.raises(EOFError):
        rude.receive()


def test_a_server_that_says_nothing_is_given_up(rude: RudeServer, recorder: Recorder) -> None:
    with pytest.raises(AttachError, match="no answer"):
        Attachment.connect(rude.client, recorder, timeout=0.05)


def test_a_late_answer_is_dropped(attached: Attachment, rude: RudeServer) -> None:
    with pytest.raises(AttachError, match="no answer"):
        attached.query("slow", timeout=0.05)
    frame = rude.receive()
    rude.send(Number.QUERY, b"", flags=REPLY, seq=frame.seq, fds=(rude.eventfd(),))
    assert attached.process()
    assert rude.ask(attached, Number.ADD_MSG_PORT, AddMsgPort(1).encode()) == 0


def test_ports_are_checked(attached: Attachment, rude: RudeServer, recorder: Recorder) -> None:
    one = AddMsgPort(1).encode()
    assert rude.ask(attached, Number.ADD_MSG_PORT, one) == 0
    assert rude.ask(attached, Number.ADD_MSG_PORT, one) == errno.EEXIST
    port = AddEventPort(17, 0).encode()
    fd = rude.eventfd()
    pipe, other = os.pipe()
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port) == errno.EINVAL
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(pipe,)) == errno.EINVAL
    os.close(pipe)
    os.close(other)
    recorder.raise_on["port"] = OSError(errno.ENOSPC, "no slot")
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == errno.ENOSPC
    recorder.raise_on["port"] = ZeroDivisionError()
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == errno.EIO
    recorder.raise_on.clear()
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == 0
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == errno.EEXIST
    gone = DelPort(17, 0, PortKind.EVENT).encode()
    assert rude.ask(attached, Number.DEL_PORT, gone) == 0
    assert rude.ask(attached, Number.DEL_PORT, gone) == errno.ENOENT
    gone = DelPort(1, 0, PortKind.MESSAGE).encode()
    assert rude.ask(attached, Number.DEL_PORT, gone) == 0
    assert rude.ask(attached, Number.DEL_PORT, gone) == errno.ENOENT
    call = SetCallFd(3, 0, 2, 1).encode()
    assert rude.ask(attached, Number.SET_CALL_FD, call) == errno.ENOENT
    assert rude.ask(attached, Number.SET_CALL_FD, call, fds=(fd,)) == 0


def test_ports_are_limited(
    attached: Attachment, rude: RudeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.attach.client.ports.MAX_PORTS", 1)
    fd = rude.eventfd()
    codes = []
    for number in (1, 2):
        codes += [
            rude.ask(attached, Number.ADD_MSG_PORT, AddMsgPort(number).encode()),
            rude.ask(attached, Number.ADD_EVENT_PORT, AddEventPort(number, 0).encode(), fds=(fd,)),
            rude.ask(attached, Number.SET_CALL_FD, SetCallFd(number, 0, 2, 1).encode(), fds=(fd,)),
        ]
    assert codes == [0, 0, 0, errno.ENOSPC, errno.ENOSPC, errno.ENOSPC]
    # Replacing is not adding.
    again = SetCallFd(1, 1, 2, 1).encode()
    assert rude.ask(attached, Number.SET_CALL_FD, again, fds=(fd,)) == 0


@pytest.mark.parametrize(
    ("kind", "payload", "flags", "code"),
    [
        (Number.POST_MESSAGE, b"", 0, errno.ENOSYS),
        (0x4242, b"", 0, errno.ENOSYS),
        (Number.SIGNAL_FLAG, SignalFlag(0, 2, 1).encode(), 0, errno.EPROTO),
        (Number.ADD_MSG_PORT, b"", 0, errno.EMSGSIZE),
        (Number.DELIVER_MESSAGE, DeliverMessage(2, 2, 1, b"").encode(), 0, errno.EINVAL),
        (Number.DELIVER_MESSAGE, DeliverMessage(0, 16, 1, b"").encode(), 0, errno.EINVAL),
    ],
)
def test_a_bad_request_is_refused(
    attached: Attachment, rude: RudeServer, kind: int, payload: bytes, flags: int, code: int
) -> None:
    assert rude.ask(attached, kind, payload, flags=flags) == code


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Number.SIGNAL_FLAG, b"short"),
        (Number.SIGNAL_FLAG, SignalFlag(2, 2, 1).encode()),
        (Number.LOG, b"\0\0\0\0\x1b"),
        (0x4242, b""),
    ],
)
def test_a_bad_asynchronous_message_is_dropped(
    attached: Attachment, rude: RudeServer, recorder: Recorder, kind: int, payload: bytes
) -> None:
    rude.send(kind, payload, flags=ASYNC)
    assert attached.process()
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("kind", "payload", "flags", "text"),
    [
        (Number.RESET, b"", REPLY, "nothing was asked"),
        (Number.ADD_MSG_PORT, b"", ASYNC, "async flag"),
        (Number.POST_CREDIT, PostCredit(1).encode(), ASYNC, "more than was taken"),
        (Number.LOG, b"", ASYNC | REPLY, "flags"),
    ],
)
def test_a_server_that_cannot_be_answered_is_left(
    attached: Attachment,
    rude: RudeServer,
    recorder: Recorder,
    kind: int,
    payload: bytes,
    flags: int,
    text: str,
) -> None:
    rude.send(Number.LOG, Log(0, "before").encode(), flags=ASYNC)
    rude.send(kind, payload, flags=flags, fds=(rude.eventfd(),) if flags == REPLY else ())
    while attached.process():
        pass
    assert recorder.calls[0] == ("log", "before")
    assert recorder.calls[-1][0] == "closed"
    assert text in recorder.calls[-1][1]


@pytest.mark.parametrize("wrong", ["kind", "fds", "error", "json", "memfd", "both"])
def test_a_server_that_answers_nonsense_is_left_or_told_apart(
    attached: Attachment, rude: RudeServer, wrong: str
) -> None:
    fd = rude.eventfd()

    def answer() -> None:
        frame = rude.receive()
        if wrong == "kind":
            rude.send(Number.RESET, flags=REPLY, seq=frame.seq)
        elif wrong == "fds":
            rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(fd, fd))
        elif wrong == "error":
            rude.send(frame.kind, b"\0\0\0\0", flags=REPLY | ERROR, seq=frame.seq)
        elif wrong == "json":
            rude.send(frame.kind, b"[]", flags=REPLY, seq=frame.seq)
        elif wrong == "memfd":
            rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(fd,))
        else:
            rude.send(frame.kind, b"{}", flags=REPLY, seq=frame.seq, fds=(fd,))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(AttachError):
        attached.query("x")
    thread.join(20)


def test_two_replies_of_which_one_is_too_many_do_not_leak(
    attached: Attachment, rude: RudeServer
) -> None:
    fd = rude.eventfd()
    for seq in (1000, 1001):
        rude.send(Number.QUERY, flags=REPLY, seq=seq, fds=(fd,))
    assert not attached.process()


def test_a_delegate_that_fails_refuses_the_delivery(
    attached: Attachment, rude: RudeServer, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.hold_deliveries = True
    recorder.raise_on["deliver"] = ZeroDivisionError("a bug")
    message = DeliverMessage(0, 2, 1, b"x").encode()
    assert rude.ask(attached, Number.DELIVER_MESSAGE, message) == errno.EIO
    assert "a bug" in caplog.text
    recorder.raise_on["log"] = ZeroDivisionError("another bug")
    rude.send(Number.LOG, Log(0, "x").encode(), flags=ASYNC)
    assert attached.process()
    assert "another bug" in caplog.text


def test_a_delegate_that_fails_on_a_call_is_logged(
    attached: Attachment, rude: RudeServer, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    fd = rude.eventfd()
    assert rude.ask(attached, Number.SET_CALL_FD, SetCallFd(3, 0, 2, 1).encode(), fds=(fd,)) == 0
    recorder.raise_on["flag"] = ZeroDivisionError("a bug")
    os.eventfd_write(fd, 1)
    while not recorder.named("flag"):
        assert attached.process()
    assert "a bug" in caplog.text
    recorder.raise_on.clear()
    # Somebody else has read the eventfd by the time we look.
    attached._ports.called(next(iter(attached._ports._watched)))
    attached._ports.called(-5)
    assert len(recorder.named("flag")) == 1


@pytest.mark.parametrize("code", [0, errno.ENXIO])
def test_deliveries_are_answered_by_any_thread(
    attached: Attachment, rude: RudeServer, recorder: Recorder, code: int
) -> None:
    recorder.hold_deliveries = True
    rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"x").encode(), seq=9)
    assert attached.process()
    thread = threading.Thread(target=recorder.pending[0], args=(code,))
    thread.start()
    thread.join(20)
    frame = rude.receive()
    assert (frame.kind, frame.seq) == (Number.DELIVER_MESSAGE, 9)
    assert bool(frame.flags & ERROR) == bool(code)


def test_deliveries_that_cross_a_reset_are_called_off(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    def answer() -> None:
        frame = rude.receive()
        rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"x").encode(), seq=9)
        refused = rude.receive()
        assert ErrorReply.decode_untrusted(refused.payload).errno == errno.ECANCELED
        rude.reply(frame)

    thread = threading.Thread(target=answer)
    thread.start()
    attached.reset()
    thread.join(20)
    assert recorder.calls == []


def test_a_delegate_must_not_block(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    problems: list[Exception] = []

    def log(text: str) -> None:
        for function in (attached.pause, attached.run, attached.process):
            try:
                function()
            except LocalProtocolError as error:
                problems.append(error)
        attached.close("enough")

    recorder.log = log  # type: ignore[method-assign]
    rude.send(Number.LOG, Log(0, "x").encode(), flags=ASYNC)
    assert not attached.process()
    assert len(problems) == 1
    assert recorder.calls == [("closed", "enough")]
    attached.close()


def test_a_full_socket_makes_the_guest_repeat_and_replies_wait(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    recorder.hold_deliveries = True
    assert rude.ask(attached, Number.ADD_MSG_PORT, AddMsgPort(4).encode()) == 0
    payload = DeliverMessage(0, 2, 1, b"").encode()
    count = 3000
    seq = 0
    while seq < count:
        try:
            rude.sock.setblocking(False)
            rude.send(Number.DELIVER_MESSAGE, payload, seq=seq)
            seq += 1
        except BlockingIOError:
            assert attached.process()
    while len(recorder.pending) < count:
        assert attached.process()
    rude.sock.settimeout(20)
    for done in recorder.pending:
        done(errno.ENXIO)
    assert attached.post_message(4, 1, 0, b"x") == HV_STATUS_INSUFFICIENT_BUFFERS
    for expected in range(count):
        while True:
            assert attached.process()
            rude.sock.setblocking(False)
            try:
                frame = rude.receive()
            except BlockingIOError:
                continue
            break
        assert frame.seq == expected
    assert attached.process()
    assert attached.post_message(4, 1, 0, b"x") == 0
    rude.sock.settimeout(20)
    assert PostMessage.decode_untrusted(rude.receive().payload).payload == b"x"


def test_a_server_that_never_reads_is_left(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    rude.sock.setblocking(False)
    bad = pack_frame(Number.ADD_MSG_PORT, 0, 1, b"")
    for _ in range(MAX_OUTGOING):
        try:
            rude.sock.send(bad)
        except BlockingIOError:
            if not attached.process():
                break
        except BrokenPipeError:
            break
    while attached.process():
        pass
    assert recorder.calls == [("closed", "the server does not read")]


def test_a_delivery_answered_to_a_server_that_never_reads_closes(
    attached: Attachment, rude: RudeServer, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.attach.client.channel_io.MAX_OUTGOING", 10)
    recorder.hold_deliveries = True
    rude.sock.setblocking(False)
    sent = 0
    while not recorder.named("closed"):
        try:
            rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"").encode(), seq=sent)
            sent += 1
        except (BlockingIOError, BrokenPipeError):
            sent += 0
        attached.process()
        while recorder.pending:
            recorder.pending.pop()()


def test_queued_descriptors_are_duplicated(attached: Attachment, rude: RudeServer) -> None:
    with pytest.raises(LocalProtocolError, match="regions"):
        attached.set_memory_table([])
    rude.sock.setblocking(False)
    filler = pack_frame(Number.SIGNAL_EVENT, ASYNC, 0, bytes(8))
    while attached._io.try_send(filler):
        pass
    fd = make_memfd()
    with pytest.raises(AttachError, match="no answer"):
        attached.add_memory(Region(1 << 32, RAM_SIZE, fd), timeout=0.05)
    os.close(fd)
    attached._io.send(filler, key="same")
    attached._io.send(filler, key="same")
    got: list[Frame] = []
    while not got or got[-1].kind != Number.ADD_MEM:
        try:
            got.append(rude.receive())
        except BlockingIOError:
            assert attached.process()
    attached.process()
    assert rude.receive().kind == Number.SIGNAL_EVENT
    with pytest.raises(BlockingIOError):
        rude.receive()


def test_a_dead_server_is_noticed_by_those_who_send(rude: RudeServer, recorder: Recorder) -> None:
    recorder.hold_deliveries = True
    attachment = rude.attach(recorder)
    assert rude.ask(attachment, Number.ADD_MSG_PORT, AddMsgPort(4).encode()) == 0
    rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"x").encode(), seq=9)
    assert attachment.process()
    rude.close()
    assert attachment.post_message(4, 1, 0, b"x") == HV_STATUS_INVALID_CONNECTION_ID
    recorder.pending[0]()
    with pytest.raises(AttachError, match=r"closed|lost"):
        attachment.pause()
    assert not attachment.process()
    attachment.close()
    assert len(recorder.named("closed")) == 1
    with pytest.raises(AttachError, match="closed"):
        attachment._io.try_send(b"x")
    attachment._io.close()
    attachment._io.shutdown()


@pytest.mark.parametrize("script", ["eof", "error", "type", "framing", "hello", "silence"])
def test_an_operator_is_told_what_is_wrong_with_the_server(rude: RudeServer, script: str) -> None:
    def serve() -> None:
        frame = rude.receive()
        if script == "eof":
            rude.sock.close()
        elif script == "error":
            rude.send(
                frame.kind,
                ErrorReply(errno.EPERM, "no").encode(),
                flags=REPLY | ERROR,
                seq=frame.seq,
            )
        elif script == "type":
            rude.send(Number.LOG, flags=ASYNC)
        elif script == "framing":
            rude.sock.send(b"\xff" * 20)
        elif script == "hello":
            rude.reply(frame, b"nonsense")

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AttachError):
        query(rude.client, "x", timeout=0.05 if script == "silence" else 20)
    thread.join(20)


def test_an_operator_does_not_wait_for_ever_to_send(rude: RudeServer) -> None:
    huge = {"x": "y" * 32_000}
    rude.client.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            rude.client.send(bytes(1000))
    with pytest.raises(AttachError, match="does not answer"):
        command(rude.client, huge, timeout=0.05)


def test_a_huge_or_odd_reply_descriptor_is_not_read(rude: RudeServer) -> None:
    huge = os.memfd_create("huge")
    os.ftruncate(huge, 1 << 40)

    def serve() -> None:
        rude.reply(rude.receive(), HelloReply(1, 64, 0, 32768, 1, "").encode())
        frame = rude.receive()
        rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(huge,))

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AttachError, match="at most"):
        query(rude.client, "x")
    thread.join(20)
    os.close(huge)


def test_a_reply_memfd_that_cannot_be_read_is_an_error(rude: RudeServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("{}")
    write_only = os.open(tmp_path / "f", os.O_WRONLY)

    def serve() -> None:
        rude.reply(rude.receive(), HelloReply(1, 64, 0, 32768, 1, "").encode())
        frame = rude.receive()
        rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(write_only,))

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AttachError, match="JSON reply"):
        query(rude.client, "x")
    thread.join(20)
    os.close(write_only)


def test_a_connected_descriptor_can_be_adopted(recorder: Recorder) -> None:
    server = RudeServer()

    def serve() -> None:
        server.reply(server.receive(), HelloReply(1, 64, 0, 32768, 1, "").encode())
        server.reply(server.receive(), JsonObject({"a": 1}).encode())
        server.reply(server.receive())

    thread = threading.Thread(target=serve)
    thread.start()
    assert query(server.client.detach(), "x") == {"a": 1}
    thread.join(20)
    server.close()


def test_a_refused_memory_table_can_be_repeated(tmp_path: Path) -> None:
    def states() -> list[State]:
        return [vmm.state]

    with (
        ServerThread(tmp_path / "s", "seqpacket"),
        Attachment.connect(tmp_path / "s", Recorder()) as vmm,
    ):
        vmm.vm_info(1)
        fd = make_memfd(seal=False)
        with pytest.raises(RefusedError, match="F_SEAL_SHRINK"):
            vmm.set_memory_table([Region(0, RAM_SIZE, fd)])
        os.close(fd)
        assert states() == [State.DESCRIBED]
        fd = make_memfd()
        vmm.set_memory_table([Region(0, RAM_SIZE, fd)])
        with pytest.raises(RefusedError, match="overlap"):
            vmm.set_memory_table([Region(0, RAM_SIZE, fd), Region(0, RAM_SIZE, fd)])
        os.close(fd)
        assert states() == [State.ATTACHED]


def test_frames_that_go_out_in_parts_arrive_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = framing.send

    def dribble(sock: socket.socket, data: Any, fds: Any = ()) -> int:
        return real(sock, data[:7], fds)

    monkeypatch.setattr("vmbus.attach.client.channel_io.send", dribble)
    with (
        ServerThread(tmp_path / "s", "stream", query=lambda kind: {"kind": kind}) as server,
        Vmm(tmp_path / "s", Recorder()) as vmm,
    ):
        assert vmm.query("a kind that is longer") == {"kind": "a kind that is longer"}
        while vmm.post_message(4, 1, 0, b"x" * 240):
            time.sleep(0.001)
        server.call(server.bus.wait_events, 1)
        assert server.bus.events == [PostedMessage(4, 1, 0, b"x" * 240)]


def test_a_server_that_hangs_up_with_unread_frames_is_noticed(
    rude: RudeServer, recorder: Recorder
) -> None:
    attachment = rude.attach(recorder)
    assert rude.ask(attachment, Number.ADD_MSG_PORT, AddMsgPort(4).encode()) == 0
    assert attachment.post_message(4, 1, 0, b"x") == 0
    rude.close()
    assert not attachment.process()
    assert "reset" in recorder.calls[-1][1]


def test_a_signal_that_cannot_even_be_queued_fails(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rude = RudeServer()
    with rude.attach(recorder) as attachment:
        attachment._signal_by_message = True
        port = AddEventPort(17, 0).encode()
        assert rude.ask(attachment, Number.ADD_EVENT_PORT, port, fds=(rude.eventfd(),)) == 0
        monkeypatch.setattr("vmbus.attach.client.channel_io.MAX_OUTGOING", 0)
        while attachment._io.try_send(pack_frame(Number.SIGNAL_EVENT, ASYNC, 0, bytes(8))):
            pass
        assert attachment.signal_event(17) == HV_STATUS_INVALID_CONNECTION_ID
        with pytest.raises(AttachError, match="does not read"):
            attachment.pause()
    rude.close()
