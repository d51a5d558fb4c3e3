"""Our disk beside QEMU's virtio-scsi.

The image is a file in the page cache: what is measured is the way to the disk. QEMU reads and
writes it as we do, through the page cache (its default).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.guest.conftest import TOOLS_LUN, Server
from tests.guest.rig.comparison import Kind
from tests.guest.rig.guest import Guest
from tests.guest.versus.contest import PATIENCE, Contest
from tests.guest.versus.programs import drive, guest_memory, resident, start_boot

OURS, QEMU = "vmbus", "QEMU virtio-scsi"
SIZE = 128 << 20
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


class DiskContest(Contest):
    """Disks of :data:`SIZE` bytes."""

    kinds = {BOOT: Kind("s", 1, less=True)} | {title: Kind(job[1]) for title, job in JOBS.items()}
    sides = (OURS, QEMU)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.image = self.folder / "disk.img"
        with open(self.image, "wb") as file:
            file.writelines(os.urandom(1 << 20) for _ in range(SIZE >> 20))

    @contextmanager
    def boot(self, side: str) -> Iterator[tuple[Guest, float]]:
        """As :meth:`Contest.boot` says."""
        with self._ours() if side == OURS else self._qemu() as booted:
            yield booted

    @contextmanager
    def _ours(self) -> Iterator[tuple[Guest, float]]:
        specs = (f"raw:[lun=0]{self.image}", f"raw:[ro,lun={TOOLS_LUN}]{self.assets.root}")
        server = Server(self.folder, 0, [*(f"--disk={spec}" for spec in specs), *self.options])
        rest = resident(server.command.pid)
        start = time.monotonic()
        guest = Guest(
            self.assets, self.folder / "ours.log", [f"--socket={server.socket}"],
            modules=("hv_storvsc", "sd_mod"), start=start_boot,
        )  # fmt: skip
        try:
            guest.wait_ready()
            yield guest, time.monotonic() - start
            worker = server.guests()[0]["pid"]
            self.memory |= {
                "server at rest": rest,
                "server with a guest that was busy": resident(server.command.pid),
                "that guest's worker, beside the guest's memory": resident(worker),
                "`vmbus boot`, beside the guest's memory": resident(guest.vmm.pid),
            }
        finally:
            guest.kill()
            server.command.send_signal(signal.SIGTERM)
            server.command.wait(60)

    @contextmanager
    def _qemu(self) -> Iterator[tuple[Guest, float]]:
        start = self.emulator.starts(
            *drive("data", self.image, 0, "off"),
            *drive("tools", self.assets.root, TOOLS_LUN, "on"),
        )
        began = time.monotonic()
        guest = Guest(self.assets, self.folder / "qemu.log", [], modules=VIRTIO, start=start)
        try:
            guest.wait_ready()
            yield guest, time.monotonic() - began
            pid = guest.vmm.pid
            self.memory["QEMU, beside the guest's memory"] = resident(pid) - guest_memory(pid)
        finally:
            guest.kill()

    def work(self, side: str, guest: Guest, booted: float) -> dict[str, float]:
        """As :meth:`Contest.work` says."""
        found = {BOOT: booted}
        guest.mount_tools(TOOLS_LUN)
        name = guest.disk(0)
        guest.tool("fio --version")
        for title, (options, unit, direction) in JOBS.items():
            guest.run(
                f"chroot /tools fio --name=job --filename=/dev/{name} --direct=1"
                f" --ioengine=libaio --size={SIZE} --runtime={self.seconds} --time_based"
                f" --output-format=terse {options} >/run/result",
                self.seconds + PATIENCE,
            )
            found[title] = float(guest.run(FIELD[direction, unit]))
        return found
