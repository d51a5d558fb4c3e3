"""Operators at the server's socket: questions, commands, and answers of any length."""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.attach import POST, Bus, control, raw_vmm, running_server
from vmbus.attach.protocol.limits import Role
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import Goodbye, Hello
from vmbus.attach.server import open_listener, serve_operators
from vmbus.errors import NotBackError, VMBusError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

OPERATOR = Hello(1, 1, 0, 0, Role.OPERATOR, "operator").encode()


async def test_an_operator_queries_and_commands(tmp_path: Path) -> None:
    async def query(kind: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"kind": kind}

    def command(value: dict[str, Any]) -> dict[str, Any]:
        return {"did": value}

    async with running_server(tmp_path / "s", Bus(), query=query, command=command) as path:
        with raw_vmm(control(path)) as vmm:
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


@pytest.mark.parametrize("role", Role)
async def test_a_role_is_had_by_whoever_may_open_its_socket(tmp_path: Path, role: Role) -> None:
    hello = Hello(1, 1, 0, 1, role, "me").encode()
    async with running_server(tmp_path / "s", Bus()) as path:
        right, wrong = (path, control(path)) if role is Role.VMM else (control(path), path)
        with raw_vmm(wrong) as peer:
            code, text = await peer.refused(Number.HELLO, hello)
            assert code == errno.EPERM
            assert "have one of their own" in text
            assert (await peer.refused(Number.COMMAND, b"{}"))[0] == errno.EPERM
        with raw_vmm(right) as peer:
            await peer.ok(Number.HELLO, hello)


async def test_an_answer_that_is_too_long_comes_in_a_memfd(tmp_path: Path) -> None:
    big = {"list": ["x" * 100] * 1000}
    async with running_server(tmp_path / "s", Bus(), query=lambda _: big) as path:
        with raw_vmm(control(path)) as vmm:
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
        if kind == "hung":
            raise NotBackError("disk 0:0:0: READ(10): not back in 10 s")
        if kind == "json":
            return {"a": object()}
        raise ZeroDivisionError("a bug")

    async with running_server(tmp_path / "s", Bus(), query=query) as path:
        with raw_vmm(control(path)) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            assert await vmm.refused(Number.QUERY, b"none") == (errno.EINVAL, "no such kind")
            assert (await vmm.refused(Number.QUERY, b"disk"))[0] == errno.ENOENT
            code, text = await vmm.refused(Number.QUERY, b"hung")
            assert (code, text) == (errno.ETIMEDOUT, "disk 0:0:0: READ(10): not back in 10 s")
            assert (await vmm.refused(Number.QUERY, b"json"))[0] == errno.EIO
            assert (await vmm.refused(Number.QUERY, b"bug"))[0] == errno.EIO
            assert (await vmm.refused(Number.COMMAND, b"{}"))[0] == errno.ENOSYS
    assert "a bug" in caplog.text
    async with running_server(tmp_path / "s", Bus()) as path:
        with raw_vmm(control(path)) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            assert (await vmm.refused(Number.QUERY, b"none"))[0] == errno.ENOSYS


async def test_one_question_at_a_time(tmp_path: Path) -> None:
    gate = trio.Event()

    async def query(kind: str) -> dict[str, Any]:
        await gate.wait()
        return {}

    async with running_server(tmp_path / "s", Bus(), query=query) as path:
        with raw_vmm(control(path)) as vmm:
            await vmm.ok(Number.HELLO, OPERATOR)
            seq = await vmm.send(Number.QUERY, b"slow")
            assert (await vmm.refused(Number.QUERY, b"fast"))[0] == errno.EBUSY
            gate.set()
            await vmm.expect_answer(Number.QUERY, seq)


async def test_whoever_has_no_business_here_is_hung_up_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with open_listener(path) as listener:
        async with trio.open_nursery() as nursery:
            mine = partial(serve_operators, listener, stranger=lambda peer: peer.pid == os.getpid())
            nursery.start_soon(mine)
            with raw_vmm(path) as vmm:
                assert await vmm.receive() is None
            nursery.cancel_scope.cancel()
