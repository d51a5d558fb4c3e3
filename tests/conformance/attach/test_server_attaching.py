"""VMMs that attach to a server, with raw frames: in what order, how many, how often."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.attach import (
    HELLO,
    INFO,
    POST,
    RAM_SIZE,
    TABLE,
    Bus,
    RawVmm,
    make_memfd,
    raw_vmm,
    running_server,
)
from tests.support.leaks import count_fds
from tests.support.patience import LOOK, PATIENCE
from vmbus.attach.protocol.framing import ASYNC, ERROR
from vmbus.attach.protocol.limits import MAX_PAYLOAD, Feature, Role
from vmbus.attach.protocol.messages import RESERVED, Number
from vmbus.attach.protocol.to_server import Goodbye, Hello, HelloReply, VmInfo
from vmbus.attach.protocol.to_vmm import DeliverMessage, PostCredit
from vmbus.attach.server import open_listener, serve
from vmbus.partition.events import PostedMessage

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

# -- attaching -----------------------------------------------------------------------------------


async def test_a_guest_attaches_posts_is_delivered_to_and_leaves(tmp_path: Path, mode: str) -> None:
    bus = Bus()
    async with running_server(tmp_path / "s", bus, mode=mode) as path:
        with raw_vmm(path, mode) as vmm:
            await vmm.attach()
            transport = bus.transport
            assert (transport.name, transport.vp_count) == ("guest", 2)
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
            with trio.fail_after(PATIENCE):
                await third.greet()
                while (await third.ask(Number.VM_INFO, INFO.encode())).flags & ERROR:
                    await trio.sleep(LOOK)
        assert len(bus.transports) == 1


async def test_a_vm_may_not_have_more_processors_than_it_said(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            info = VmInfo(65, 4096, bytes(16), 0, 0)
            assert (await vmm.refused(Number.VM_INFO, info.encode()))[0] == errno.EINVAL


async def test_who_says_nothing_is_disconnected(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
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
        with trio.fail_after(PATIENCE):
            await trio.sleep_forever()
    assert bus.ended.is_set()


async def test_the_server_can_leave_with_its_guest(tmp_path: Path) -> None:
    bus = Bus()
    with open_listener(tmp_path / "s") as listener:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def run() -> None:
                with trio.fail_after(PATIENCE):
                    await serve(listener, bus, exit_after_guest=True)

            with raw_vmm(tmp_path / "s") as vmm:
                # Not a guest: the server stays.
                await vmm.greet()
            with raw_vmm(tmp_path / "s") as vmm:
                await vmm.attach()
    assert bus.ended.is_set()


# -- operators -----------------------------------------------------------------------------------


async def test_goodbye_is_possible_before_attaching(tmp_path: Path) -> None:
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(path) as vmm:
            await vmm.greet()
            await vmm.ok(Number.VM_INFO, INFO.encode())
            assert (await vmm.refused(Number.GOODBYE, b""))[0] == errno.EMSGSIZE
            await vmm.ok(Number.GOODBYE, Goodbye(0).encode())
            assert await vmm.receive() is None
