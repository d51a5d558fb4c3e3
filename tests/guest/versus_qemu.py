"""``make guest-bench``: our disk beside QEMU's virtio-scsi, for the same guest.

Same machine, guest kernel, initramfs, disk image and fio jobs; our server and VMM on one side, QEMU
with KVM on the other. They take turns, at least five rounds for a table that is worth keeping.
Nothing here decides anything: it prints Markdown (``tests/guest/rig/comparison.py``).

The image is a file in the page cache: what is measured is the way to the disk. QEMU reads and
writes it as we do, through the page cache (its default).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.guest.conftest import TOOLS_LUN, Server
from tests.guest.rig.assets import Assets, load_assets
from tests.guest.rig.comparison import (
    ROUNDS,
    Kind,
    Results,
    machine_speed,
    order,
    report,
    table,
)
from tests.guest.rig.guest import Guest, GuestError
from tests.guest.rig.processes import Lines, start_forking

SIZE = 128 << 20
SECONDS = 5
ATTEMPTS = 4
PATIENCE = 60
"""Seconds beyond a job's own for it to end."""
JOBS = {
    "4 KiB random read, depth 1": ("--rw=randread --bs=4k --iodepth=1", "iops", "read"),
    "4 KiB random read, depth 32": ("--rw=randread --bs=4k --iodepth=32", "iops", "read"),
    "128 KiB sequential read, depth 8": ("--rw=read --bs=128k --iodepth=8", "MB/s", "read"),
    "128 KiB sequential write, depth 8": ("--rw=write --bs=128k --iodepth=8", "MB/s", "write"),
}
"""Name: fio's options, unit, direction."""
FIELD = {
    ("read", "iops"): "cut -d';' -f8 /run/result",
    ("read", "MB/s"): "awk -F';' '{print $7 * 1024 / 1e6}' /run/result",
    ("write", "MB/s"): "awk -F';' '{print $48 * 1024 / 1e6}' /run/result",
}
"""What to look at in fio's terse output, version 3: the guest's serial port is slow."""
BOOT = "boot, from the VMM's start to the first command"
VIRTIO = ("virtio_pci", "virtio_scsi", "sd_mod")
KINDS = {BOOT: Kind("s", 1, less=True)} | {title: Kind(job[1]) for title, job in JOBS.items()}


class Program:
    """A program started as it is: the start is part of what is measured.

    Args:
        arguments: The command line.
        log: Its standard error goes here.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log_path = log
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        assert self._process.stdout is not None
        self.output: Lines | None = Lines(self._process.stdout)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def write(self, data: bytes) -> None:
        """Write to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def log(self) -> str:
        """Return what it has written to standard error."""
        return self.log_path.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Return the exit code."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


def start_boot(arguments: Sequence[str], log: Path) -> Program:
    """Start ``vmbus ARGUMENTS``."""
    return Program([sys.executable, "-m", "vmbus.cli", *arguments], log)


def resident(pid: int) -> float:
    """MiB of a process's own memory; what it shares with the guest is the guest's."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = {name: int(kib) for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return (fields["RssAnon"] + fields["RssFile"]) / 1024


class Contest:
    """Boots guests on either side and measures them.

    Args:
        assets: The rig's.
        folder: For disks and logs.
        poll: Microseconds for ``vmbus serve --poll``.
    """

    def __init__(self, assets: Assets, folder: Path, poll: int | None) -> None:
        self.assets = assets
        self.folder = folder
        self.poll = poll
        self.image = folder / "disk.img"
        self.memory: dict[str, float] = {}
        self._qemu: list[str] | None = None
        self._write_image()

    def _write_image(self) -> None:
        with open(self.image, "wb") as file:
            file.writelines(os.urandom(1 << 20) for _ in range(SIZE >> 20))

    def _qemu_command(self) -> list[str]:
        """Return how to start QEMU. In the nested rig it is copied to the fast disk first."""
        if self._qemu is None:
            text = self.assets.emulator.read_text()
            found = re.search(r"^tree='(.*)'$", text, re.MULTILINE)
            assert found is not None
            source, tree = Path(found[1]), self.folder / "qemu"
            for name in ("usr/lib/x86_64-linux-gnu", "usr/share/qemu", "usr/share/seabios"):
                shutil.copytree(source / name, tree / name, symlinks=True,
                                ignore=shutil.ignore_patterns("perl*", "gconv", "*.a"))  # fmt: skip
            (tree / "usr/bin").mkdir()
            name = "usr/bin/qemu-system-x86_64"
            shutil.copy2(source / name, tree / name)
            library = tree / "usr/lib/x86_64-linux-gnu"
            self._qemu = [
                *(str(library / "ld-linux-x86-64.so.2"), "--library-path", str(library)),
                *(str(tree / name), "-L", str(tree / "usr/share/qemu")),
                *("-L", str(tree / "usr/share/seabios")),
            ]
        return self._qemu

    @contextlib.contextmanager
    def ours(self) -> Iterator[tuple[Guest, float]]:
        """Boot a guest on our bus. Yields it and the seconds that it took."""
        specs = (f"raw:[lun=0]{self.image}", f"raw:[ro,lun={TOOLS_LUN}]{self.assets.root}")
        options = [] if self.poll is None else [f"--poll={self.poll}"]
        server = Server(self.folder, 0, [*(f"--disk={spec}" for spec in specs), *options])
        rest = resident(server.command.pid)
        start = time.monotonic()
        guest = Guest(
            self.assets, self.folder / "ours.log", [f"--socket={server.socket}"],
            modules=("hv_storvsc", "sd_mod"), start=start_boot,
        )  # fmt: skip
        try:
            guest.wait_ready()
            yield guest, time.monotonic() - start
            self.memory["server at rest, MiB"] = rest
            self.memory["server with a guest that was busy, MiB"] = resident(server.command.pid)
            worker = server.guests()[0]["pid"]
            self.memory["that guest's worker beside the guest's memory, MiB"] = resident(worker)
            self.memory["vmbus boot beside the guest's memory, MiB"] = resident(guest.vmm.pid)
        finally:
            guest.kill()
            server.command.send_signal(signal.SIGTERM)
            server.command.wait(60)

    @contextlib.contextmanager
    def qemu(self) -> Iterator[tuple[Guest, float]]:
        """Boot a guest on QEMU. Yields it and the seconds that it took."""
        command = self._qemu_command()

        def start(arguments: Sequence[str], log: Path) -> Program:
            append = next(each for each in arguments if each.startswith("--append="))
            return Program(
                [
                    *command,
                    *("-M", "q35", "-enable-kvm", "-cpu", "host", "-m", "512M", "-nodefaults"),
                    *("-display", "none", "-serial", "stdio", "-no-reboot"),
                    *("-kernel", str(self.assets.kernel), "-initrd", str(self.assets.initramfs)),
                    *("-append", append.partition("=")[2]),
                    *("-device", "virtio-scsi-pci"),
                    *_drive("data", self.image, 0, "off"),
                    *_drive("tools", self.assets.root, TOOLS_LUN, "on"),
                ],
                log,
            )

        began = time.monotonic()
        guest = Guest(self.assets, self.folder / "qemu.log", [], modules=VIRTIO, start=start)
        try:
            guest.wait_ready()
            yield guest, time.monotonic() - began
            self.memory["QEMU beside the guest's memory, MiB"] = resident(
                guest.vmm.pid
            ) - _shared_anonymous(guest.vmm.pid)
        finally:
            guest.kill()

    def emulator_version(self) -> str:
        """Return what the other side says it is."""
        command = [*self._qemu_command(), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.partition("\n")[0]

    def measure(self, side: Callable[[], Any], results: Results, seconds: int) -> None:
        """Boot one side's guest, run the jobs in it, and add to the results.

        A guest on emulated processors may end on its own, on either side, and is measured again
        then: docs/explanation/nested-rig.md.
        """
        for attempt in range(ATTEMPTS):
            found: Results = {}
            try:
                self._measure(side, found, seconds)
            except GuestError as error:
                if attempt == ATTEMPTS - 1:
                    raise
                reason = str(error).partition("\n")[0]
                print(f"{side.__name__}: {reason}; once more", file=sys.stderr, flush=True)
            else:
                for title, values in found.items():
                    results.setdefault(title, []).extend(values)
                return

    def _measure(self, side: Callable[[], Any], results: Results, seconds: int) -> None:
        with side() as (guest, booted):
            results.setdefault(BOOT, []).append(booted)
            guest.mount_tools(TOOLS_LUN)
            name = guest.disk(0)
            guest.tool("fio --version")
            for title, (options, unit, direction) in JOBS.items():
                guest.run(
                    f"chroot /tools fio --name=job --filename=/dev/{name} --direct=1"
                    f" --ioengine=libaio --size={SIZE} --runtime={seconds} --time_based"
                    f" --output-format=terse {options} >/run/result",
                    seconds + PATIENCE,
                )
                value = float(guest.run(FIELD[direction, unit]))
                results.setdefault(title, []).append(value)


def _drive(name: str, path: Path, lun: int, read_only: str) -> tuple[str, ...]:
    return (
        *("-drive", f"if=none,id={name},format=raw,file={path},readonly={read_only}"),
        *("-device", f"scsi-hd,drive={name},lun={lun}"),
    )


def _shared_anonymous(pid: int) -> float:
    """MiB of the largest anonymous mapping in use: QEMU's guest memory."""
    largest = 0
    for block in Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:"):
        size = re.search(r"^Size:\s+(\d+) kB", block, re.MULTILINE)
        used = re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE)
        if size and used and int(size[1]) == 512 << 10:
            largest = int(used[1])
    return largest / 1024


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each job")
    parser.add_argument("--poll", type=int, help="microseconds, for vmbus serve")
    options = parser.parse_args()
    assets = load_assets()
    if assets is None:
        print("runs in the rig: make guest-bench", file=sys.stderr)
        return 2
    folder = assets.scratch / "versus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start_forking()
    contest = Contest(assets, folder, options.poll)
    ours: Results = {}
    qemu: Results = {}
    machine: Results = {}
    for number in range(options.rounds):
        for title, value in machine_speed().items():
            machine.setdefault(title, []).append(value)
        order(
            number,
            partial(contest.measure, contest.ours, ours, options.seconds),
            partial(contest.measure, contest.qemu, qemu, options.seconds),
        )
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    lines = report(
        guest=f"Linux {assets.release}, 1 processor, 512 MiB",
        emulator=contest.emulator_version(),
        machine=machine,
        comparison=table(ours, qemu, KINDS),
        rounds=options.rounds,
    )
    print("\n".join(lines))
    print("\n| memory | |\n|---|---|")
    for name, value in contest.memory.items():
        print(f"| {name} | {value:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
