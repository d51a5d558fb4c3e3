"""A server's handler: how it ends, how it fails, and the life cycle of its partition."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.attach import (
    INFO,
    POST,
    TABLE,
    Bus,
    RawVmm,
    done_of,
    make_memfd,
    raw_vmm,
    running_server,
    still_served,
)
from tests.support.patience import PATIENCE
from vmbus.attach.protocol.limits import Feature, GoodbyeReason
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import Goodbye, Reset, VmInfo
from vmbus.attach.protocol.to_vmm import PostCredit, SignalFlag
from vmbus.attach.server.transport import SocketTransport
from vmbus.partition.events import (
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


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
    tmp_path: Path, autojump_clock: MockClock
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

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
        with trio.fail_after(PATIENCE):
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
            with trio.fail_after(PATIENCE):
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


# -- life cycle ------------------------------------------------------------------------------------


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
            with trio.fail_after(PATIENCE):
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
