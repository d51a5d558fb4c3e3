"""A guest that several tests share, because booting one costs more than what they do in it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Sequence

from tests.guest.conftest import TOOLS_LUN, Lab, Server
from tests.guest.rig.assets import Assets
from tests.guest.rig.guest import TOOLS, Guest, quote

SENSE = (
    r"hv_storvsc \S+ tag#\d+ cmd 0x\w+ status: scsi 0x2 srb 0x84 (?:hv|host) 0x0",
    # before Linux 5.11
    r"\[storvsc\] (?:Sense Key|Add\. Sense) ?: ",
)
"""The driver writes down every command that ends with sense data. With a unit attention, for
example because a disk has come or gone, the kernel just repeats it; if a command has failed for
good, the kernel says so in further lines."""


class Bench(Lab):
    """A guest with its tools, and disks that come and go while it runs."""

    server: Server
    guest: Guest

    def start(self) -> None:
        """Boot the guest."""
        self.server = self.serve(self.tools)
        self.guest = self.boot(self.server)
        self.guest.mount_tools(TOOLS_LUN)
        self._free = itertools.count(1)

    def add(self, scheme: str, target: str, **options: object) -> tuple[int, str]:
        """Plug a disk in. Returns its LUN, and its name as soon as the guest has it."""
        lun = next(self._free)
        words = [f"lun={lun}", *(k if v is True else f"{k}={v}" for k, v in options.items())]
        answer = self.server.disk("add", f"{scheme}:[{','.join(words)}]{target}")
        assert answer == {"address": f"0:0:{lun}"}
        return lun, self.guest.disk(lun)

    def remove(self, lun: int) -> None:
        """Take a disk away, in order: the guest lets go of it first."""
        self.guest.run(f"echo 1 >/sys/bus/scsi/devices/0:0:0:{lun}/delete")
        self.server.disk("remove", str(lun))

    def pull(self, lun: int) -> None:
        """Take a disk away without a word to the guest. Returns when that has seen it."""
        self.server.disk("remove", str(lun))
        wait_in(self.guest, f"[ ! -e /sys/bus/scsi/devices/0:0:0:{lun} ]")

    def check_log(self, allow: Sequence[str] = ()) -> None:
        """Raise GuestError if the kernel complains of something else than a unit attention."""
        self.guest.check_log([*SENSE, *allow])

    def do(self, script: str) -> str:
        """Carry out a script with the programs of the root file system; any failure counts."""
        return do(self.guest, script)


def do(guest: Guest, script: str) -> str:
    """Carry out a script with the programs of the mounted root file system."""
    return guest.run(with_tools(script))


def with_tools(script: str) -> str:
    """Make a script for the guest of one for the mounted root file system."""
    return f"exec chroot {TOOLS} sh -ec {quote(script)}"


def wait_in(guest: Guest, condition: str) -> None:
    """Wait until a shell condition is true in the guest. Raises TimeoutError if it never is."""
    guest.run(f"until {condition}; do usleep 50000; done")


@contextlib.contextmanager
def open_bench(assets: Assets, name: str) -> Iterator[Bench]:
    """Boot a guest for a module's tests, and switch it off in order at the end."""
    folder = assets.scratch / f"bench-{name}"
    folder.mkdir(parents=True)
    bench = Bench(assets, folder)
    try:
        bench.start()
        yield bench
        bench.guest.power_off()
    finally:
        bench.close()
        shutil.rmtree(folder, ignore_errors=True)
