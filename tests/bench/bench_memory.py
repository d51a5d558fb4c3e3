"""Memory of a server process: at rest, per attached guest, per channel."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from storvsp.guest import attach
from tests.bench.harness import Figure
from vmbus.attach.client.machine import attach_machine
from vmbus.guest.kernel import boot
from vmbus.guest.personality import LINUX_6_1
from vmbus.partition.soft_machine import SoftMachine

GUESTS = 50
MIB = 1 << 20


def figures() -> list[Figure]:
    """Measure."""
    return trio.run(_figures)


async def _figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "socket")
        server = subprocess.Popen(  # returns at once
            [sys.executable, "-m", "vmbus.cli", "serve", "--socket", path, "--disk", "ram:64M"],
            stderr=subprocess.DEVNULL,
        )
        try:
            with trio.fail_after(30):
                while not Path(path).exists():
                    await trio.sleep(0.05)
            return await _measure(server.pid, path)
        finally:
            server.terminate()
            server.wait()


async def _measure(pid: int, path: str) -> list[Figure]:
    # The first guest brings code with it that is loaded lazily; it is part of the rest figure.
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(_guest(path, 0))
    rest = _private(pid)
    found = [
        Figure("server at rest, resident", (_resident(pid)) / MIB, "MiB", target=60.0),
    ]
    async with contextlib.AsyncExitStack() as stack:
        start = time.perf_counter()
        for number in range(GUESTS):
            await stack.enter_async_context(_guest(path, number))
        spent = time.perf_counter() - start
        growth = _private(pid) - rest
        found += [
            Figure(
                f"per attached guest with an open controller, {GUESTS} of them",
                growth / GUESTS / MIB,
                "MiB",
                target=4.0,
            ),
            Figure(
                f"per guest attached, booted and its disk opened, {GUESTS} of them",
                spent / GUESTS * 1000,
                "ms",
            ),
        ]
    return found


@contextlib.asynccontextmanager
async def _guest(path: str, number: int) -> AsyncIterator[None]:
    machine = SoftMachine(((0, 4 * MIB),))
    try:
        async with (
            attach_machine(machine, path, name=f"guest{number}"),
            boot(machine, LINUX_6_1) as guest,
        ):
            (offer,) = await guest.connection.connect()
            adapter = await attach(guest, offer, sub_channels=0)
            yield
            await adapter.close()
            await guest.connection.unload()
    finally:
        machine.close()


def _status(pid: int, field: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def _private(pid: int) -> int:
    """Anonymous memory: all but code and the guests' RAM, which is shared."""
    return _status(pid, "RssAnon")


def _resident(pid: int) -> int:
    """Everything but the guests' RAM."""
    return _status(pid, "VmRSS") - _status(pid, "RssShmem")
