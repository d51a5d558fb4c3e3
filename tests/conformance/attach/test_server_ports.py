"""Doorbells and messages between the server and a VMM: ports, posts, deliveries."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.attach import POST, Bus, RawVmm, raw_vmm, running_server
from tests.support.patience import PATIENCE
from vmbus.attach.protocol.limits import Feature, PortKind
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import PostMessage, SignalEvent
from vmbus.attach.protocol.to_vmm import AddEventPort, DeliverMessage, DelPort, Log, PostCredit
from vmbus.attach.server import ServerLimits
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import AttachError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


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
            with trio.fail_after(PATIENCE):
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


async def test_a_vmm_that_does_not_answer_is_disconnected(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            with pytest.raises(trio.BrokenResourceError, match="no answer to ADD_MSG_PORT"):
                await bus.transport.add_message_port(5)
            await vmm.expect(Number.ADD_MSG_PORT)
            assert await vmm.receive() is None


# -- deliveries ------------------------------------------------------------------------------------


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


# -- posts and credits -----------------------------------------------------------------------------


async def test_posts_without_credit_end_the_connection(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    never = trio.Event()

    async def handler(transport: SocketTransport) -> None:
        async for _ in transport.incoming():
            await never.wait()

    limits = ServerLimits(post_credits=4)
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
