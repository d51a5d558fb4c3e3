"""Where the server once did not do what docs/reference/vmbus-user.md says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.attach import INFO, RAM_SIZE, TABLE, Bus, make_memfd, raw_vmm, running_server
from tests.support.leaks import count_fds
from tests.support.patience import LOOK, PATIENCE, until
from vmbus.attach.protocol.framing import ERROR
from vmbus.attach.protocol.limits import Feature
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import Goodbye, MemoryRegion, RemMem
from vmbus.attach.protocol.to_vmm import SetCallFd, SignalFlag


async def deliver_to_nobody(bus: Bus) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await bus.transport.deliver(0, 2, 1, b"late")


# -- 5.13: GOODBYE with requests of the server unanswered ------------------------------------------


@pytest.mark.parametrize("mode", ["seqpacket", "stream"])
async def test_an_answer_may_arrive_behind_the_answer_to_goodbye(tmp_path: Path, mode: str) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deliver_to_nobody, bus)
                request = await vmm.expect(Number.DELIVER_MESSAGE)
                await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
                # Still there, and no other request has an effect any more.
                await vmm.send(Number.PAUSE)
                await vmm.answer(request)
            assert await vmm.receive() is None


async def test_the_server_does_not_wait_for_ever_for_an_answer_behind_goodbye(
    tmp_path: Path,
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deliver_to_nobody, bus)
                await vmm.expect(Number.DELIVER_MESSAGE)
                await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
            assert await vmm.receive() is None


# -- 6.6: SET_CALL_FD ------------------------------------------------------------------------------


async def test_a_signal_through_an_eventfd_that_is_refused_is_repeated(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            call = bus.transport.open_call(0, 2, 5)
            call.signal()
            frame = await vmm.expect(Number.SET_CALL_FD)
            frame.close()
            await vmm.answer(frame, errno.ENOSPC)
            signal = await vmm.expect(Number.SIGNAL_FLAG)
            assert SignalFlag.decode_untrusted(signal.payload) == SignalFlag(0, 2, 5)
            assert call.tier == 0
            call.close()
            await vmm.ok(Number.PAUSE)  # nothing to take back: the VMM never had the port


async def test_a_signal_before_a_change_of_vp_survives_the_refusal_behind_it(
    tmp_path: Path,
) -> None:
    before = count_fds()
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            call = bus.transport.open_call(0, 2, 5)
            call.signal()
            call.retarget(1)
            first = await vmm.expect(Number.SET_CALL_FD)
            second = await vmm.expect(Number.SET_CALL_FD)
            await vmm.answer(first, errno.ENOSPC)
            await vmm.answer(second, errno.ENOSPC)
            first.close()
            second.close()
            await until(lambda: not call.tier)
            call.signal()
            signal = await vmm.expect(Number.SIGNAL_FLAG)
            assert SignalFlag.decode_untrusted(signal.payload) == SignalFlag(1, 2, 5)
    assert count_fds() == before


async def test_a_port_with_its_old_eventfd_is_taken_back_at_the_end(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            call = bus.transport.open_call(0, 2, 5)
            call.retarget(1)
            first = await vmm.expect(Number.SET_CALL_FD)
            second = await vmm.expect(Number.SET_CALL_FD)
            await vmm.answer(first)
            await vmm.answer(second, errno.ENOSPC)
            first.close()
            second.close()
            await vmm.ok(Number.PAUSE)
            await vmm.ok(Number.RESUME)
            assert call.tier == 0
            call.close()
            gone = await vmm.expect(Number.SET_CALL_FD)
            assert SetCallFd.decode_untrusted(gone.payload) == SetCallFd(call.port, 1, 2, 5)
            assert gone.fds == []


@pytest.mark.parametrize("answers", [0, 1])
async def test_set_call_fd_must_be_answered_in_time(
    tmp_path: Path, answers: int, autojump_clock: MockClock
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)
            bus.transport.open_call(0, 2, 5)
            bus.transport.open_call(0, 2, 6)
            for number in range(2):
                frame = await vmm.expect(Number.SET_CALL_FD)
                frame.close()
                if number < answers:
                    await vmm.answer(frame)
            assert await vmm.receive() is None


# -- 3: lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Number.RESET, b""),
        (Number.RESET, b"abc"),
        (Number.RESET, bytes(5)),
        (Number.PAUSE, b"a"),
        (Number.RESUME, b"a"),
    ],
)
async def test_the_life_cycle_requests_have_their_lengths(
    tmp_path: Path, kind: Number, payload: bytes
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            if kind is Number.RESUME:
                await vmm.ok(Number.PAUSE)
            happened = len(bus.events)
            assert (await vmm.refused(kind, payload))[0] == errno.EMSGSIZE
            assert len(bus.events) == happened
            await vmm.ok(Number.RESUME if kind is Number.RESUME else Number.PAUSE)


# -- 5.2 to 5.4: memory ----------------------------------------------------------------------------


async def test_a_second_table_is_refused_while_the_first_is_unanswered(tmp_path: Path) -> None:
    begin = trio.Event()

    async def handler(transport) -> None:
        await begin.wait()
        async for _ in transport.incoming():
            raise AssertionError("nothing happens")

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            vmm.memfd = make_memfd()
            first = await vmm.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            code, _ = await vmm.refused(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            assert code == errno.EBUSY
            begin.set()
            await vmm.expect_answer(Number.SET_MEM_TABLE, first)
            await vmm.ok(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))


async def test_a_vmm_that_vanishes_while_it_is_attached_is_no_fault_of_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            vmm.memfd = make_memfd()
            await vmm.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            await vmm.expect(Number.ADD_MSG_PORT)
        with raw_vmm(path) as vmm, trio.fail_after(PATIENCE):
            await vmm.greet()
            # The name is free once the server is done with the one that went away.
            while (await vmm.ask(Number.VM_INFO, INFO.encode())).flags & ERROR:
                await trio.sleep(LOOK)
    assert [record.levelname for record in caplog.records if record.exc_info] == []


async def test_a_region_that_stays_in_use_delays_no_other_and_may_be_replaced(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bus = Bus()
    other = RemMem(1 << 32, RAM_SIZE)
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            memory = bus.transport.memory
            more = make_memfd()
            region = MemoryRegion(other.gpa, RAM_SIZE, 0, 0, 0)
            await vmm.ok(Number.ADD_MEM, region.encode(), fds=(more,))
            ring = memory.views(0, 16)
            old = RemMem(0, RAM_SIZE)
            assert (await vmm.refused(Number.REM_MEM, old.encode()))[0] == errno.EBUSY
            await vmm.ok(Number.REM_MEM, other.encode())
            again = MemoryRegion(0, RAM_SIZE, 0, 0, 0)
            await vmm.ok(Number.ADD_MEM, again.encode(), fds=(more,))
            os.close(more)
            ring[0][:3] = b"old"
            assert memory.read(0, 3) == bytes(3)
            ring.clear()
