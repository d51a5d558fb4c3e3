"""A guest: a real Linux kernel under ``vmbus boot``, commanded over its serial port."""

from __future__ import annotations

import base64
import itertools
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tests.guest.rig.assets import Assets
from tests.guest.rig.complaints import coarse_filter, complaints
from tests.guest.rig.processes import Command, Lines
from tests.support.patience import LOOK, PATIENCE

TOOLS = "/tools"
"""Where the root file system is mounted by :meth:`Guest.mount_tools`."""

_READY = re.compile(rb"@ready ([^\r\n]+)\r?\n")


class GuestError(AssertionError):
    """A command in the guest failed, or the guest did."""


class Vmm(Protocol):
    """A VMM as a process; see :class:`~tests.guest.rig.processes.Command`."""

    output: Lines | None

    @property
    def pid(self) -> int:
        """The process."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""

    def write(self, data: bytes) -> None:
        """Write to the guest's serial port. Raises BrokenPipeError if it has ended."""

    def log(self) -> str:
        """Return what it has written to standard error."""

    def wait(self, seconds: float) -> int:
        """Return the exit code. Raises TimeoutError."""

    def kill(self) -> None:
        """End it, whatever it does. Idempotent."""


def start_vmm(arguments: Sequence[str], log: Path) -> Vmm:
    """Start ``vmbus ARGUMENTS`` with its console for us."""
    return Command(arguments, log, console=True)


class Guest:
    """A running guest. Use :class:`tests.guest.conftest.Lab` to get one.

    Args:
        assets: What it is made of.
        log: The VMM's standard error.
        arguments: More for ``vmbus boot``.
        append: More for the kernel's command line.
        modules: What it loads at the start.
        root: Label of the file system to boot from; the initramfs otherwise.
        memory: Its size, for ``vmbus boot``.
        start: Starts the VMM, given its arguments and where it logs to.
    """

    def __init__(
        self,
        assets: Assets,
        log: Path,
        arguments: Sequence[str],
        *,
        append: str = "",
        modules: Sequence[str] = ("hv_storvsc", "sd_mod"),
        root: str | None = None,
        memory: str = "512M",
        start: Callable[[Sequence[str], Path], Vmm] | None = None,
    ) -> None:
        words = ["console=ttyS0", "quiet", "loglevel=1", "random.trust_cpu=on", "panic=-1",
                 "mitigations=off", f"rig.modules={','.join(modules)}"]  # fmt: skip
        if root is not None:
            words.append(f"rig.root={root}")
        if append:
            words.append(append)
        self.assets = assets
        self._numbers = itertools.count(1)
        self._seen = 0
        """Bytes of the console that belong to the past."""
        self.vmm = (start or start_vmm)(
            ["boot", f"--kernel={assets.kernel}", f"--initrd={assets.initramfs}",
             f"--append={' '.join(words)}", f"--memory={memory}", *arguments],
            log,
        )  # fmt: skip
        self.modules = tuple(modules)

    # ---------------------------------------------------------------------------------- commands

    def wait_ready(self, seconds: float = PATIENCE) -> str:
        """Wait until it has booted and takes commands. Returns its kernel's release."""
        assert self.vmm.output is not None
        seen = self._seen

        def find(data: bytearray) -> tuple[str, int] | None:
            match = _READY.search(data, seen)
            return (match[1].decode(), match.end()) if match else None

        try:
            release, self._seen = self.vmm.output.wait_for(find, seconds)
        except (TimeoutError, EOFError) as error:
            raise GuestError(f"the guest does not come up: {error}\n{self.account()}") from error
        return release

    def begin(self, script: str) -> int:
        """Give it a script for ``sh``; it does one after the other. Returns a number for it."""
        number = next(self._numbers)
        line = b"%d %s\n" % (number, base64.b64encode(script.encode()))
        try:
            self.vmm.write(line)
        except BrokenPipeError as error:
            raise GuestError(f"the guest is gone\n{self.account()}") from error
        return number

    def finish(self, number: int, seconds: float = PATIENCE) -> tuple[int, str]:
        """Return exit code and output of a script."""
        assert self.vmm.output is not None
        seen = self._seen
        header = re.compile(rb"@%d (\d+) (\d+)\r?\n" % number)

        def find(data: bytearray) -> tuple[int, str, int] | None:
            match = header.search(data, seen)
            if match is None or len(data) < match.end() + int(match[2]):
                return None
            end = match.end() + int(match[2])
            return int(match[1]), bytes(data[match.end() : end]).decode(errors="replace"), end

        try:
            code, text, self._seen = self.vmm.output.wait_for(find, seconds)
        except (TimeoutError, EOFError) as error:
            raise GuestError(f"no answer from the guest: {error}\n{self.account()}") from error
        return code, text

    def attempt(self, script: str, seconds: float = PATIENCE) -> tuple[int, str]:
        """Carry out a script; return its exit code and output."""
        return self.finish(self.begin(script), seconds)

    def run(self, script: str, seconds: float = PATIENCE) -> str:
        """Carry out a script that must succeed; return its output."""
        code, text = self.attempt(script, seconds)
        if code:
            raise GuestError(f"{script!r} in the guest: exit code {code}\n{text}")
        return text

    def tool(self, command: str, seconds: float = PATIENCE) -> str:
        """Carry out a command of the mounted root file system that must succeed."""
        return self.run(f"chroot {TOOLS} {command}", seconds)

    # ------------------------------------------------------------------------------------- disks

    def disk(self, lun: int, *, controller: int = 0, seconds: float = 60.0) -> str:
        """Return the name of a disk, for example ``sda``, as soon as the guest has it."""
        number = f"{controller}:0:0:{lun}"
        script = (
            f"for try in $(seq {int(seconds * 20)}); do"
            f' name=$(ls /sys/bus/scsi/devices/{number}/block 2>/dev/null) && [ -n "$name" ]'
            f" && [ -b /dev/$name ] && echo $name && exit 0; usleep 50000; done; exit 1"
        )
        code, text = self.attempt(script, seconds * 4 + 60)
        if code:
            raise GuestError(f"the guest has no disk {number}\n{self.account()}")
        return text.strip()

    def mount_tools(self, lun: int) -> None:
        """Mount the root file system at :data:`TOOLS`, with devices in it."""
        name = self.disk(lun)
        self.run(
            f"modprobe sg; mount -t ext4 -o ro /dev/{name} {TOOLS} &&"
            f" for each in dev proc sys run; do mount --bind /$each {TOOLS}/$each; done"
        )

    # ------------------------------------------------------------------------------- the log, ends

    def dmesg(self) -> str:
        """Return the kernel's log."""
        return self.run("dmesg")

    def check_log(self, allow: Sequence[str] = ()) -> None:
        """Raise GuestError if the kernel complains of something.

        Args:
            allow: Regular expressions of lines that this test asks for.
        """
        log = self.run(f"dmesg | grep -iE {shlex.quote(coarse_filter())}; true")
        found = complaints(log, allow)
        if found:
            raise GuestError("the guest's kernel complains:\n" + "\n".join(found))

    def power_off(self, seconds: float = PATIENCE) -> None:
        """Have it switch itself off and the VMM end with exit code 0."""
        self.begin("poweroff -f")
        code = self.wait(seconds)
        if code:
            raise GuestError(f"vmbus boot ended with {code}\n{self.account()}")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Return the exit code of ``vmbus boot``."""
        try:
            return self.vmm.wait(seconds)
        except TimeoutError as error:
            raise GuestError(f"{error}\n{self.account()}") from error

    def console(self) -> str:
        """Return all that it wrote to the serial port."""
        assert self.vmm.output is not None
        return self.vmm.output.data.decode(errors="replace")

    def account(self) -> str:
        """Return what is known of it, for a test that failed."""
        return (
            f"--- the guest's console, its end\n{self.console()[-6000:]}\n"
            f"--- vmbus boot\n{self.vmm.log()[-3000:]}"
        )

    def kill(self) -> None:
        """End the VMM, whatever it does."""
        self.vmm.kill()


def quote(text: str) -> str:
    """Quote for the guest's shell."""
    return shlex.quote(text)


def until(condition: object, seconds: float = PATIENCE, what: str = "it") -> None:
    """Wait until ``condition()`` is true. Raises TimeoutError."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} does not happen within {seconds:g} s")
        time.sleep(LOOK)
