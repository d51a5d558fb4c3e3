"""A passt that another process has started: it comes by a line, and goes with it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from netvsp.endpoint import EndpointError
from netvsp.endpoints import nat
from netvsp.endpoints.passt import Passt, PasstEndpoint, spawn
from netvsp.endpoints.passt_keeper import LineStarter, PasstKeeper
from netvsp.plugin import PLUGIN
from tests.support.leaks import count_fds
from tests.support.patience import PATIENCE, until
from vmbus.errors import ConfigError
from vmbus.plugins.sharing import make_line


class Program:
    """Starts a program that says one thing and waits for its stream's end."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    async def spawn(self) -> tuple[trio.Process, socket.socket, int]:
        if self.error is not None:
            raise self.error
        return await spawn("/bin/sh", ["-c", "echo here I am >&2; exec sleep 1000"])


@contextlib.asynccontextmanager
async def kept(program: Program) -> AsyncIterator[LineStarter]:
    """A worker's starter, at a line to a keeper."""
    ours, theirs = make_line(0)
    keeper = PasstKeeper(lambda _spec: program)  # type: ignore[arg-type, return-value]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.serve, theirs, "guest", "nat:")
        starter = LineStarter(ours)
        try:
            yield starter
        finally:
            starter.close()  # and the keeper returns
    await keeper.aclose()


def is_there(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def said(passt: Passt) -> None:
    await until(lambda: passt.last_line() == "here I am")


async def test_each_start_ends_the_one_before_and_the_lines_end_the_last():
    before = count_fds(collect=True)
    async with kept(Program()) as starter:
        first = await starter.start()
        await said(first)
        await first.aclose()
        second = await starter.start()
        assert not is_there(first.pid)
        assert is_there(second.pid)
    assert not is_there(second.pid)
    await second.aclose()
    assert count_fds() == before


async def test_a_program_that_cannot_be_started_is_said_with_the_reason():
    async with kept(Program(PermissionError(1, "no"))) as starter:
        for _ in range(2):  # the line stays
            with pytest.raises(EndpointError, match="Operation not permitted"):
                await starter.start()
        with pytest.raises(ConfigError, match="cannot be started: Operation not permitted"):
            await PasstEndpoint.open(starter)


async def test_what_makes_no_sense_ends_the_line(caplog):
    async with kept(Program()) as starter:
        starter._line.sock.send(b"stop everything")
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(starter._line.sock)
        with pytest.raises(EndpointError, match="has ended"):
            await starter.start()
    assert "guest: a message that is none for passt" in caplog.text


async def test_a_line_that_is_closed_while_somebody_waits_is_the_end():
    ours, theirs = make_line(0)
    starter = LineStarter(ours)
    with pytest.RaisesGroup(pytest.RaisesExc(EndpointError, match="has ended")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(starter.start)
            await trio.testing.wait_all_tasks_blocked()
            starter.close()
    theirs.close()


@pytest.mark.parametrize(("installed", "names"), [("/usr/bin/passt", ["a", "b"]), (None, [])])
def test_those_are_started_elsewhere_that_want_a_program(monkeypatch, installed, names):
    monkeypatch.setattr(nat, "find_passt", lambda: installed)
    specs = {
        "a": "nat:",
        "b": "nat:[tcp=80,mac=00:15:5d:00:00:01]",
        "c": "nat:[with=built-in]",
        "d": "nat:[tcp=none]",
        "e": "null:",
        "f": "no specification",
    }
    found = PLUGIN.shared(list(specs.values()), {})
    assert list(found) == [specs[name] for name in names]
    for share in found.values():
        assert (share.programs, share.within_process, share.keeper) == (True, False, "nat:")
