"""A guest goes on being served while another one, or its VMM, does its worst.

Each test has a real server with a process per guest. While the attack is under way, which its
rounds tell, the victim's requests complete, operators are answered, and the supervisor stays as it
was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import trio

from tests.support.attackers import WORST, Attack, guest_process, silent_file
from tests.support.fuse import FLUSH, silent_file_system
from tests.support.house import ROOT
from tests.support.patience import LOOK, PATIENCE, until, until_in_thread
from tests.unit.supervisor.test_supervisor import guest_on
from vmbus.attach.client import operator
from vmbus.errors import VMBusError

pytestmark = pytest.mark.slow

ROUNDS = 5
MIB = 1 << 20


class Server:
    """``vmbus serve`` as it is."""

    def __init__(self, path: str, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process

    async def query(self, kind: str = "status") -> dict[str, Any]:
        return await trio.to_thread.run_sync(operator.query, self.path, kind)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        return self.memory_of(self.process.pid)

    def memory_of(self, pid: int) -> int:
        """Bytes of a process that are its own."""
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            _size, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * 4096

    async def guest(self, name: str) -> dict[str, Any]:
        """What an operator sees of a guest, once it is there."""
        with trio.fail_after(PATIENCE):
            while True:
                for each in (await self.query("guests"))["guests"]:
                    if each["name"] == name:
                        return dict(each)
                await trio.sleep(LOOK)


@contextlib.contextmanager
def serving(tmp_path, *disks: str, net: str = "") -> Iterator[Server]:
    path = str(tmp_path / "s")
    words = [word for disk in disks or ("ram:4M",) for word in ("--disk", disk)]
    words += ["--net", net] if net else []
    command = [sys.executable, "-m", "vmbus.cli", "serve", "--socket", path, *words]
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log) as process,
    ):
        try:

            def answers() -> bool:
                with contextlib.suppress(VMBusError, OSError):
                    return bool(operator.query(path, "status"))
                return False

            until_in_thread(answers)
            yield Server(path, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, "it ends when it is told to"
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def victim(server: Server) -> AsyncIterator[Any]:
    async with guest_on(server.path, "victim") as ((disk, *_), _, _):
        yield disk


async def served(disk: Any, server: Server, seed: int) -> None:
    """The victim's requests complete and operators are answered."""
    with trio.fail_after(PATIENCE):
        data = bytes([seed % 251]) * 4096
        await disk.write(8 * (seed % 16), data)
        assert await disk.read(8 * (seed % 16), 8) == data
        status = await server.query()
        assert status["guests_attached"] >= 1


@pytest.mark.parametrize("who", list(WORST))
async def test_a_guest_is_served_beside(who, tmp_path):
    with serving(tmp_path) as server:
        async with victim(server) as disk:
            await served(disk, server, 0)
            descriptors, memory = server.descriptors(), server.memory()
            with Attack(server.path, WORST[who]).under_way() as attack:
                for seed in range(ROUNDS):
                    await until(partial(attack.is_beyond, attack.rounds))
                    await served(disk, server, seed)
                # Of each worker: a socket and two pipes; 16 greet, 64 are guests.
                assert server.descriptors() - descriptors < 3 * (16 + 64 + 2)
                assert server.memory() - memory < 32 * MIB
            await served(disk, server, 1)
        assert (tmp_path / "log").stat().st_size < MIB


async def test_a_guest_is_served_beside_a_vmm_with_memory_of_a_file_system_that_never_answers(
    tmp_path,
):
    with (
        silent_file_system(tmp_path / "fuse") as (system, file),
        serving(tmp_path) as server,  # which ends although some of its workers cannot
    ):
        async with victim(server) as disk:
            step = partial(silent_file, str(file))
            with Attack(server.path, step).under_way() as attack:
                for seed in range(ROUNDS):
                    await until(partial(attack.is_beyond, attack.rounds))
                    await served(disk, server, seed)
                # To let go of it, a worker asks it, and waits; before that it has not been asked.
                await until(lambda: system.waiting)
            assert set(system.waiting) == {FLUSH}
            await served(disk, server, 1)


@pytest.mark.parametrize("how", ["greedy", "lists"])
async def test_a_guest_is_served_beside_one_that_wants_all(how, tmp_path):
    with serving(tmp_path) as server:
        async with victim(server) as disk:
            with guest_process(server.path, "other", how) as other:
                assert other.stdout is not None
                await trio.to_thread.run_sync(other.stdout.readline)
                before = await packets(server)
                for seed in range(ROUNDS):
                    await served(disk, server, seed)
                while await packets(server) < before + 32:
                    await served(disk, server, 0)
                assert (await server.guest("other"))["answers"]


async def packets(server: Server) -> int:
    """How many packets the other guest has sent."""
    return sum(each["packets_in"] for each in (await server.guest("other"))["channels"])


async def test_a_guest_is_served_beside_one_whose_eventfds_block(tmp_path):
    with serving(tmp_path) as server:
        async with victim(server) as disk:
            with guest_process(server.path, "full", "full") as full:
                assert full.stdout is not None
                await trio.to_thread.run_sync(full.stdout.readline)
                while (await server.guest("full"))["answers"]:  # until its worker waits
                    await served(disk, server, 0)
                for seed in range(ROUNDS):
                    await served(disk, server, seed)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGSTOP, signal.SIGRTMIN + 3])
async def test_a_guest_is_served_beside_a_worker_that_gets(number, tmp_path):
    with serving(tmp_path) as server:
        async with victim(server) as disk:
            with guest_process(server.path, "other", "idle"):
                os.kill((await server.guest("other"))["pid"], number)
                for seed in range(ROUNDS):
                    await served(disk, server, seed)
                if number != signal.SIGSTOP:
                    await until(
                        lambda: operator.query(server.path, "status")["guests_attached"] == 1
                    )


async def test_a_shared_disk_is_served_beside_one_whose_worker_stands_still(tmp_path):
    with serving(tmp_path, "ram:[shared]8M") as server:
        async with victim(server) as disk:
            with guest_process(server.path, "other", "greedy") as other:
                assert other.stdout is not None
                await trio.to_thread.run_sync(other.stdout.readline)
                os.kill((await server.guest("other"))["pid"], signal.SIGSTOP)
                for seed in range(ROUNDS):
                    await served(disk, server, seed)
