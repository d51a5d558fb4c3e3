"""The server of ``vmbus-user`` against a VMM that speaks raw frames, kindly and otherwise."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.attach import (
    HELLO,
    INFO,
    RAM_SIZE,
    TABLE,
    Bus,
    RawVmm,
    count_fds,
    done_of,
    make_eventfd,
    make_memfd,
    raw_vmm,
    running_server,
)
from vmbus.attach.protocol import framing
from vmbus.attach.protocol.framing import ASYNC, ERROR, HEADER, REPLY, pack_frame
from vmbus.attach.protocol.limits import MAX_PAYLOAD, Feature, GoodbyeReason, PortKind, Role
from vmbus.attach.protocol.messages import RESERVED, Number
from vmbus.attach.protocol.to_server import (
    Goodbye,
    Hello,
    HelloReply,
    MemoryRegion,
    PostMessage,
    RemMem,
    Reset,
    SetMemTable,
    SetSintFd,
    SignalEvent,
    SynicState,
    VmInfo,
)
from vmbus.attach.protocol.to_vmm import (
    AddEventPort,
    DeliverMessage,
    DelPort,
    ErrorReply,
    Log,
    PostCredit,
    SetCallFd,
    SignalFlag,
)
from vmbus.attach.server import ServerLimits, serve
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import AttachError, ConfigError, VMBusError
from vmbus.partition.transport import (
    MemoryRemoval,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
)

POST = PostMessage(4, 1, 0, b"hello").encode()
SLOW = ServerLimits(
    hello_timeout=0.05, write_timeout=0.05, reply_timeout=0.1, drain_timeout=0.1, handler_grace=0.1
)


@pytest.fixture(autouse=True)
async def _no_descriptor_is_leaked() -> Any:
    before = count_fds(collect=True)
    yield
    assert count_fds() == before


@pytest.fixture(params=["seqpacket", "stream"])
def mode(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = make_eventfd()
    yield fd
    os.close(fd)


async def still_served(path: Path, mode: str = "seqpacket") -> None:
    """Another guest attaches and is served: the server is alive."""
    with raw_vmm(path, mode) as vmm:
        await vmm.attach(info=VmInfo(1, 4096, bytes(16), 0, 0))
        await vmm.ok(Number.GOODBYE, Goodbye(0).encode())


# -- attaching -----------------------------------------------------------------------------------


async def test_a_guest_attaches_posts_is_delivered_to_and_leaves(tmp_path: Path, mode: str) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            transport = bus.transport
            assert (transport.name, transport.vp_count) == ("vmm", 2)
            assert transport.memory.size == RAM_SIZE
            transport.memory.write(0x1234, b"written")
            assert os.pread(vmm.memfd, 7, 0x1234) == b"written"
            await vmm.post(Number.POST_MESSAGE, POST)
            await bus.wait_events(1)
            assert bus.events == [PostedMessage(4, 1, 0, b"hello")]
            credit = await vmm.expect(Number.POST_CREDIT)
            assert credit.flags == ASYNC
            assert PostCredit.decode_untrusted(credit.payload).count == 1
            results = []
            async with trio.open_nursery() as nursery:

                async def deliver() -> None:
                    results.append(await transport.deliver(1, 2, 1, b"reply"))

                nursery.start_soon(deliver)
                frame = await vmm.expect(Number.DELIVER_MESSAGE)
                assert DeliverMessage.decode_untrusted(frame.payload) == DeliverMessage(
                    1, 2, 1, b"reply"
                )
                await vmm.answer(frame)
            assert results == [True]
            await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
            assert await vmm.receive() is None
            assert bus.ended.is_set()
            assert transport.memory.size == 0


async def test_the_first_memory_table_is_answered_after_the_ports_are_there(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            vmm.memfd = make_memfd()
            seq = await vmm.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            for connection_id in (1, 4):
                frame = await vmm.expect(Number.ADD_MSG_PORT)
                assert frame.payload == connection_id.to_bytes(4, "little")
                await vmm.answer(frame)
            await vmm.expect_answer(Number.SET_MEM_TABLE, seq)


async def test_hello_answers_with_a_subset_of_the_features(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus(), name="server") as path:
        with raw_vmm(path) as vmm:
            offered = Hello(1, 9, 0xFF00 | Feature.LOG, 64, Role.VMM, "x")
            reply = HelloReply.decode_untrusted(await vmm.ok(Number.HELLO, offered.encode()))
            assert reply == HelloReply(1, 64, Feature.LOG, MAX_PAYLOAD, 64, "server")


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (Hello(2, 3, 0, 1, 0, ""), errno.EPROTONOSUPPORT),
        (Hello(0, 0, 0, 1, 0, ""), errno.EPROTONOSUPPORT),
        (Hello(1, 1, 0, 0, 0, ""), errno.EINVAL),
        (Hello(1, 1, 0, 1 << 31, 0, ""), errno.E2BIG),
        (Hello(1, 1, 0, 1, 7, ""), errno.EINVAL),
    ],
)
async def test_a_refused_hello_may_be_repeated(tmp_path: Path, hello: Hello, code: int) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            assert (await vmm.refused(Number.HELLO, hello.encode()))[0] == code
            await vmm.attach()


async def test_a_second_hello_is_out_of_order(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            assert (await vmm.refused(Number.HELLO, HELLO.encode()))[0] == errno.EPROTO


async def test_requests_before_their_time_are_refused_and_do_no_harm(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            for kind in (Number.VM_INFO, Number.SET_MEM_TABLE, Number.RESET, Number.GOODBYE):
                assert (await vmm.refused(kind))[0] == errno.EPROTO
            await vmm.post(Number.POST_MESSAGE, POST)
            await vmm.greet()
            for kind in (Number.SET_MEM_TABLE, Number.PAUSE, Number.SYNIC_STATE):
                assert (await vmm.refused(kind))[0] == errno.EPROTO
            assert (await vmm.refused(Number.COMMAND, b"{}"))[0] == errno.EPERM
            await vmm.ok(Number.VM_INFO, INFO.encode())
            assert (await vmm.refused(Number.VM_INFO, INFO.encode()))[0] == errno.EPROTO
        with raw_vmm(path) as vmm:
            await vmm.attach()
            assert (await vmm.refused(Number.RESUME))[0] == errno.EPROTO


async def test_unknown_and_reserved_types_are_not_implemented(tmp_path: Path, eventfd: int) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            for kind in (*RESERVED, Number.DELIVER_MESSAGE, 0, 0x7FFF, 0xFFFF):
                assert (await vmm.refused(kind, b"payload"))[0] == errno.ENOSYS
            before = count_fds()
            assert (await vmm.refused(0x4242, fds=(eventfd,) * 64))[0] == errno.ENOSYS
            assert count_fds() == before
            await vmm.post(0x4242, b"ignored")
            await vmm.ok(Number.VM_INFO, INFO.encode())


async def test_a_vm_is_attached_once_and_may_come_back(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as first:
            await first.attach()
            with raw_vmm(path) as second:
                await second.greet()
                assert (await second.refused(Number.VM_INFO, INFO.encode()))[0] == errno.EBUSY
                await first.ok(Number.GOODBYE, Goodbye(0).encode())
                await second.ok(Number.VM_INFO, INFO.encode())
        with raw_vmm(path) as third:
            with trio.fail_after(10):
                await third.greet()
                while (await third.ask(Number.VM_INFO, INFO.encode())).flags & ERROR:
                    await trio.sleep(0.01)
        assert len(bus.transports) == 1


async def test_a_vm_may_not_have_more_processors_than_it_said(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            info = VmInfo(65, 4096, bytes(16), 0, 0)
            assert (await vmm.refused(Number.VM_INFO, info.encode()))[0] == errno.EINVAL


async def test_who_says_nothing_is_disconnected(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus(), limits=SLOW) as path:
        with raw_vmm(path) as vmm:
            assert await vmm.receive() is None


async def test_a_connected_socket_serves_one_guest(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bus = Bus()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await serve(theirs, bus)
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        vmm = RawVmm(ours)
        await vmm.attach()
        vmm.close()
        await trio.sleep(20)
    assert bus.ended.is_set()


async def test_the_server_can_leave_with_its_guest(tmp_path: Path) -> None:
    bus = Bus()
    with trio.fail_after(20):
        async with running_server(tmp_path / "s", bus, exit_after_guest=True) as path:
            with raw_vmm(path) as vmm:
                # Not a guest: the server stays.
                await vmm.greet()
            with raw_vmm(path) as vmm:
                await vmm.attach()
            with trio.move_on_after(5):
                while True:
                    await trio.sleep(0.01)
                    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    probe.connect(os.fspath(path))
                    alive = RawVmm(probe)
                    answer = None
                    with trio.move_on_after(0.3):
                        await alive.send(Number.HELLO, HELLO.encode())
                        answer = await alive.receive()
                    alive.close()
                    if answer is None:
                        break
            assert bus.ended.is_set()


async def test_connections_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    limits = ServerLimits(max_connections=1)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as first:
            await first.greet()
            with raw_vmm(path) as second:
                await second.send(Number.HELLO, HELLO.encode())
                with trio.move_on_after(0.05) as scope:
                    await second.receive()
                assert scope.cancelled_caught
                first.close()
                await second.expect_answer(Number.HELLO, 1)


# -- handlers ------------------------------------------------------------------------------------


async def test_a_failing_handler_hurts_only_its_guest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus()

    async def handler(transport: SocketTransport) -> None:
        if transport.vm_id == INFO.uuid:
            raise ZeroDivisionError("a bug")
        await bus(transport)

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as healthy:
            await healthy.attach(info=VmInfo(1, 4096, bytes(16), 0, 0))
            with raw_vmm(path) as vmm:
                await vmm.greet()
                await vmm.ok(Number.VM_INFO, INFO.encode())
                vmm.memfd = make_memfd()
                code, _ = await vmm.refused(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
                assert code == errno.EIO
                goodbye = await vmm.expect(Number.GOODBYE)
                assert goodbye.payload == Goodbye(GoodbyeReason.FAILURE).encode()
                assert await vmm.receive() is None
            await healthy.post(Number.POST_MESSAGE, POST)
            await healthy.expect(Number.POST_CREDIT)
    assert "a bug" in caplog.text


async def test_a_handler_that_returns_says_goodbye(tmp_path: Path) -> None:
    async def handler(transport: SocketTransport) -> None:
        async for event in transport.incoming():
            event.done()
            return

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            await vmm.post(Number.POST_MESSAGE, POST)
            await vmm.expect(Number.POST_CREDIT)
            assert (await vmm.expect(Number.GOODBYE)).payload == Goodbye(0).encode()
            assert await vmm.receive() is None


async def test_a_server_that_is_stopped_says_goodbye(tmp_path: Path) -> None:
    with raw_vmm_later(tmp_path) as vmm_of:
        async with running_server(tmp_path / "s", Bus()) as path:
            vmm = vmm_of(path)
            await vmm.attach()
        assert (await vmm.expect(Number.GOODBYE)).payload == Goodbye(
            GoodbyeReason.SHUTDOWN
        ).encode()
        assert await vmm.receive() is None


class raw_vmm_later:  # noqa: N801
    """A VMM that outlives the server."""

    def __init__(self, tmp_path: Path) -> None:
        self.vmm: RawVmm | None = None

    def __enter__(self) -> Any:
        def make(path: Path) -> RawVmm:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(os.fspath(path))
            self.vmm = RawVmm(sock)
            return self.vmm

        return make

    def __exit__(self, *exc: object) -> None:
        if self.vmm is not None:
            self.vmm.close()


async def test_a_handler_that_does_not_end_is_cancelled_when_its_guest_is_gone(
    tmp_path: Path,
) -> None:
    cancelled = trio.Event()

    async def handler(transport: SocketTransport) -> None:
        aiter(transport.incoming())
        async for _ in transport.incoming():
            pass
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with running_server(tmp_path / "s", handler, limits=SLOW) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
        with trio.fail_after(10):
            await cancelled.wait()


async def test_a_vmm_that_vanishes_breaks_what_waits_for_it(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            transport = bus.transport
            call = transport.open_call(0, 2, 1)
            async with trio.open_nursery() as nursery:

                async def deliver() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await transport.deliver(0, 2, 1, b"x")

                async def port() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await transport.add_event_port(17, 0)

                nursery.start_soon(deliver)
                nursery.start_soon(port)
                for _ in range(3):
                    await vmm.receive_and_drop()
                vmm.close()
            with trio.fail_after(10):
                await bus.ended.wait()
            call.signal()
            call.close()
            with pytest.raises(trio.BrokenResourceError):
                await transport.deliver(0, 2, 1, b"x")
            with pytest.raises(trio.BrokenResourceError):
                await transport.add_message_port(9)
            with pytest.raises(trio.BrokenResourceError):
                await transport.add_event_port(9, 0)
            late = transport.open_call(0, 2, 1)
            late.signal()
            transport.report("nobody listens")
        await still_served(path)


# -- ports ---------------------------------------------------------------------------------------


async def with_attached(path: Path, bus: Bus, vmm: RawVmm, features: Feature) -> SocketTransport:
    await vmm.attach(features)
    return bus.transport


async def test_event_ports_ring_by_eventfd_and_by_message(tmp_path: Path, mode: str) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            transport = bus.transport
            async with trio.open_nursery() as nursery:
                bells = []

                async def add() -> None:
                    bells.append(await transport.add_event_port(17, 3))

                nursery.start_soon(add)
                frame = await vmm.expect(Number.ADD_EVENT_PORT)
                assert AddEventPort.decode_untrusted(frame.payload) == AddEventPort(17, 3)
                await vmm.answer(frame)
            (bell,) = bells
            os.eventfd_write(frame.fds[0], 1)
            assert os.eventfd_read(bell.fd) == 1
            frame.close()
            with pytest.raises(AttachError, match="exists"):
                await transport.add_event_port(17, 3)
            await vmm.post(Number.SIGNAL_EVENT, SignalEvent(17, 3).encode())
            await vmm.post(Number.SIGNAL_EVENT, SignalEvent(17, 4).encode())
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(bell.fd)
            assert os.eventfd_read(bell.fd) == 1
            # A counter that is full rings all the same.
            os.eventfd_write(bell.fd, 0xFFFFFFFFFFFFFFFE)
            bell.ring()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.remove_event_port, 17, 3)
                frame = await vmm.expect(Number.DEL_PORT)
                assert DelPort.decode_untrusted(frame.payload) == DelPort(17, 3, PortKind.EVENT)
                await vmm.answer(frame)
            assert bell.fd == -1
            bell.close()
            with pytest.raises(AttachError, match="no event port"):
                await transport.remove_event_port(17, 3)


async def test_a_refused_port_is_an_error_with_the_reason(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:

                async def add() -> None:
                    with pytest.raises(AttachError, match="EEXIST"):
                        await bus.transport.add_event_port(17, 0)

                nursery.start_soon(add)
                frame = await vmm.expect(Number.ADD_EVENT_PORT)
                frame.close()
                await vmm.answer(frame, errno.EEXIST)


async def test_a_port_whose_task_was_cancelled_is_taken_back(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:

                async def add() -> None:
                    await bus.transport.add_event_port(17, 0)

                nursery.start_soon(add)
                add_frame = await vmm.expect(Number.ADD_EVENT_PORT)
                add_frame.close()
                nursery.cancel_scope.cancel()
            frame = await vmm.expect(Number.DEL_PORT)
            assert DelPort.decode_untrusted(frame.payload) == DelPort(17, 0, PortKind.EVENT)
            await vmm.answer(add_frame)
            await vmm.answer(frame)
            await vmm.ok(Number.PAUSE)


async def test_a_port_dies_quietly_with_its_vmm(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            transport = bus.transport
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.add_event_port, 17, 0)
                frame = await vmm.expect(Number.ADD_EVENT_PORT)
                frame.close()
                await vmm.answer(frame)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.remove_event_port, 17, 0)
                await vmm.expect(Number.DEL_PORT)
                vmm.close()


async def test_a_vmm_that_does_not_answer_is_disconnected(tmp_path: Path) -> None:
    bus = Bus()
    limits = ServerLimits(reply_timeout=0.1)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            with pytest.raises(trio.BrokenResourceError, match="no answer to ADD_MSG_PORT"):
                await bus.transport.add_message_port(5)
            await vmm.expect(Number.ADD_MSG_PORT)
            assert await vmm.receive() is None


# -- deliveries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENXIO, errno.ECANCELED, errno.EINVAL])
async def test_a_message_that_could_not_be_delivered_is_dropped(tmp_path: Path, code: int) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:

                async def deliver() -> None:
                    assert not await bus.transport.deliver(0, 2, 1, b"x")

                nursery.start_soon(deliver)
                await vmm.answer(await vmm.expect(Number.DELIVER_MESSAGE), code)
            assert not await bus.transport.deliver(99, 2, 1, b"x")


async def test_one_message_per_slot_is_under_way(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            transport = bus.transport
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.deliver, 0, 2, 1, b"x")
                first = await vmm.expect(Number.DELIVER_MESSAGE)
                with pytest.raises(trio.BusyResourceError):
                    await transport.deliver(0, 2, 1, b"y")
                nursery.start_soon(transport.deliver, 1, 2, 1, b"z")
                other = await vmm.expect(Number.DELIVER_MESSAGE)
                await vmm.answer(other)
                await vmm.answer(first)


async def test_a_delivery_waits_for_one_whose_task_was_cancelled(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            transport = bus.transport
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.deliver, 0, 2, 1, b"first")
                first = await vmm.expect(Number.DELIVER_MESSAGE)
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.deliver, 0, 2, 1, b"second")
                await trio.testing.wait_all_tasks_blocked()
                await vmm.answer(first)
                second = await vmm.expect(Number.DELIVER_MESSAGE)
                assert DeliverMessage.decode_untrusted(second.payload).payload == b"second"
                await vmm.answer(second)


# -- life cycle ----------------------------------------------------------------------------------


async def test_life_cycle_requests_are_answered_when_the_bus_is_done(tmp_path: Path) -> None:
    bus = Bus()
    bus.auto = False
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            expected = [PartitionReset, PartitionPaused, PartitionReset, PartitionResumed]
            kinds = [
                (Number.RESET, Reset(0).encode()),
                (Number.PAUSE, b""),
                (Number.RESET, Reset(1).encode()),
                (Number.RESUME, b""),
            ]
            for index, (kind, payload) in enumerate(kinds):
                seq = await vmm.send(kind, payload)
                await bus.wait_events(index + 1)
                assert isinstance(bus.events[index], expected[index])
                code, _ = await vmm.refused(Number.RESET, Reset(0).encode())
                assert code == errno.EBUSY
                done_of(bus.events[index])()
                done_of(bus.events[index])()
                await vmm.expect_answer(kind, seq)


async def test_a_paused_partition_is_left_alone(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            transport = bus.transport
            call, closed = transport.open_call(0, 2, 1), transport.open_call(0, 2, 9)
            await vmm.ok(Number.PAUSE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.deliver, 0, 2, 1, b"x")
                call.signal()
                call.signal()
                closed.signal()
                closed.close()
                await trio.testing.wait_all_tasks_blocked()
                await vmm.post(Number.POST_MESSAGE, POST)
                seq = await vmm.send(Number.RESUME)
                frames = [await vmm.receive() for _ in range(4)]
                got = {frame.kind: frame for frame in frames if frame is not None}
                assert set(got) == {
                    Number.SIGNAL_FLAG, Number.RESUME, Number.DELIVER_MESSAGE, Number.POST_CREDIT,
                }  # fmt: skip
                assert got[Number.RESUME].seq == seq
                assert SignalFlag.decode_untrusted(got[Number.SIGNAL_FLAG].payload) == SignalFlag(
                    0, 2, 1
                )
                await vmm.answer(got[Number.DELIVER_MESSAGE])


async def test_a_reset_while_paused_forgets_held_signals(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            call = bus.transport.open_call(0, 2, 1)
            await vmm.ok(Number.PAUSE)
            call.signal()
            await vmm.ok(Number.RESET, Reset(0).encode())
            await vmm.ok(Number.RESUME)


async def test_an_answer_that_crosses_the_goodbye_is_no_mistake(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def deliver() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await bus.transport.deliver(0, 2, 1, b"late")

                request = await vmm.expect(Number.DELIVER_MESSAGE)
                seq = await vmm.send(Number.GOODBYE, Goodbye(0).encode())
                await vmm.answer(request)
                await vmm.expect_answer(Number.GOODBYE, seq)
            assert await vmm.receive() is None


async def test_a_reset_drops_what_the_old_life_posted(tmp_path: Path) -> None:
    bus = Bus()
    gate, taken = trio.Event(), trio.Event()

    async def handler(transport: SocketTransport) -> None:
        events = transport.incoming()
        bus.transports.append(transport)
        async for event in events:
            bus.events.append(event)
            if isinstance(event, PostedMessage):
                taken.set()
                await gate.wait()
            event.done()

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            await vmm.post(Number.POST_MESSAGE, POST)
            with trio.fail_after(10):
                await taken.wait()
            for _ in range(4):
                await vmm.post(Number.POST_MESSAGE, POST)
            seq = await vmm.send(Number.RESET, Reset(0).encode())
            gate.set()
            returned = 0
            while returned < 5:
                frame = await vmm.expect(Number.POST_CREDIT)
                returned += PostCredit.decode_untrusted(frame.payload).count
            await vmm.expect_answer(Number.RESET, seq)
            assert [type(event) for event in bus.events] == [PostedMessage, PartitionReset]


# -- posts and credits ---------------------------------------------------------------------------


async def test_posts_without_credit_end_the_connection(tmp_path: Path) -> None:
    never = trio.Event()

    async def handler(transport: SocketTransport) -> None:
        async for _ in transport.incoming():
            await never.wait()

    limits = ServerLimits(post_credits=4, handler_grace=0.1)
    async with running_server(tmp_path / "s", handler, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            # One credit may come back with the message that the handler took.
            for _ in range(6):
                await vmm.post(Number.POST_MESSAGE, POST)
            while (frame := await vmm.receive()) is not None:
                assert frame.kind == Number.POST_CREDIT


async def test_every_credit_comes_back(tmp_path: Path) -> None:
    bus = Bus()
    limits = ServerLimits(post_credits=8)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            free, sent = 8, 0
            while sent < 100 or free < 8:
                while free and sent < 100:
                    await vmm.post(Number.POST_MESSAGE, POST)
                    free, sent = free - 1, sent + 1
                frame = await vmm.expect(Number.POST_CREDIT)
                free += PostCredit.decode_untrusted(frame.payload).count
            assert len(bus.events) == 100


@pytest.mark.parametrize(
    ("kind", "payload", "text"),
    [
        (Number.POST_MESSAGE, PostMessage(4, 1, 2, b"").encode(), "vp 2"),
        (Number.POST_MESSAGE, b"short", "length is 5"),
        (Number.SIGNAL_EVENT, SignalEvent(0, 0).encode(), "connection_id"),
    ],
)
async def test_a_bad_asynchronous_message_is_dropped_and_reported(
    tmp_path: Path, kind: int, payload: bytes, text: str
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.LOG)
            await vmm.post(kind, payload)
            frame = await vmm.receive()
            assert frame is not None
            if frame.kind == Number.POST_CREDIT:
                frame = await vmm.expect(Number.LOG)
            assert text in Log.decode_untrusted(frame.payload).text
            assert bus.transport.dropped_messages == 1


# -- memory --------------------------------------------------------------------------------------


def pipe_end() -> int:
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def read_only_memfd() -> int:
    fd = make_memfd()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


def write_sealed_memfd() -> int:
    fd = make_memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def o_path() -> int:
    return os.open("/", os.O_PATH)


def regular_file() -> int:
    return os.open(__file__, os.O_RDONLY)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (pipe_end, errno.EINVAL),
        (make_eventfd, errno.EINVAL),
        (o_path, errno.EINVAL),
        (regular_file, errno.EPERM),
        (lambda: make_memfd(seal=False), errno.EPERM),
        (lambda: make_memfd(RAM_SIZE // 2), errno.EINVAL),
        (read_only_memfd, errno.EACCES),
        (write_sealed_memfd, errno.EPERM),
    ],
)
async def test_a_descriptor_that_is_not_what_it_claims_is_refused(
    tmp_path: Path, make: Any, code: int
) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            fd = make()
            try:
                before = count_fds()
                got, text = await vmm.refused(Number.SET_MEM_TABLE, TABLE.encode(), fds=(fd,))
                assert (got, count_fds()) == (code, before), text
            finally:
                os.close(fd)


async def test_a_trusted_vmm_may_bring_files_that_shrink(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, trust_vmm=True) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            fd = make_memfd(seal=False)
            region = MemoryRegion(1 << 32, RAM_SIZE, 0, 0, 0).encode()
            await vmm.ok(Number.ADD_MEM, region, fds=(fd,))
            os.close(fd)
            assert bus.transport.memory.size == 2 * RAM_SIZE


@pytest.mark.parametrize(
    ("table", "nfds"),
    [
        (SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 1),)), 1),
        (SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),)), 2),
        (SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),)), 0),
    ],
)
async def test_descriptors_and_regions_must_match(
    tmp_path: Path, table: SetMemTable, nfds: int
) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            fd = make_memfd()
            code, _ = await vmm.refused(Number.SET_MEM_TABLE, table.encode(), fds=(fd,) * nfds)
            os.close(fd)
            assert code == errno.EINVAL


async def test_memory_is_added_and_taken_away_once_nobody_uses_it(tmp_path: Path) -> None:
    bus = Bus()
    bus.auto = False
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            fd = make_memfd()
            region = MemoryRegion(1 << 32, RAM_SIZE, 0, MemoryRegion.READ_ONLY, 0)
            await vmm.ok(Number.ADD_MEM, region.encode(), fds=(fd,))
            assert memory.contains(1 << 32, RAM_SIZE)
            assert not memory.contains(1 << 32, RAM_SIZE, write=True)
            code, _ = await vmm.refused(Number.ADD_MEM, region.encode(), fds=(fd,))
            assert code == errno.EEXIST
            odd = MemoryRegion(1 << 33, RAM_SIZE, 0, 0, 1)
            assert (await vmm.refused(Number.ADD_MEM, odd.encode(), fds=(fd,)))[0] == errno.EINVAL
            os.close(fd)
            for gpa, size in ((1 << 33, RAM_SIZE), (1 << 32, 4096)):
                code, _ = await vmm.refused(Number.REM_MEM, RemMem(gpa, size).encode())
                assert code == errno.ENOENT
            held = memory.views(1 << 32, 16)
            seq = await vmm.send(Number.REM_MEM, RemMem(1 << 32, RAM_SIZE).encode())
            await bus.wait_events(1)
            event = bus.events[0]
            assert isinstance(event, MemoryRemoval)
            assert (event.gpa, event.size) == (1 << 32, RAM_SIZE)
            assert not memory.contains(1 << 32, 1)
            assert (await vmm.refused(Number.REM_MEM, RemMem(0, RAM_SIZE).encode()))[
                0
            ] == errno.EBUSY
            event.done()
            held.clear()
            await vmm.expect_answer(Number.REM_MEM, seq)


async def test_memory_that_stays_in_use_is_told_to_the_vmm(tmp_path: Path) -> None:
    bus = Bus()
    limits = ServerLimits(drain_timeout=0.05)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            held = bus.transport.memory.views(0, 16)
            code, _ = await vmm.refused(Number.REM_MEM, RemMem(0, RAM_SIZE).encode())
            assert code == errno.EBUSY
            assert not bus.transport.memory.contains(0, 1)
            held.clear()


async def test_a_new_table_replaces_the_old_one_and_keeps_what_stays(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            ring = memory.views(0, 16)
            more = make_memfd()
            both = SetMemTable(
                (
                    MemoryRegion(1 << 32, RAM_SIZE, 0, 0, 1),
                    MemoryRegion(0, RAM_SIZE, 0, 0, 0),
                )
            )
            await vmm.ok(Number.SET_MEM_TABLE, both.encode(), fds=(vmm.memfd, more))
            assert memory.size == 2 * RAM_SIZE
            ring[0][:4] = b"ring"
            assert memory.read(0, 4) == b"ring"
            # Refused as a whole: nothing changes.
            code, _ = await vmm.refused(
                Number.SET_MEM_TABLE,
                SetMemTable(
                    (MemoryRegion(0, RAM_SIZE, 0, 0, 0), MemoryRegion(1 << 33, 1 << 40, 0, 0, 1))
                ).encode(),
                fds=(more, vmm.memfd),
            )
            assert code == errno.EINVAL
            assert memory.size == 2 * RAM_SIZE
            assert memory.read(0, 4) == b"ring"
            ring.clear()
            await vmm.ok(
                Number.SET_MEM_TABLE,
                SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),)).encode(),
                fds=(more,),
            )
            os.close(more)
            assert [type(event) for event in bus.events] == [MemoryRemoval, MemoryRemoval]
            assert memory.read(0, 4) == bytes(4)


# -- event flags ---------------------------------------------------------------------------------


async def test_tier_0_sends_a_message(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            call = bus.transport.open_call(0, 2, 77)
            assert call.tier == 0
            call.signal()
            call.retarget(1)
            call.retarget(1)
            call.retarget(99)
            call.signal()
            call.close()
            call.close()
            call.signal()
            call.retarget(0)
            for vp in (0, 1):
                frame = await vmm.expect(Number.SIGNAL_FLAG)
                assert frame.flags == ASYNC
                assert SignalFlag.decode_untrusted(frame.payload) == SignalFlag(vp, 2, 77)
            for lost in ((99, 2, 1), (0, 16, 1), (0, 2, 2048)):
                bus.transport.open_call(*lost).signal()
            await vmm.ok(Number.PAUSE)


async def test_tier_1_signals_an_eventfd_per_call(tmp_path: Path, mode: str) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach(Feature.CALL_FD)
            call = bus.transport.open_call(0, 2, 5)
            assert call.tier == 1
            call.signal()
            frame = await vmm.expect(Number.SET_CALL_FD)
            first = SetCallFd.decode_untrusted(frame.payload)
            assert (first.vp, first.sint, first.flag) == (0, 2, 5)
            assert os.eventfd_read(frame.fds[0]) == 1
            # Full counters do not block.
            os.eventfd_write(frame.fds[0], 0xFFFFFFFFFFFFFFFE)
            call.signal()
            await vmm.answer(frame)
            call.retarget(1)
            call.signal()
            second = await vmm.expect(Number.SET_CALL_FD)
            assert SetCallFd.decode_untrusted(second.payload) == SetCallFd(first.port, 1, 2, 5)
            assert os.eventfd_read(second.fds[0]) == 1
            os.eventfd_read(frame.fds[0])
            with pytest.raises(BlockingIOError):
                os.eventfd_read(frame.fds[0])
            frame.close()
            second.close()
            await vmm.answer(second)
            call.close()
            gone = await vmm.expect(Number.SET_CALL_FD)
            assert gone.fds == []
            await vmm.answer(gone)


async def test_a_vmm_that_refuses_a_call_eventfd_gets_messages(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            call = bus.transport.open_call(0, 2, 5)
            frame = await vmm.expect(Number.SET_CALL_FD)
            frame.close()
            await vmm.answer(frame, errno.ENOSPC)
            await vmm.ok(Number.PAUSE)
            await vmm.ok(Number.RESUME)
            assert call.tier == 0
            call.signal()
            await vmm.expect(Number.SIGNAL_FLAG)


def flags_of(vmm: RawVmm, page: int) -> bytes:
    return os.pread(vmm.memfd, 256, page + 512)


async def test_tier_2_sets_the_bit_and_kicks_the_processor(tmp_path: Path, eventfd: int) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.DIRECT)
            call = bus.transport.open_call(1, 2, 9)
            assert call.tier == 0
            await vmm.ok(Number.SET_SINT_FD, SetSintFd(1, 2).encode(), fds=(eventfd,))
            assert call.tier == 0
            on = SynicState(1, 1, 0x3001, 0x4001, 0xF3).encode()
            await vmm.ok(Number.SYNIC_STATE, on)
            assert call.tier == 2
            os.pwrite(vmm.memfd, b"\x80", 0x4000 + 512 + 1)
            call.signal()
            assert flags_of(vmm, 0x4000)[:3] == b"\0\x82\0"
            assert os.eventfd_read(eventfd) == 1
            assert bus.transport.open_call(1, 3, 9).tier == 0
            # The guest moves the page.
            moved = SynicState(1, 1, 0x3001, 0x6001, 0xF3).encode()
            await vmm.ok(Number.SYNIC_STATE, moved)
            call.signal()
            assert flags_of(vmm, 0x6000)[1] == 2
            assert os.eventfd_read(eventfd) == 1
            # A second eventfd takes over.
            other = make_eventfd()
            await vmm.ok(Number.SET_SINT_FD, SetSintFd(1, 2).encode(), fds=(other,))
            call.signal()
            assert os.eventfd_read(other) == 1
            os.close(other)
            for off in (
                SynicState(1, 0, 0, 0x4001, 0xF3),
                SynicState(1, 1, 0, 0x4000, 0xF3),
                SynicState(1, 1, 0, 0x4001, 0x100F3),
                SynicState(1, 1, 0, (1 << 40) + 1, 0xF3),
            ):
                await vmm.ok(Number.SYNIC_STATE, off.encode())
                assert call.tier == 0
            await vmm.ok(Number.SYNIC_STATE, on)
            assert call.tier == 2
            await vmm.ok(Number.RESET, Reset(0).encode())
            assert call.tier == 0
            await vmm.ok(Number.SYNIC_STATE, on)
            await vmm.ok(Number.REM_MEM, RemMem(0, RAM_SIZE).encode())
            assert call.tier == 0


async def test_tier_2_must_be_agreed_and_its_numbers_exist(tmp_path: Path, eventfd: int) -> None:
    state = SynicState(0, 0, 0, 0, 0).encode()
    sint = SetSintFd(0, 2).encode()
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            assert (await vmm.refused(Number.SYNIC_STATE, state))[0] == errno.EPROTO
            code, _ = await vmm.refused(Number.SET_SINT_FD, sint, fds=(eventfd,))
            assert code == errno.EPROTO
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.DIRECT)
            bad = SynicState(2, 0, 0, 0, 0).encode()
            assert (await vmm.refused(Number.SYNIC_STATE, bad))[0] == errno.EINVAL
            for payload in (SetSintFd(2, 2).encode(), SetSintFd(0, 3).encode()):
                code, _ = await vmm.refused(Number.SET_SINT_FD, payload, fds=(eventfd,))
                assert code == errno.EINVAL
            for make in (pipe_end, make_memfd, regular_file, o_path):
                fd = make()
                code, _ = await vmm.refused(Number.SET_SINT_FD, sint, fds=(fd,))
                os.close(fd)
                assert code == errno.EINVAL


async def test_signals_to_a_peer_that_does_not_read_are_merged(tmp_path: Path, mode: str) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            call = bus.transport.open_call(0, 2, 5)
            for _ in range(20_000):
                call.signal()
            other = bus.transport.open_call(1, 2, 6)
            other.signal()
            seen = 0
            while True:
                frame = await vmm.expect(Number.SIGNAL_FLAG)
                seen += 1
                if SignalFlag.decode_untrusted(frame.payload).flag == 6:
                    break
            assert 1 < seen < 20_000
            call.signal()
            await vmm.expect(Number.SIGNAL_FLAG)


# -- malformed frames ----------------------------------------------------------------------------

HOPELESS = [
    pytest.param(b"\1", id="half a header"),
    pytest.param(HEADER.pack(1, 0, 1, 8, 0, 0), id="payload missing"),
    pytest.param(HEADER.pack(1, 0, 1, 0, 0, 0) + b"x", id="payload too long"),
    pytest.param(HEADER.pack(1, 0, 1, MAX_PAYLOAD + 1, 0, 0), id="payload above the limit"),
    pytest.param(HEADER.pack(1, 0xFFFF, 1, 0, 0, 0), id="flags"),
    pytest.param(HEADER.pack(1, 0, 1, 0, 0, 7), id="reserved"),
    pytest.param(HEADER.pack(1, 0, 1, 0, 3, 0), id="descriptors missing"),
    pytest.param(HEADER.pack(1, 0, 1, 0, 0xFFFF, 0), id="descriptors above the limit"),
    pytest.param(pack_frame(Number.DELIVER_MESSAGE, REPLY, 77, b""), id="unsolicited reply"),
    pytest.param(pack_frame(Number.HELLO, ASYNC, 0, b""), id="request marked asynchronous"),
]


@pytest.mark.parametrize("data", HOPELESS)
async def test_lost_framing_ends_that_connection_only(tmp_path: Path, data: bytes) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.send_bytes(data)
            frame = await vmm.receive()
            if frame is not None:
                assert frame.flags == REPLY | ERROR
                assert ErrorReply.decode_untrusted(frame.payload).errno in {
                    errno.EBADMSG, errno.EMSGSIZE,
                }  # fmt: skip
                assert await vmm.receive() is None
        await still_served(path)


@pytest.mark.parametrize("data", [pack_frame(1, 0, 1, HELLO.encode())[:n] for n in (1, 15, 16, 30)])
async def test_half_a_message_on_a_stream_is_waited_for_and_then_given_up(
    tmp_path: Path, data: bytes
) -> None:
    async with running_server(tmp_path / "s", Bus(), mode="stream") as path:
        with raw_vmm(path, "stream") as vmm:
            await vmm.send_bytes(data)
            await trio.testing.wait_all_tasks_blocked()
            rest = pack_frame(1, 0, 1, HELLO.encode())[len(data) :]
            await vmm.send_bytes(rest)
            await vmm.expect_answer(Number.HELLO, 1)
            await vmm.send_bytes(data)
        await still_served(path, "stream")


async def test_more_descriptors_than_allowed_are_closed(tmp_path: Path, eventfd: int) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            before = count_fds()
            await vmm.send_bytes(pack_frame(1, 0, 1, b"", 200), (eventfd,) * 200)
            assert await vmm.receive() is None
            vmm.close()
            await trio.testing.wait_all_tasks_blocked()
            assert count_fds() <= before
        await still_served(path)


async def test_unexpected_descriptors_are_refused_and_closed(tmp_path: Path, eventfd: int) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            before = count_fds()
            for kind, payload in (
                (Number.RESET, Reset(0).encode()),
                (Number.PAUSE, b""),
                (Number.QUERY, b"x"),
            ):
                code, _ = await vmm.refused(kind, payload, fds=(eventfd, eventfd))
                assert code == errno.EINVAL
            assert count_fds() == before


async def test_an_asynchronous_message_must_be_marked(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            assert (await vmm.refused(Number.POST_MESSAGE, POST))[0] == errno.EPROTO


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        (REPLY, b"not empty"),
        (REPLY | ERROR, b""),
        (REPLY | ERROR, b"\0\0\0\0"),
    ],
)
async def test_a_malformed_reply_ends_the_connection(
    tmp_path: Path, flags: int, payload: bytes
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:

                async def deliver() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await bus.transport.deliver(0, 2, 1, b"x")

                nursery.start_soon(deliver)
                frame = await vmm.expect(Number.DELIVER_MESSAGE)
                await vmm.send(frame.kind, payload, flags=flags, seq=frame.seq)
            assert await vmm.receive() is None


@pytest.mark.parametrize("wrong", ["type", "seq", "fds"])
async def test_a_reply_to_something_else_ends_the_connection(
    tmp_path: Path, wrong: str, eventfd: int
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:

                async def deliver() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await bus.transport.deliver(0, 2, 1, b"x")

                nursery.start_soon(deliver)
                frame = await vmm.expect(Number.DELIVER_MESSAGE)
                await vmm.send(
                    frame.kind ^ (wrong == "type"),
                    flags=REPLY,
                    seq=frame.seq + (wrong == "seq"),
                    fds=(eventfd,) if wrong == "fds" else (),
                )
            assert await vmm.receive() is None


async def test_a_reader_that_stopped_reading_is_disconnected_for_the_time(
    tmp_path: Path, mode: str
) -> None:
    bus = Bus()
    limits = ServerLimits(write_timeout=0.05)
    async with running_server(tmp_path / "s", bus, mode=mode, limits=limits) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            for flag in range(2048):
                bus.transport.open_call(0, 2, flag).signal()
            with trio.fail_after(10):
                await bus.ended.wait()
        await still_served(path, mode)


async def test_a_reader_that_stopped_reading_is_disconnected_for_the_amount(
    tmp_path: Path,
) -> None:
    bus = Bus()
    limits = ServerLimits(outgoing_bytes=1000)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.LOG)
            for flag in range(2048):
                bus.transport.open_call(0, 2, flag).signal()
                bus.transport.report("dropped before anything else is")
            with trio.fail_after(10):
                await bus.ended.wait()


async def test_requests_that_nobody_answers_are_limited(tmp_path: Path) -> None:
    bus = Bus()
    limits = ServerLimits(outstanding_requests=3)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            calls = [bus.transport.open_call(0, 2, flag) for flag in range(5)]
            assert [call.tier for call in calls] == [0] * 5
            with trio.fail_after(10):
                await bus.ended.wait()


async def test_a_peer_that_floods_requests_and_never_reads_is_disconnected(
    tmp_path: Path,
) -> None:
    limits = ServerLimits(outgoing_bytes=10_000, write_timeout=0.2)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as vmm, pytest.raises((BrokenPipeError, ConnectionResetError)):
            with trio.fail_after(20):
                while True:
                    await vmm.send(0x4242, b"x" * 1000)
                    await trio.lowlevel.checkpoint()
        await still_served(path)


# -- operators -----------------------------------------------------------------------------------

OPERATOR = Hello(1, 1, 0, 0, Role.OPERATOR, "operator").encode()


async def test_an_operator_queries_and_commands(tmp_path: Path) -> None:
    async def query(kind: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"kind": kind}

    def command(value: dict[str, Any]) -> dict[str, Any]:
        return {"did": value}

    async with running_server(tmp_path / "s", Bus(), query=query, command=command) as path:
        with raw_vmm(path) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            assert await vmm.ok(Number.QUERY, b"status") == b'{"kind":"status"}'
            assert await vmm.ok(Number.COMMAND, b'{"a":1}') == b'{"did":{"a":1}}'
            for kind in (Number.VM_INFO, Number.SET_MEM_TABLE, Number.PAUSE, Number.HELLO):
                assert (await vmm.refused(kind))[0] == errno.EPERM
            await vmm.post(Number.POST_MESSAGE, POST)
            assert (await vmm.refused(Number.QUERY, b""))[0] == errno.EMSGSIZE
            assert (await vmm.refused(Number.COMMAND, b"[]"))[0] == errno.EINVAL
            await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
            assert await vmm.receive() is None
        with raw_vmm(path) as vmm:
            await vmm.attach()
            assert await vmm.ok(Number.QUERY, b"memory") == b'{"kind":"memory"}'


async def test_an_answer_that_is_too_long_comes_in_a_memfd(tmp_path: Path) -> None:
    big = {"list": ["x" * 100] * 1000}
    async with running_server(tmp_path / "s", Bus(), query=lambda _: big) as path:
        with raw_vmm(path) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            frame = await vmm.ask(Number.QUERY, b"all")
            assert frame.payload == b""
            (fd,) = frame.fds
            assert os.fstat(fd).st_size > 100_000
            assert os.pread(fd, 9, 0) == b'{"list":['
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
            frame.close()


async def test_callbacks_that_fail_refuse_and_the_server_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def query(kind: str) -> dict[str, Any]:
        if kind == "none":
            raise VMBusError("no such kind")
        if kind == "disk":
            raise FileNotFoundError(errno.ENOENT, "no such file")
        if kind == "json":
            return {"a": object()}
        raise ZeroDivisionError("a bug")

    async with running_server(tmp_path / "s", Bus(), query=query) as path:
        with raw_vmm(path) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            assert await vmm.refused(Number.QUERY, b"none") == (errno.EINVAL, "no such kind")
            assert (await vmm.refused(Number.QUERY, b"disk"))[0] == errno.ENOENT
            assert (await vmm.refused(Number.QUERY, b"json"))[0] == errno.EIO
            assert (await vmm.refused(Number.QUERY, b"bug"))[0] == errno.EIO
            assert (await vmm.refused(Number.COMMAND, b"{}"))[0] == errno.ENOSYS
    assert "a bug" in caplog.text
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            assert (await vmm.refused(Number.QUERY, b"none"))[0] == errno.ENOSYS


async def test_one_question_at_a_time(tmp_path: Path) -> None:
    gate = trio.Event()

    async def query(kind: str) -> dict[str, Any]:
        await gate.wait()
        return {}

    async with running_server(tmp_path / "s", Bus(), query=query) as path:
        with raw_vmm(path) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            seq = await vmm.send(Number.QUERY, b"slow")
            assert (await vmm.refused(Number.QUERY, b"fast"))[0] == errno.EBUSY
            gate.set()
            await vmm.expect_answer(Number.QUERY, seq)


async def test_goodbye_is_possible_before_attaching(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            assert (await vmm.refused(Number.GOODBYE, b""))[0] == errno.EMSGSIZE
            await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
            assert await vmm.receive() is None


async def test_a_failed_change_of_the_table_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel said yes to the trial and no to the real mapping."""
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            real = type(memory).add_region

            def add_region(self: Any, *arguments: Any, **options: Any) -> Any:
                if self is memory:
                    raise ConfigError("no more mappings")
                return real(self, *arguments, **options)

            monkeypatch.setattr(type(memory), "add_region", add_region)
            more = make_memfd()
            await vmm.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(more,))
            os.close(more)
            assert await vmm.receive() is None


async def test_a_bug_in_the_server_ends_one_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()

            def broken(*_: object) -> None:
                raise ZeroDivisionError("a bug")

            monkeypatch.setattr(bus.transport, "handle", broken)
            await vmm.send(Number.PAUSE)
            assert await vmm.receive() is None
        await still_served(path)
    assert "a bug" in caplog.text


async def test_a_call_moves_between_the_tiers_with_its_processor(
    tmp_path: Path, eventfd: int
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD | Feature.DIRECT)
            await vmm.ok(Number.SET_SINT_FD, SetSintFd(1, 2).encode(), fds=(eventfd,))
            await vmm.ok(Number.SYNIC_STATE, SynicState(1, 1, 0, 0x4001, 0xF3).encode())
            call = bus.transport.open_call(0, 2, 1)
            assert call.tier == 1
            call.retarget(1)
            assert call.tier == 2
            first, second = (
                await vmm.expect(Number.SET_CALL_FD),
                await vmm.expect(Number.SET_CALL_FD),
            )
            assert (len(first.fds), len(second.fds)) == (1, 0)
            first.close()
            await vmm.answer(first)
            await vmm.answer(second)
            await vmm.ok(Number.PAUSE)


async def test_a_lack_of_descriptors_means_signals_by_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)

            def dup(fd: int) -> int:
                raise OSError(errno.EMFILE, "too many open files")

            monkeypatch.setattr(os, "dup", dup)
            call = bus.transport.open_call(0, 2, 1)
            with pytest.raises(OSError, match="too many"):
                await bus.transport.add_event_port(17, 0)
            monkeypatch.undo()
            call.signal()
            await vmm.expect(Number.SIGNAL_FLAG)


async def test_frames_that_go_out_in_parts_arrive_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = framing.send

    def dribble(sock: socket.socket, data: Any, fds: Any = ()) -> int:
        if len(data) > 30 and not isinstance(data, memoryview):
            return real(sock, data[:7], fds)
        return real(sock, data[:100], fds)

    monkeypatch.setattr("vmbus.attach.server.link.send", dribble)
    bus = Bus()
    answer = {"x": "y" * 3000}
    async with running_server(tmp_path / "s", bus, mode="stream", query=lambda _: answer) as path:
        with raw_vmm(path, "stream") as vmm:
            await vmm.attach(Feature.CALL_FD)
            call = bus.transport.open_call(0, 2, 1)
            call.signal()
            frame = await vmm.expect(Number.SET_CALL_FD)
            assert os.eventfd_read(frame.fds[0]) == 1
            frame.close()
            await vmm.answer(frame)
            assert len(await vmm.ok(Number.QUERY, b"x")) > 3000
            await vmm.ok(Number.GOODBYE, Goodbye(0).encode())


async def test_what_is_queued_goes_out_before_the_connection_is_closed(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            sent = 0
            with trio.move_on_after(20):
                # Until the server's socket is full and it queues.
                while sent < 3000:
                    await vmm.send(0x4242, b"x" * 16, seq=sent)
                    sent += 1
                    if sent % 16 == 0:
                        await trio.testing.wait_all_tasks_blocked()
            await vmm.send(Number.GOODBYE, Goodbye(0).encode(), seq=sent)
            await trio.testing.wait_all_tasks_blocked()
            # Too late for this one.
            await vmm.send(Number.VM_INFO, INFO.encode(), seq=sent + 1)
            for expected in range(sent):
                frame = await vmm.expect(0x4242)
                assert frame.seq == expected
            assert (await vmm.expect(Number.GOODBYE)).seq == sent
            assert await vmm.receive() is None


async def test_a_peer_that_shuts_its_ears_is_forgotten(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            vmm.sock.shutdown(socket.SHUT_RD)
            bus.transport.open_call(0, 2, 1).signal()
            with trio.fail_after(10):
                await bus.ended.wait()
        await still_served(path)
