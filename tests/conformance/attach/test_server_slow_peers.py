"""Peers that read late or never, and how much the server keeps for them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.attach import INFO, Bus, raw_vmm, running_server, still_served
from tests.support.patience import PATIENCE
from vmbus.attach.protocol import framing
from vmbus.attach.protocol.limits import Feature
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import Goodbye
from vmbus.attach.server import ServerLimits

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


async def test_a_reader_that_stopped_reading_is_disconnected_for_the_time(
    tmp_path: Path, mode: str, autojump_clock: MockClock
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            for flag in range(2048):
                bus.transport.open_call(0, 2, flag).signal()
            with trio.fail_after(PATIENCE):
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
            with trio.fail_after(PATIENCE):
                await bus.ended.wait()


async def test_requests_that_nobody_answers_are_limited(tmp_path: Path) -> None:
    bus = Bus()
    limits = ServerLimits(outstanding_requests=3)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            calls = [bus.transport.open_call(0, 2, flag) for flag in range(5)]
            assert [call.tier for call in calls] == [0] * 5
            with trio.fail_after(PATIENCE):
                await bus.ended.wait()


async def test_a_peer_that_floods_requests_and_never_reads_is_disconnected(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    limits = ServerLimits(outgoing_bytes=10_000)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as vmm, pytest.raises((BrokenPipeError, ConnectionResetError)):
            with trio.fail_after(PATIENCE):
                while True:
                    await vmm.send(0x4242, b"x" * 1000)
                    await trio.lowlevel.checkpoint()
        await still_served(path)


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


async def test_what_is_queued_goes_out_before_the_connection_is_closed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            sent = 0
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
            with trio.fail_after(PATIENCE):
                await bus.ended.wait()
        await still_served(path)
