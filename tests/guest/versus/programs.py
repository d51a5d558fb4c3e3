"""The programs that are compared: started as they are, since the start is part of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.guest.rig.assets import Assets
from tests.guest.rig.processes import Lines

MEMORY = 512
"""MiB of a guest."""


class Program:
    """A program started as it is.

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


class Emulator:
    """QEMU. In the nested rig it is copied to the fast disk first.

    Args:
        assets: The rig's.
        folder: For the copy.
    """

    def __init__(self, assets: Assets, folder: Path) -> None:
        self._assets = assets
        found = re.search(r"^tree='(.*)'$", assets.emulator.read_text(), re.MULTILINE)
        assert found is not None
        source, tree = Path(found[1]), folder / "qemu"
        for name in ("usr/lib/x86_64-linux-gnu", "usr/share/qemu", "usr/share/seabios"):
            shutil.copytree(
                source / name,
                tree / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("perl*", "gconv", "*.a"),
            )
        (tree / "usr/bin").mkdir()
        name = "usr/bin/qemu-system-x86_64"
        shutil.copy2(source / name, tree / name)
        library = tree / "usr/lib/x86_64-linux-gnu"
        self._command = [
            *(str(library / "ld-linux-x86-64.so.2"), "--library-path", str(library)),
            *(str(tree / name), "-L", str(tree / "usr/share/qemu")),
            *("-L", str(tree / "usr/share/seabios")),
        ]

    @property
    def version(self) -> str:
        """What it says it is."""
        done = subprocess.run(
            [*self._command, "--version"], capture_output=True, text=True, check=True
        )
        return done.stdout.partition("\n")[0]

    def starts(self, *devices: str) -> Callable[[Sequence[str], Path], Program]:
        """Return what a :class:`tests.guest.rig.guest.Guest` is started with.

        Args:
            devices: Arguments for its devices.
        """

        def start(arguments: Sequence[str], log: Path) -> Program:
            append = next(each for each in arguments if each.startswith("--append="))
            assets = self._assets
            return Program(
                [
                    *self._command,
                    *("-M", "q35", "-enable-kvm", "-cpu", "host", "-m", f"{MEMORY}M"),
                    *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
                    *("-kernel", str(assets.kernel), "-initrd", str(assets.initramfs)),
                    *("-append", append.partition("=")[2]),
                    *("-device", "virtio-scsi-pci"),
                    *devices,
                ],
                log,
            )

        return start


def drive(name: str, path: Path, lun: int, read_only: str) -> tuple[str, ...]:
    """Return QEMU's arguments for a disk at its virtio-scsi controller."""
    return (
        *("-drive", f"if=none,id={name},format=raw,file={path},readonly={read_only}"),
        *("-device", f"scsi-hd,drive={name},lun={lun}"),
    )


def resident(pid: int) -> float:
    """MiB of a process's own memory; what it shares with the guest is the guest's."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = {name: int(kib) for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return (fields["RssAnon"] + fields["RssFile"]) / 1024


def guest_memory(pid: int) -> float:
    """MiB of the largest anonymous mapping in use: QEMU's guest memory."""
    largest = 0
    for block in Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:"):
        size = re.search(r"^Size:\s+(\d+) kB", block, re.MULTILINE)
        used = re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE)
        if size and used and int(size[1]) == MEMORY << 10:
            largest = int(used[1])
    return largest / 1024
