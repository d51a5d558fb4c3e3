"""Event flags on their three ways to a VMM: by message, by eventfd, and set by the server."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.attach import (
    RAM_SIZE,
    Bus,
    RawVmm,
    make_eventfd,
    make_memfd,
    raw_vmm,
    running_server,
)
from tests.support.descriptors import o_path, pipe_end, regular_file
from vmbus.attach.protocol.framing import ASYNC
from vmbus.attach.protocol.limits import Feature
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import RemMem, Reset, SetSintFd, SynicState
from vmbus.attach.protocol.to_vmm import SetCallFd, SignalFlag

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


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
