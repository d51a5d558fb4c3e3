"""VMMs that send what is no frame, or no answer: they lose their connection, nobody else does."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from tests.support.attach import HELLO, POST, Bus, raw_vmm, running_server, still_served
from tests.support.leaks import count_fds
from vmbus.attach.protocol.framing import ASYNC, ERROR, HEADER, REPLY, pack_frame
from vmbus.attach.protocol.limits import MAX_PAYLOAD
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import Reset
from vmbus.attach.protocol.to_vmm import ErrorReply

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

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
            frame = await vmm.expect_answer(1, 1)
            assert ErrorReply.decode_untrusted(frame.payload).errno == errno.EMSGSIZE
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
