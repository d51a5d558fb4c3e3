"""The letter of docs/reference/vmbus-user.md, where the server once did something else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.attach import (
    HELLO,
    INFO,
    POST,
    TABLE,
    Bus,
    control,
    make_memfd,
    raw_vmm,
    running_server,
    still_served,
)
from tests.support.patience import until
from vmbus.attach.protocol.framing import ASYNC, ERROR, HEADER, REPLY, pack_frame
from vmbus.attach.protocol.limits import MAX_PAYLOAD, Feature, Role
from vmbus.attach.protocol.messages import MESSAGES, Direction, MessageSpec, Number
from vmbus.attach.protocol.to_server import Goodbye, Hello, Reset, SetSintFd, SynicState
from vmbus.attach.protocol.to_vmm import ErrorReply, PostCredit, SetCallFd
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import ConfigError
from vmbus.partition.events import PostedMessage

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


# -- 5.8: a POST_MESSAGE that the server drops returns its credit ----------------------------------


@pytest.mark.parametrize("what", ["descriptor", "vp", "length"])
async def test_the_credit_of_a_post_that_is_dropped_comes_back(
    tmp_path: Path, mode: str, eventfd: int, what: str
) -> None:
    bus = Bus()
    fds = (eventfd,) if what == "descriptor" else ()
    payload = {"vp": POST[:8] + b"\7" + POST[9:], "length": POST[:-1]}.get(what, POST)
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            # As often as there are credits, and then some.
            for _ in range(150):
                await vmm.send(Number.POST_MESSAGE, payload, fds=fds, flags=ASYNC, seq=0)
                credit = await vmm.expect(Number.POST_CREDIT)
                assert PostCredit.decode_untrusted(credit.payload).count == 1
            assert bus.events == []
            await vmm.post(Number.POST_MESSAGE, POST)
            await vmm.expect(Number.POST_CREDIT)
            assert [type(event) for event in bus.events] == [PostedMessage]


async def test_the_credits_of_posts_before_their_time_come_back_with_the_attachment(
    tmp_path: Path,
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.post(Number.POST_MESSAGE, POST)
            await vmm.ok(Number.VM_INFO, INFO.encode())
            for _ in range(63):
                await vmm.post(Number.POST_MESSAGE, POST)
            vmm.memfd = make_memfd()
            seq = await vmm.send(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            for _ in range(2):
                await vmm.answer(await vmm.expect(Number.ADD_MSG_PORT))
            await vmm.expect_answer(Number.SET_MEM_TABLE, seq)
            credit = await vmm.expect(Number.POST_CREDIT)
            assert PostCredit.decode_untrusted(credit.payload).count == 64
            assert bus.events == []


async def test_posting_before_its_time_is_bounded_by_the_credits_too(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            for _ in range(65):
                await vmm.post(Number.POST_MESSAGE, POST)
            assert await vmm.receive() is None


# -- 2, 2.3: one reply for each request, and a refusal before the end ------------------------------

TOO_LONG = HEADER.pack(Number.HELLO, 0, 7, MAX_PAYLOAD, 0, 0) + bytes(MAX_PAYLOAD + 1)


@pytest.mark.parametrize(
    ("data", "fds", "code"),
    [
        (pack_frame(Number.SET_SINT_FD, 0, 7, SetSintFd(0, 2).encode(), 1), 2, errno.EBADMSG),
        (pack_frame(Number.SET_SINT_FD, 0, 7, SetSintFd(0, 2).encode(), 2), 1, errno.EBADMSG),
        (pack_frame(Number.HELLO, 0, 7, b"", 0), 1, errno.EBADMSG),
        (pack_frame(Number.HELLO, 0, 7, b"", 65), 65, errno.EMSGSIZE),
        (pack_frame(Number.HELLO, 0, 7, b"", 64), 65, errno.EBADMSG),
        (pack_frame(Number.HELLO, 0, 7, b"", 253), 253, errno.EMSGSIZE),
        (HEADER.pack(Number.HELLO, 0, 7, MAX_PAYLOAD + 1, 0, 0), 0, errno.EMSGSIZE),
        (TOO_LONG, 0, errno.EMSGSIZE),
    ],
)
async def test_a_request_that_ends_the_connection_is_refused_once(
    tmp_path: Path, mode: str, eventfd: int, data: bytes, fds: int, code: int
) -> None:
    if mode == "stream" and data is TOO_LONG:
        data = HEADER.pack(Number.HELLO, 0, 7, MAX_PAYLOAD + 1, 0, 0) + bytes(MAX_PAYLOAD + 1)
    async with running_server(tmp_path / "s", Bus(), mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach(Feature.DIRECT)
            await vmm.send_bytes(data, (eventfd,) * fds)
            frame = await vmm.receive()
            assert frame is not None
            assert (frame.flags, frame.seq) == (REPLY | ERROR, 7)
            assert ErrorReply.decode_untrusted(frame.payload).errno == code
            assert await vmm.receive() is None
        await still_served(path, mode)


async def test_a_refusal_gets_out_behind_what_is_queued(tmp_path: Path) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            # More than the socket takes at once.
            for vp, flag in ((vp, flag) for vp in range(2) for flag in range(2048)):
                bus.transport.open_call(vp, 2, flag).signal()
            await vmm.send_bytes(HEADER.pack(Number.RESET, 0, 7, 1, 0, 0))
            kinds = []
            while (frame := await vmm.receive()) is not None:
                kinds.append((frame.kind, frame.flags))
            assert kinds.count((Number.SIGNAL_FLAG, ASYNC)) == 4096
            assert kinds[-1] == (Number.RESET, REPLY | ERROR)


@pytest.mark.parametrize("spec", MESSAGES.values(), ids=lambda spec: spec.name)
async def test_the_async_flag_on_what_is_answered_ends_the_connection(
    tmp_path: Path, spec: MessageSpec
) -> None:
    """Whoever sends it would wait for an answer, or believes that there is none: not only ours."""
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.post(spec.number, b"")
            await vmm.send(Number.QUERY, b"x")
            frame = await vmm.receive()
            if spec.is_async:
                assert frame is not None
                assert frame.kind == Number.QUERY
            else:
                assert frame is None


async def test_an_asynchronous_message_sent_as_a_request_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            for spec in MESSAGES.values():
                if spec.is_async:
                    expected = (
                        errno.EPROTO if spec.direction is Direction.TO_SERVER else errno.ENOSYS
                    )
                    assert (await vmm.refused(spec.number))[0] == expected, spec.name


# -- 5.10, 5.11: one of RESET, PAUSE and RESUME at a time ------------------------------------------


@pytest.mark.parametrize("first", [Number.PAUSE, Number.RESET, Number.RESUME])
async def test_while_one_is_unanswered_each_other_is_refused_with_ebusy(
    tmp_path: Path, first: Number
) -> None:
    bus = Bus()
    payload = {Number.RESET: Reset(0).encode()}
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            if first is Number.RESUME:
                await vmm.ok(Number.PAUSE)
            bus.auto = False
            happened = len(bus.events)
            seq = await vmm.send(first, payload.get(first, b""))
            for kind in (Number.PAUSE, Number.RESET, Number.RESUME):
                code, text = await vmm.refused(kind, payload.get(kind, b""))
                assert code == errno.EBUSY, kind
                assert "under way" in text
            assert (await vmm.refused(Number.RESUME, b"x"))[0] == errno.EMSGSIZE
            bus.events[happened].done()
            await vmm.expect_answer(first, seq)
            bus.auto = True
            # As it was, with the state that the first one has led to.
            last = Number.RESUME if first is Number.PAUSE else Number.PAUSE
            await vmm.ok(last)


# -- 7: the best tier at any moment ----------------------------------------------------------------


async def test_a_channel_opened_in_t2_falls_to_t1_if_that_is_agreed(
    tmp_path: Path, eventfd: int
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.DIRECT | Feature.CALL_FD)
            await vmm.ok(Number.SET_SINT_FD, SetSintFd(0, 2).encode(), fds=(eventfd,))
            on = SynicState(0, 1, 0x3001, 0x4001, 0xF3).encode()
            off = SynicState(0, 1, 0x3001, 0, 0xF3).encode()
            await vmm.ok(Number.SYNIC_STATE, on)
            call = bus.transport.open_call(0, 2, 9)
            assert call.tier == 2
            await vmm.ok(Number.SYNIC_STATE, off)
            assert call.tier == 1
            call.signal()
            frame = await vmm.expect(Number.SET_CALL_FD)
            assert SetCallFd.decode_untrusted(frame.payload) == SetCallFd(call.port, 0, 2, 9)
            assert os.eventfd_read(frame.fds[0]) == 1
            await vmm.answer(frame)
            # And back, and down again, with the same eventfd.
            await vmm.ok(Number.SYNIC_STATE, on)
            assert call.tier == 2
            await vmm.ok(Number.SYNIC_STATE, off)
            call.signal()
            assert os.eventfd_read(frame.fds[0]) == 1
            frame.close()
            call.close()
            assert (await vmm.expect(Number.SET_CALL_FD)).fds == []


async def test_a_refusal_of_t1_behind_t2_is_not_asked_for_again(
    tmp_path: Path, eventfd: int
) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach(Feature.DIRECT | Feature.CALL_FD)
            await vmm.ok(Number.SET_SINT_FD, SetSintFd(0, 2).encode(), fds=(eventfd,))
            await vmm.ok(Number.SYNIC_STATE, SynicState(0, 1, 0x3001, 0x4001, 0xF3).encode())
            call = bus.transport.open_call(0, 2, 9)
            await vmm.ok(Number.SYNIC_STATE, SynicState(0, 1, 0x3001, 0, 0xF3).encode())
            call.signal()
            frame = await vmm.expect(Number.SET_CALL_FD)
            frame.close()
            await vmm.answer(frame, errno.ENOSPC)
            # The signal is repeated, and the next goes the same way.
            await vmm.expect(Number.SIGNAL_FLAG)
            assert call.tier == 0
            call.signal()
            await vmm.expect(Number.SIGNAL_FLAG)


# -- texts: what people read -----------------------------------------------------------------------


async def test_a_refusal_for_the_state_names_the_role(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm, raw_vmm(control(path)) as operator:
            _, text = await vmm.refused(Number.COMMAND, b"{}")
            assert text == "COMMAND: not allowed to anybody in state 'new'"
            await vmm.attach()
            _, text = await vmm.refused(Number.COMMAND, b"{}")
            assert text == "COMMAND: not allowed to a VMM in state 'attached'"
            hello = Hello(1, 1, 0, 0, Role.OPERATOR, "op")
            await operator.ok(Number.HELLO, hello.encode())
            code, text = await operator.refused(Number.PAUSE)
            assert (code, text) == (
                errno.EPERM, "PAUSE: not allowed to an operator in state 'operator'",
            )  # fmt: skip


async def test_a_guest_that_cannot_be_served_is_told_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(transport: SocketTransport) -> None:
        raise ExceptionGroup("from a nursery", [ConfigError("raw:disk.img: in use by another")])

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            vmm.memfd = make_memfd()
            code, text = await vmm.refused(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            assert code == errno.EIO
            assert text.endswith("cannot be served: raw:disk.img: in use by another")
            await vmm.expect(Number.GOODBYE)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert messages == ["guest: cannot be served: raw:disk.img: in use by another"]
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_bug_is_our_own_affair(tmp_path: Path) -> None:
    async def handler(transport: SocketTransport) -> None:
        raise ZeroDivisionError("/a/path/of/ours")

    async with running_server(tmp_path / "s", handler) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            vmm.memfd = make_memfd()
            _, text = await vmm.refused(Number.SET_MEM_TABLE, TABLE.encode(), fds=(vmm.memfd,))
            assert text.endswith("the server failed, see its log")


@pytest.mark.parametrize("role", [Role.VMM, Role.OPERATOR])
async def test_the_end_of_a_connection_names_whose_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, role: Role
) -> None:
    caplog.set_level("INFO")
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path if role is Role.VMM else control(path)) as vmm:
            hello = Hello(1, 1, 0, 1, role, "alice")
            await vmm.ok(Number.HELLO, hello.encode())
            await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
            assert await vmm.receive() is None
        with raw_vmm(path) as vmm:
            await vmm.send(Number.HELLO, HELLO.encode())
            await vmm.receive_and_drop()
        expected = "alice" if role is Role.VMM else "operator 'alice'"
        await until(
            lambda: sum(": closed:" in record.getMessage() for record in caplog.records) == 2
        )
    ends = [record.getMessage() for record in caplog.records]
    assert f"{expected}: closed: the peer said goodbye" in ends
    assert "guest: closed: the peer closed the connection" in ends
