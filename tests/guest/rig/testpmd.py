"""DPDK's testpmd in a guest, commanded as by a person: it takes the adapters away from the kernel.

DPDK reaches the device by ``uio_hv_generic``, which hands rings and buffers to the process, and
rings by the monitor page, as user space can make no hypercall. The kernel's driver and this one are
exchanged by hand, as driverctl does it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence

from tests.guest.rig.guest import TOOLS, Guest, GuestError, quote
from tests.support.patience import PATIENCE

CLASS_NIC = "f8615163-df3e-46c5-913f-f2d2f965ed0e"
KERNEL_DRIVER = "hv_netvsc"
USER_DRIVER = "uio_hv_generic"
HUGE_PAGES = 48
"""Of 2 MiB."""
_DRIVERS = ("librte_bus_vmbus", "librte_mempool_ring", "librte_net_netvsc")
_LIBRARIES = "/mnt/usr/lib/x86_64-linux-gnu"
_IN, _OUT, _NEW, _CODE = (f"/run/testpmd.{name}" for name in ("in", "out", "new", "code"))
_MAC = re.compile(r"^Port \d+: ((?:[0-9A-F]{2}:){5}[0-9A-F]{2})", re.MULTILINE)
_TITLE = re.compile(r"NIC (?:extended )?statistics for port (\d+)")
_NUMBER = re.compile(r"([RT]X-\w+): +(\d+)")
_EXTENDED = re.compile(r"(\w[\w ]*): (\d+)")


def mount_dpdk(guest: Guest, lun: int) -> None:
    """Mount the file system with DPDK where :func:`start` looks for it; the tools are mounted."""
    name = guest.disk(lun)
    guest.run(
        f"mount -t ext4 -o ro /dev/{name} {TOOLS}/mnt &&"
        f" echo {HUGE_PAGES} >/proc/sys/vm/nr_hugepages &&"
        f" [ $(cat /proc/sys/vm/nr_hugepages) = {HUGE_PAGES} ]"
    )


def adapters(guest: Guest) -> list[str]:
    """Return the names of the guest's network adapters on its bus, in the order of DPDK's ports."""
    return guest.run(
        f"cd /sys/bus/vmbus/devices; grep -l {CLASS_NIC} */class_id | cut -d/ -f1 | sort"
    ).split()


def give(guest: Guest, names: Sequence[str], driver: str) -> None:
    """Have another driver take adapters over."""
    script = [f"modprobe {driver}; cd /sys/bus/vmbus/drivers || exit 1"]
    if driver == USER_DRIVER:
        # Those of the class that no driver has are taken at once.
        script.append(f"echo {CLASS_NIC} >{driver}/new_id 2>/dev/null")
    for name in names:
        script.append(
            f"for each in {KERNEL_DRIVER} {USER_DRIVER}; do"
            f" [ $each = {driver} ] || [ ! -e $each/{name} ] ||"
            f" echo {name} >$each/unbind || exit 1; done"
        )
        script.append(f"[ -e {driver}/{name} ] || echo {name} >{driver}/bind || exit 1")
    guest.run("\n".join(script))


class Testpmd:
    """A running testpmd; made by :func:`start`.

    Args:
        guest: Where it runs.

    Attributes:
        macs: The addresses of its ports.
    """

    __test__ = False  # its name looks like a test's to pytest

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._marks = itertools.count(1)
        self._said = 0
        """Bytes of what it has printed that belong to the past."""
        self.macs = [mac.lower() for mac in _MAC.findall(self.command(keep="^Port [0-9]+: "))]

    def command(self, *commands: str, keep: str = ".", seconds: float = PATIENCE) -> str:
        """Give it commands. Returns what it has printed since the last ones.

        Args:
            commands: One line each.
            keep: An extended regular expression of the lines that are wanted. It says much, and the
                guest's serial port is slow.
            seconds: How long it may take.

        Raises:
            GuestError: It has ended, or does not come to an end with them.
        """
        mark = f"# {next(self._marks)} done"
        text = "".join(f"{line}\n" for line in (*commands, mark))
        # It echoes what it reads, and reads one command after the other.
        code, said = self.guest.attempt(
            f"printf %s {quote(text)} 1<>{_IN}\n"
            f"for try in $(seq {int(seconds * 10)}); do"
            f" tail -c +{self._said + 1} {_OUT} | grep -q '{mark}' && break;"
            f" [ ! -e {_CODE} ] || exit 1; usleep 100000; done\n"
            f"tail -c +{self._said + 1} {_OUT} >{_NEW}; stat -c %s {_NEW}\n"
            f"grep -q '{mark}' {_NEW} || exit 1; grep -aE {quote(keep)} {_NEW}; true",
            seconds + PATIENCE,
        )
        if code:
            raise GuestError(f"testpmd does not carry out {commands}\n{self.account()}")
        size, _, said = said.partition("\n")
        self._said += int(size)
        return said

    def statistics(self) -> list[dict[str, int]]:
        """Return the counters of each port, for example ``RX-packets``, and some of its queues."""
        wanted = "statistics for port|[RT]X-|cast_packets|_q[0-9]+_good"
        return parse_statistics(
            self.command("show port stats all", "show port xstats all", keep=wanted)
        )

    def quit(self, seconds: float = PATIENCE) -> None:
        """Have it end in order. Raises GuestError if it fails."""
        code, _ = self.guest.attempt(
            f"echo quit 1<>{_IN}; for try in $(seq {int(seconds * 10)}); do"
            f" [ -e {_CODE} ] && exit $(cat {_CODE}); usleep 100000; done; exit 1",
            seconds + PATIENCE,
        )
        if code:
            raise GuestError(f"testpmd does not end in order\n{self.account()}")

    def account(self) -> str:
        """Return the end of what it has printed."""
        with contextlib.suppress(GuestError):
            return self.guest.attempt(f"tail -c 4000 {_OUT}; cat {_CODE}")[1]
        return ""


def start(guest: Guest, *options: str) -> Testpmd:
    """Start testpmd on all adapters that it may have.

    Args:
        guest: Its adapters have been given to :data:`USER_DRIVER`, DPDK is mounted.
        options: Of testpmd.

    Raises:
        GuestError: It does not come up.
    """
    libraries = guest.run(
        f"cd {TOOLS}{_LIBRARIES}; ls {' '.join(f'{name}.so.??' for name in _DRIVERS)}"
    )
    command = [
        # It is of another release than the tools, and has its own loader and libraries.
        *("chroot", TOOLS, "stdbuf", "-oL", "/mnt/usr/lib64/ld-linux-x86-64.so.2"),
        *("--library-path", _LIBRARIES, "/mnt/usr/bin/dpdk-testpmd"),
        *(word for name in libraries.split() for word in ("-d", f"{_LIBRARIES}/{name}")),
        # A thread for commands and one that forwards, on whatever processors there are.
        *("--in-memory", "--no-pci", "--no-telemetry", "--iova-mode=pa", "--lcores=(0,1)@0"),
        *("--", "-i", "--total-num-mbufs=8192", *options),
    ]
    guest.run(
        f"rm -f {_IN} {_OUT} {_CODE}; mkfifo {_IN}; touch {_OUT};"
        f" ({' '.join(map(quote, command))} <>{_IN} >{_OUT} 2>&1;"
        f" echo $? >{_CODE}) >/dev/null 2>&1 &"
    )
    return Testpmd(guest)


def parse_statistics(text: str) -> list[dict[str, int]]:
    """Return the counters of each port in what ``show port stats`` and ``xstats`` print for all."""
    found: dict[int, dict[str, int]] = {}
    _, *parts = _TITLE.split(text)
    for number, part in zip(parts[::2], parts[1::2], strict=True):
        counters = found.setdefault(int(number), {})
        for line in part.splitlines():
            counters |= {name: int(value) for name, value in _NUMBER.findall(line)}
            extended = _EXTENDED.fullmatch(line)
            if extended is not None:
                counters[extended[1]] = int(extended[2])
    return [found[number] for number in sorted(found)]
