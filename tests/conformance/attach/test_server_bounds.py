"""What one VMM may cost: memory, descriptors, time of the loop, lines in the log."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.attach import (
    HELLO,
    INFO,
    RAM_SIZE,
    Bus,
    RawVmm,
    control,
    make_eventfd,
    make_memfd,
    raw_vmm,
    running_server,
    still_served,
)
from tests.support.leaks import count_fds
from tests.support.patience import LOOK, PATIENCE, SOON, until
from vmbus.attach.protocol.framing import ERROR, REPLY, pack_frame
from vmbus.attach.protocol.limits import Feature, Role
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import (
    Hello,
    MemoryRegion,
    RemMem,
    SetMemTable,
    SetSintFd,
    VmInfo,
)
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.attach.server import ServerLimits
from vmbus.errors import AttachError
from vmbus.log_budget import BURST

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

HIGH = 1 << 32


def region(index: int, size: int = RAM_SIZE) -> bytes:
    return MemoryRegion(HIGH + index * size, size, 0, 0, 0).encode()


# -- memory ----------------------------------------------------------------------------------------


async def test_a_vmm_has_so_many_regions_and_no_more(tmp_path: Path) -> None:
    limits = ServerLimits(max_regions=4)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            for index in range(3):
                await vmm.ok(Number.ADD_MEM, region(index), fds=(vmm.memfd,))
            before = count_fds()
            code, text = await vmm.refused(Number.ADD_MEM, region(3), fds=(vmm.memfd,))
            assert (code, count_fds()) == (errno.ENOSPC, before)
            assert "at most 4" in text
            await vmm.ok(Number.REM_MEM, RemMem(HIGH, RAM_SIZE).encode())
            await vmm.ok(Number.ADD_MEM, region(3), fds=(vmm.memfd,))
            table = SetMemTable(
                tuple(MemoryRegion(n * RAM_SIZE, RAM_SIZE, 0, 0, 0) for n in range(5))
            )
            code, _ = await vmm.refused(Number.SET_MEM_TABLE, table.encode(), fds=(vmm.memfd,))
            assert code == errno.ENOSPC


async def test_address_space_that_costs_a_vmm_nothing_is_bounded(tmp_path: Path) -> None:
    """A sparse file of 64 TiB is free for its owner, and half of all our addresses."""
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            size = 1 << 46
            sparse = make_memfd(size)
            code, text = await vmm.refused(Number.ADD_MEM, region(0, size), fds=(sparse,))
            assert code == errno.ENOMEM
            assert str(1 << 40) in text
            table = SetMemTable((MemoryRegion(0, size, 0, 0, 0),))
            code, _ = await vmm.refused(Number.SET_MEM_TABLE, table.encode(), fds=(sparse,))
            assert code == errno.ENOMEM
            rest = (1 << 40) - RAM_SIZE
            await vmm.ok(
                Number.ADD_MEM, MemoryRegion(1 << 42, rest, 0, 0, 0).encode(), fds=(sparse,)
            )
            os.close(sparse)
            code, _ = await vmm.refused(Number.ADD_MEM, region(1), fds=(vmm.memfd,))
            assert code == errno.ENOMEM
            assert bus.transport.memory.size == 1 << 40
        await still_served(path)


async def test_memory_that_is_out_of_the_map_but_in_use_counts(tmp_path: Path) -> None:
    bus = Bus()
    limits = ServerLimits(max_regions=2, drain_timeout=SOON)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            ring = bus.transport.memory.views(0, 16)
            old = RemMem(0, RAM_SIZE).encode()
            assert (await vmm.refused(Number.REM_MEM, old))[0] == errno.EBUSY
            await vmm.ok(Number.ADD_MEM, region(0), fds=(vmm.memfd,))
            code, _ = await vmm.refused(Number.ADD_MEM, region(1), fds=(vmm.memfd,))
            assert code == errno.ENOSPC
            ring.clear()
            await vmm.ok(Number.ADD_MEM, region(1), fds=(vmm.memfd,))


async def test_an_overlap_is_found_on_both_sides(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            big = make_memfd(4 * RAM_SIZE)
            for index in (1, 5, 3):
                await vmm.ok(Number.ADD_MEM, region(index), fds=(big,))
            for index, pages in ((1, 1), (0, 257), (2, 257), (4, 257), (0, 1024)):
                request = MemoryRegion(HIGH + index * RAM_SIZE, pages * 4096, 0, 0, 0)
                code, _ = await vmm.refused(Number.ADD_MEM, request.encode(), fds=(big,))
                assert code == errno.EEXIST, index
            for index in (0, 2, 4, 6):
                await vmm.ok(Number.ADD_MEM, region(index), fds=(big,))
            os.close(big)


# -- descriptors -----------------------------------------------------------------------------------


async def test_a_vmm_has_so_many_descriptors_here_and_no_more(tmp_path: Path, eventfd: int) -> None:
    bus = Bus()
    limits = ServerLimits(max_descriptors=3)
    async with running_server(tmp_path / "s", bus, limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD | Feature.DIRECT)
            call = bus.transport.open_call(0, 2, 5)
            offered = await vmm.expect(Number.SET_CALL_FD)
            offered.close()
            await vmm.answer(offered)
            sint = SetSintFd(0, 2).encode()
            await vmm.ok(Number.SET_SINT_FD, sint, fds=(eventfd,))
            # One in the place of another is none more.
            await vmm.ok(Number.SET_SINT_FD, sint, fds=(eventfd,))
            code, _ = await vmm.refused(
                Number.SET_SINT_FD, SetSintFd(1, 2).encode(), fds=(eventfd,)
            )
            assert code == errno.EMFILE
            with pytest.raises(AttachError, match="descriptors"):
                await bus.transport.add_event_port(17, 0)
            assert bus.transport.open_call(0, 2, 6).tier == 0
            call.close()


@pytest.fixture
def no_descriptor_is_free() -> Iterator[None]:
    """No file can be opened in this process while the test runs; what is open stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def leave_no_descriptor_free() -> None:
    fd = os.dup(2)
    os.close(fd)
    # Numbers below the highest that is open may be free: fill the gaps.
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


async def test_a_lack_of_descriptors_is_told_from_a_mistake_of_the_peer(
    tmp_path: Path, mode: str, eventfd: int, no_descriptor_is_free: None
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach(Feature.DIRECT)
            request = SetSintFd(0, 2).encode()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            leave_no_descriptor_free()
            code, text = await vmm.refused(Number.SET_SINT_FD, request, fds=(eventfd,))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert code == errno.EMFILE
            assert "too many files are open on this side" in text
            # It was no one's mistake, and goes on.
            await vmm.ok(Number.SET_SINT_FD, request, fds=(eventfd,))


# -- time of the loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stream", "seqpacket"])
async def test_others_get_their_turn_between_small_frames(tmp_path: Path, mode: str) -> None:
    """A socket's buffer full of frames of 16 bytes was one turn, of seconds."""
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            transport = bus.transport
            turns: list[int] = []
            seen = 0
            done = trio.Event()
            real = transport.dropped

            def dropped(kind: int, error: object) -> None:
                nonlocal seen
                seen += 1

            transport.dropped = dropped  # type: ignore[method-assign]

            async def other_task() -> None:
                while not done.is_set():
                    turns.append(seen)
                    await trio.lowlevel.checkpoint()

            frame = pack_frame(0x4242, 4, 0, b"")
            vmm.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            if mode == "stream":
                sent = vmm.sock.send(frame * 2000) // 16
            else:
                sent = 0
                while sent < 150:
                    vmm.sock.send(frame)
                    sent += 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other_task)
                with trio.fail_after(PATIENCE):
                    while seen < sent:
                        await trio.lowlevel.checkpoint()
                done.set()
            transport.dropped = real  # type: ignore[method-assign]
            steps = [after - before for before, after in itertools.pairwise(turns)]
            assert sent > 100
            # The order of a round is left to chance: the other task may be first, then last.
            assert max(steps) <= 2 * 32


# -- the log ---------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("vmbus.attach") and record.levelno >= logging.INFO
    ]


async def test_connections_without_end_write_no_log_without_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_server(tmp_path / "s", Bus()) as path:
        for _ in range(3 * BURST):
            with raw_vmm(path) as vmm:
                await vmm.send_bytes(b"x")
                assert await vmm.receive() is None
        # A guest's end is told all the same, by name.
        with raw_vmm(path) as vmm:
            await vmm.attach()
            await vmm.send_bytes(b"x")
            assert await vmm.receive() is None
        await until(lambda: any(line.startswith("guest: closed") for line in lines(caplog)))
    written = lines(caplog)
    assert len(written) == BURST + 1
    assert f"process {os.getpid()} of user {os.getuid()}: closed: frame: record" in written[0]
    assert written[-1].startswith("guest: closed: frame: record of 1 bytes")


async def test_a_callback_that_fails_writes_no_log_without_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str) -> dict[str, object]:
        raise ZeroDivisionError("a bug")

    async with running_server(tmp_path / "s", Bus(), query=broken) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            for _ in range(2 * BURST):
                assert (await vmm.refused(Number.QUERY, b"x"))[0] == errno.EIO
    assert sum("QUERY failed" in line for line in lines(caplog)) == BURST


async def test_channels_without_an_eventfd_write_no_log_without_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.CALL_FD)

            def none_left(*_: object) -> int:
                raise OSError(errno.EMFILE, "none left")

            with monkeypatch.context() as patch:
                patch.setattr(os, "eventfd", none_left)
                for flag in range(3 * BURST):
                    assert bus.transport.open_call(0, 2, flag).tier == 0
    assert sum("no eventfd" in line for line in lines(caplog)) == BURST


# -- places ----------------------------------------------------------------------------------------


async def refusal_of_hello(vmm: RawVmm) -> tuple[int, str]:
    return await vmm.refused(Number.HELLO, HELLO.encode())


async def test_a_hello_beyond_the_limit_is_answered(tmp_path: Path) -> None:
    limits = ServerLimits(max_connections=1)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as first, raw_vmm(path) as second:
            await first.attach()
            code, text = await refusal_of_hello(second)
            assert code == errno.EAGAIN
            assert "1 connections are served, which is the limit" in text
            first.close()
            with trio.fail_after(PATIENCE):
                while True:
                    answer = await second.ask(Number.HELLO, HELLO.encode())
                    if answer.flags == REPLY:
                        break
                    assert answer.flags == REPLY | ERROR
                    assert ErrorReply.decode_untrusted(answer.payload).errno == errno.EAGAIN
                    await trio.sleep(LOOK)


async def test_who_says_nothing_makes_room_for_who_does(tmp_path: Path) -> None:
    """As many silent connections as anybody likes, and a guest attaches all the same."""
    limits = ServerLimits(max_connections=1, max_silent=2)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        silent = [raw_vmm(path) for _ in range(10)]
        peers = [each.__enter__() for each in silent]
        with raw_vmm(path) as vmm:
            await vmm.attach()
            # The oldest have gone, the youngest may still say something.
            assert await peers[0].receive() is None
            assert (await refusal_of_hello(peers[-1]))[0] == errno.EAGAIN
        for each in silent:
            each.__exit__(None, None, None)


async def test_who_is_refused_for_its_name_takes_no_place(tmp_path: Path) -> None:
    limits = ServerLimits(max_connections=2)
    named = Hello(1, 1, Feature(0), 1, Role.VMM, "alice").encode()
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as alice, raw_vmm(path) as other, raw_vmm(path) as third:
            await alice.ok(Number.HELLO, named)
            assert (await other.refused(Number.HELLO, named))[0] == errno.EBUSY
            await third.greet()
            assert (await refusal_of_hello(other))[0] == errno.EAGAIN


async def test_who_has_a_place_and_does_nothing_with_it_loses_it(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    limits = ServerLimits(max_connections=3)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as guest, raw_vmm(path) as first, raw_vmm(path) as second:
            await guest.attach()
            await first.greet()
            await second.greet()
            with raw_vmm(path) as third:
                # Both may be about to say something.
                assert (await refusal_of_hello(third))[0] == errno.EAGAIN
            mock_clock.jump(11)
            with raw_vmm(path) as third, raw_vmm(path) as fourth:
                await third.greet()
                assert (await first.expect(Number.GOODBYE)).flags == 0
                assert await first.receive() is None
                await fourth.greet()
                await second.expect(Number.GOODBYE)
                assert await second.receive() is None
            # A guest has its place as long as it lives.
            await guest.ok(Number.PAUSE)


async def test_who_is_idle_for_long_is_dismissed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mock_clock: trio.testing.MockClock
) -> None:
    caplog.set_level(logging.INFO)
    answering = trio.Event()

    async def slow(_: str) -> dict[str, object]:
        await answering.wait()
        return {}

    async with running_server(tmp_path / "s", Bus(), query=slow) as path:
        with raw_vmm(path) as guest, raw_vmm(path) as vmm, raw_vmm(control(path)) as operator:
            await guest.attach(info=VmInfo(1, 4096, bytes(16), 0, 0))
            await operator.ok(Number.HELLO, HELLO_OPERATOR)
            question = await operator.send(Number.QUERY, b"x")
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            mock_clock.jump(61)
            await vmm.expect(Number.GOODBYE)
            assert await vmm.receive() is None
            answering.set()
            # Who waits for an answer is not idle.
            await operator.expect_answer(Number.QUERY, question)
            mock_clock.jump(59)
            await operator.ok(Number.QUERY, b"x")
            mock_clock.jump(61)
            await operator.expect(Number.GOODBYE)
            assert await operator.receive() is None
            await guest.ok(Number.PAUSE)
    assert any(
        "operator 'op': closed: nothing was asked for 60 s" in line for line in lines(caplog)
    )


def _operator_hello() -> bytes:
    return Hello(1, 1, 0, 0, Role.OPERATOR, "op").encode()


HELLO_OPERATOR = _operator_hello()


# -- descriptors that cannot be closed -------------------------------------------------------------


async def test_a_descriptor_that_is_slow_to_close_holds_up_nobody(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TCP socket with SO_LINGER, a file of a FUSE mount: the last close runs their code."""
    import threading

    from vmbus.attach.protocol import closing
    from vmbus.attach.server import link

    let_go = threading.Event()
    real = closing._close_foreign_now

    def close(fd: int) -> None:
        let_go.wait()
        real(fd)

    monkeypatch.setattr(closing, "_close_foreign_now", close)
    monkeypatch.setattr(link, "MAX_CLOSING", 3)
    async with running_server(tmp_path / "s", Bus(), mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.greet()
            slow = socket.socket()
            for _ in range(3):
                code, _ = await vmm.refused(0x4242, fds=(slow.fileno(),))
                assert code == errno.ENOSYS
            await still_served(path, mode)
            # But nobody may heap them up.
            await vmm.refused(0x4242, fds=(slow.fileno(),))
            assert await vmm.receive() is None
            slow.close()
        with raw_vmm(path, mode) as honest:
            await honest.greet()
            assert (await honest.refused(0x4242, fds=(make_shared(),)))[0] == errno.ENOSYS
    let_go.set()


def make_shared() -> int:
    return _EVENTFD


_EVENTFD = make_eventfd()


async def test_regions_have_descriptors_too(tmp_path: Path) -> None:
    limits = ServerLimits(max_descriptors=2)
    async with running_server(tmp_path / "s", Bus(), limits=limits) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            await vmm.ok(Number.ADD_MEM, region(0), fds=(vmm.memfd,))
            code, _ = await vmm.refused(Number.ADD_MEM, region(1), fds=(vmm.memfd,))
            assert code == errno.EMFILE
            one = SetMemTable((MemoryRegion(0, RAM_SIZE, 0, 0, 0),))
            await vmm.ok(Number.SET_MEM_TABLE, one.encode(), fds=(vmm.memfd,))
            await vmm.ok(Number.ADD_MEM, region(1), fds=(vmm.memfd,))
