"""Guests beside each other: memory and requests per second of several, in one process and in many,
and how long a guest waits whose neighbour does its worst.

Guests are processes of their own, since a Python guest keeps a core busy by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

from tests.bench.harness import Figure
from tests.support import attackers
from tests.support.house import ROOT
from vmbus.attach.client import operator

MODES = {"a process per guest": [], "one process": ["--single-process"]}
GUESTS = 50
SECONDS = 3.0
COUNTS = (1, 2, 4)

GUEST = """
import sys, time
import trio
from storvsp.guest import attach, scan
from vmbus.attach.client.machine import attach_machine
from vmbus.guest import LINUX_6_1, boot
from vmbus.partition.soft_machine import SoftMachine

path, name, depth = sys.argv[1], sys.argv[2], int(sys.argv[3])

async def read(disk, until, waits):
    while time.perf_counter() < until[0]:
        start = time.perf_counter()
        await disk.read(0, 8)
        waits.append(time.perf_counter() - start)
        if depth == 1:
            await trio.sleep(0.001)

async def main():
    machine = SoftMachine([(0, 16 << 20)])
    async with attach_machine(machine, path, name=name), boot(machine, LINUX_6_1) as guest:
        (offer, *_) = await guest.connection.connect()
        (disk,) = await scan(await attach(guest, offer, sub_channels=0))
        print("ready", flush=True)
        while seconds := await trio.to_thread.run_sync(sys.stdin.readline):
            waits = []
            until = [time.perf_counter() + float(seconds)]
            async with trio.open_nursery() as nursery:
                for _ in range(depth):
                    nursery.start_soon(read, disk, until, waits)
            print(len(waits), max(waits), flush=True)

trio.run(main)
"""


class Guest:
    """A guest in a process of its own, with one disk."""

    def __init__(self, path: str, name: str, depth: int) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'devices'}"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", GUEST, path, name, str(depth)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ready(self) -> None:
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def begin(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def result(self) -> tuple[int, float]:
        """Reads, and the longest wait for one in seconds."""
        count, longest = self._line().split()
        return int(count), float(longest)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def server(mode: list[str], *arguments: str) -> Iterator[tuple[str, int]]:
    """A server and its process id."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s")
        process = subprocess.Popen(
            [sys.executable, "-m", "vmbus.cli", "serve", "--socket", path, "-q", *mode,
             *(arguments or ("--disk", "ram:64M"))],
            cwd=ROOT,
        )  # fmt: skip
        try:
            while True:
                with contextlib.suppress(Exception):
                    operator.query(path, "status")
                    break
                time.sleep(0.05)
            yield path, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


@contextlib.contextmanager
def guests(path: str, count: int, depth: int, name: str = "g") -> Iterator[list[Guest]]:
    made = []
    try:
        made += [Guest(path, f"{name}{number}", depth) for number in range(count)]
        for each in made:
            each.ready()
        yield made
    finally:
        for each in made:
            each.close()


def private_bytes(pid: int) -> int:
    """Memory of a process that it shares with nobody."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(fields[name].split()[0]) << 10 for name in ("Private_Clean", "Private_Dirty"))


def figures() -> list[Figure]:
    """Measure."""
    return [*_memory(), *_rates(), *_waits()]


def _memory() -> Iterator[Figure]:
    with server([], "--disk", "ram:64M", "--max-guests", "64") as (path, _):
        made: list[Guest] = []
        try:
            for start in range(0, GUESTS, 5):
                some = [Guest(path, f"g{start + each}", 1) for each in range(5)]
                made += some
                for each in some:
                    each.ready()
            found = operator.query(path, "guests")["guests"]
            sizes = [private_bytes(guest["pid"]) for guest in found]
        finally:
            for each in made:
                each.close()
    name = f"private memory of a guest's process, {len(sizes)} attached"
    yield Figure(name, sum(sizes) / len(sizes) / (1 << 20), "MiB", target=12)


def _rates() -> Iterator[Figure]:
    for words, mode in MODES.items():
        with server(mode) as (path, _):
            for count in COUNTS:
                with guests(path, count, 32) as made:
                    for each in made:
                        each.begin(SECONDS)
                    total = sum(each.result()[0] for each in made)
                name = f"4 KiB reads/s of {count} Python guest(s), {words}"
                yield Figure(name, total / SECONDS / 1000, "k/s")


# -- neighbours that do their worst ----------------------------------------------------------------


@contextlib.contextmanager
def _nobody(_: str) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _busy(path: str) -> Iterator[None]:
    """A guest with a full queue."""
    with guests(path, 1, 64, "busy") as made:
        made[0].begin(2 * SECONDS)
        yield
        made[0].result()


@contextlib.contextmanager
def _guest(path: str, what: str) -> Iterator[None]:
    """A guest that uses 16 channels, or whose VMM's eventfds wait."""
    with attackers.guest_process(path, "bad", what) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield


@contextlib.contextmanager
def _stopped(path: str) -> Iterator[None]:
    """A guest whose process stands still; with one process for all, so does everybody."""
    with attackers.guest_process(path, "bad", "idle") as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = operator.query(path, "guests")["guests"]
        (pid,) = (guest["pid"] for guest in found if guest["name"] == "bad")
        os.kill(pid, signal.SIGSTOP)
        yield


@contextlib.contextmanager
def _attack(path: str, step: Callable[[attackers.Attack], None]) -> Iterator[None]:
    with attackers.Attack(path, step).under_way():
        yield


WORST: dict[str, Callable[[str], contextlib.AbstractContextManager[None]]] = {
    "nobody": _nobody,
    "a guest with a full queue": _busy,
    "a guest with full queues on 16 channels": partial(_guest, what="greedy"),
    **{who: partial(_attack, step=step) for who, step in attackers.WORST.items()},
}
ALONE: dict[str, Callable[[str], contextlib.AbstractContextManager[None]]] = {
    "a VMM whose eventfds wait": partial(_guest, what="full"),
    "a guest whose process stands still": _stopped,
}
"""What stops everybody where there is one process, for good: not measured there."""
WATCHED = 2.0
"""Seconds for each of them."""


def _waits() -> Iterator[Figure]:
    for words, mode in MODES.items():
        with server(mode) as (path, _), guests(path, 1, 1) as (victim,):
            for who, neighbour in (WORST if mode else WORST | ALONE).items():
                with neighbour(path):
                    victim.begin(WATCHED)
                    longest = victim.result()[1]
                target = 50.0 if not mode else None
                name = f"longest wait for a 4 KiB read beside {who}, {words}"
                yield Figure(name, longest * 1000, "ms", target=target)
