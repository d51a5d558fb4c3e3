"""Our network adapter beside QEMU's virtio-net, with and without the kernel's vhost.

Each side has the same TAP interface, with segmentation and checksums left to whoever is behind it.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.guest.conftest import TOOLS_LUN, Server
from tests.guest.rig.comparison import Kind
from tests.guest.rig.guest import Guest
from tests.guest.rig.host_tools import open_tools
from tests.guest.rig.network_work import bring_up, interface
from tests.guest.rig.packages import run
from tests.guest.versus.contest import PATIENCE, Contest
from tests.guest.versus.programs import drive, start_boot

OURS, QEMU, VHOST = "vmbus", "QEMU virtio-net", "virtio-net, vhost"
TAP = "versus0"
HOST, GUEST = "10.99.0.1", "10.99.0.2"
MAC = "00:15:5d:00:99:01"
PORT = 5299
PINGS = 300
ROUND_TRIP = "ping, round trip"
TCP = Kind("Mbit/s")
UDP = Kind("packets/s")
LARGE = "TCP, host to guest, in large segments"
"""After ``ethtool -K eth0 lro off`` and ``on``. Linux tells us at first that it wants segments cut,
and believes to have said the opposite (rndis_filter.c: rndis_netdev_set_hwcaps looks at features
that netvsc_probe sets afterwards). virtio-net needs no such thing; it is measured once more."""
JOBS = {
    "TCP, guest to host": ("", TCP),
    "TCP, host to guest": ("-R", TCP),
    LARGE: ("-R", TCP),
    "UDP, frames of 64 bytes, guest to host": ("-u -b 0 -l 18", UDP),
    "UDP, frames of 64 bytes, host to guest": ("-u -b 0 -l 18 -R", UDP),
}
"""Name: iperf3's options, and what is looked at."""
_RATE = re.compile(r"([\d.]+) Kbits/sec\s+receiver")
_PACKETS = re.compile(r"-([\d.]+)\s+sec .* (\d+)/(\d+) \(\S+\)\s+receiver")
_TRIP = re.compile(r"= [\d.]+/([\d.]+)/[\d.]+ ms")


class NetworkContest(Contest):
    """A guest with one processor and one queue."""

    kinds = {ROUND_TRIP: Kind("us", less=True)} | {title: job[1] for title, job in JOBS.items()}
    sides = (OURS, QEMU, VHOST)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        run("modprobe", "-a", "tun", "vhost_net")

    @contextmanager
    def boot(self, side: str) -> Iterator[tuple[Guest, float]]:
        """As :meth:`Contest.boot` says."""
        with open_tools(self.assets.root, self.folder / "tools") as tools, _tap():
            iperf = subprocess.Popen(
                ["chroot", str(tools), "iperf3", "-s", "-p", str(PORT)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            try:
                start = time.monotonic()
                with self._ours() if side == OURS else self._qemu(side) as guest:
                    yield guest, time.monotonic() - start
            finally:
                iperf.kill()
                iperf.wait()

    @contextmanager
    def _ours(self) -> Iterator[Guest]:
        server = Server(
            self.folder, 0,
            [f"--net=tap:[mac={MAC}]{TAP}", f"--disk=raw:[ro,lun={TOOLS_LUN}]{self.assets.root}",
             *self.options],
        )  # fmt: skip
        guest = Guest(
            self.assets, self.folder / "ours.log", [f"--socket={server.socket}"],
            modules=("hv_storvsc", "sd_mod", "hv_netvsc"), start=start_boot,
        )  # fmt: skip
        try:
            guest.wait_ready()
            yield guest
        finally:
            guest.kill()
            server.command.send_signal(signal.SIGTERM)
            server.command.wait(60)

    @contextmanager
    def _qemu(self, side: str) -> Iterator[Guest]:
        vhost = "on" if side == VHOST else "off"
        start = self.emulator.starts(
            *drive("tools", self.assets.root, TOOLS_LUN, "on"),
            "-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}",
            "-device", f"virtio-net-pci,netdev=net,mac={MAC}",
        )  # fmt: skip
        guest = Guest(
            self.assets, self.folder / "qemu.log", [],
            modules=("virtio_pci", "virtio_scsi", "sd_mod", "virtio_net"), start=start,
        )  # fmt: skip
        try:
            guest.wait_ready()
            yield guest
        finally:
            guest.kill()

    def work(self, side: str, guest: Guest, booted: float) -> dict[str, float]:
        """As :meth:`Contest.work` says."""
        guest.mount_tools(TOOLS_LUN)
        name = interface(guest, MAC)
        bring_up(guest, name, f"{GUEST}/24")
        guest.run(f"ping -q -c 3 {HOST}")
        trip = _TRIP.search(guest.run(f"ping -q -A -c {PINGS} {HOST}", PATIENCE))
        assert trip is not None
        found = {ROUND_TRIP: float(trip[1]) * 1000}
        for title, (options, kind) in JOBS.items():
            if title == LARGE and side == OURS:
                guest.tool(f"ethtool -K {name} lro off")
                guest.tool(f"ethtool -K {name} lro on")
            text = guest.run(
                f"TMPDIR=/run chroot /tools iperf3 -c {HOST} -p {PORT} -t {self.seconds} -f k"
                f" {options} | grep receiver",
                self.seconds + PATIENCE,
            )
            found[title] = _rate(text) if kind is TCP else _packets(text)
        return found


def _rate(text: str) -> float:
    found = _RATE.search(text)
    assert found is not None, text
    return float(found[1]) / 1000


def _packets(text: str) -> float:
    found = _PACKETS.search(text)
    assert found is not None, text
    seconds, lost, total = map(float, found.groups())
    return (total - lost) / seconds


@contextmanager
def _tap() -> Iterator[None]:
    run("ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
    try:
        run("ip", "addr", "add", f"{HOST}/24", "dev", TAP)
        run("ip", "link", "set", TAP, "up")
        yield
    finally:
        run("ip", "link", "del", TAP)
