"""A guest on a network of its own, for several tests: booting one costs more than what they do.

It has four processors and an adapter at a TAP interface, with a queue for each processor. The other
end of the TAP is in a namespace of its own, with a server for ``iperf3`` and one that gives streams
back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.guest.conftest import TOOLS_LUN, Lab, Server
from tests.guest.rig.assets import Assets
from tests.guest.rig.guest import Guest, until
from tests.guest.rig.host_tools import serve_iperf
from tests.guest.rig.internet import streams
from tests.guest.rig.namespaces import Namespace, Place
from tests.guest.rig.network_work import bring_up, interface, ping
from tests.guest.rig.packages import run as run_here

CPUS = 4
MAC = "00:15:5d:00:aa:01"
TAP = "lan0"
HOST, HOST6 = "10.77.0.1", "fd77::1"
GUEST, GUEST6 = "10.77.0.2", "fd77::2"
KEY = ":".join(f"{each:02x}" for each in range(1, 41))
MODULES = ("hv_storvsc", "sd_mod", "hv_netvsc")
STEADY = (
    # Four processors of an emulated machine's one: that one stands still for seconds is no
    # complaint.
    "rcupdate.rcu_cpu_stall_timeout=300 watchdog_thresh=60"
)


class NetworkBench(Lab):
    """The guest, and the network that it is on."""

    lan: Namespace
    server: Server
    guest: Guest
    eth: str
    """The interface at the TAP, as the guest calls it."""

    def start(self, lan: Namespace) -> None:
        """Boot it."""
        self.lan = lan
        run_here("modprobe", "-a", "tun", "8021q")
        lan.ip(
            f"tuntap add {TAP} mode tap multi_queue vnet_hdr",
            f"addr add {HOST}/24 dev {TAP}",
            f"link set {TAP} mtu 9000",
            f"link set {TAP} up",
        )
        self.restore_host6()
        self.server = self.serve(
            self.tools,
            "ram:[lun=0]16M",
            options=[f"--net=tap:[queues={CPUS},mac={MAC},name=wan]{TAP}"],
            place=Place(lan.name),
            details=False,
        )
        self.guest = self.boot(self.server, f"--cpus={CPUS}", modules=MODULES, append=STEADY)
        self.guest.mount_tools(TOOLS_LUN)
        # The guest may have frames of 9000 bytes, and nobody sends them to it for now.
        lan.ip(f"link set {TAP} mtu 1500")
        self.configure()

    def configure(self) -> None:
        """Bring the interface up as it is at the start: the driver is new."""
        self.eth = interface(self.guest, MAC)
        # Addresses of IPv6 would go with the link, and be looked for elsewhere for a second.
        self.guest.run(
            f"cd /proc/sys/net/ipv6/conf/{self.eth} && echo 1 >keep_addr_on_down &&"
            " echo 0 >accept_dad"
        )
        bring_up(self.guest, self.eth, f"{GUEST}/24", f"{GUEST6}/64")
        self.wait_channels(CPUS)
        ping(self.guest, HOST)

    def restore_host6(self) -> None:
        """Give the TAP its address of IPv6, which goes when it is down or its MTU below 1280."""
        self.lan.ip(f"addr replace {HOST6}/64 dev {TAP} nodad")

    def wait_channels(self, number: int) -> None:
        """Wait until the driver has opened that many channels of the adapter.

        It does so on its own time, after the interface is there.
        """
        until(lambda: self.adapter()["channels"] == number, what=f"{number} channels")

    def set_channels(self, number: int) -> None:
        """Have the driver open that many channels, and spread flows over them."""
        self.tool(f"ethtool -L {{eth}} combined {number}")
        self.wait_channels(number)
        if number > 1:
            # It has a key of zeros since it had one channel only (netvsc_drv.c,
            # netvsc_devinfo_get): all flows would go where the table begins.
            self.tool(f"ethtool -X {{eth}} hkey {KEY}")

    def adapter(self) -> dict[str, Any]:
        """Return what the server says of the adapter."""
        return self.server.adapters()[0]

    def tool(self, command: str) -> str:
        """Carry out a command of the mounted root file system, with ``{eth}`` in it."""
        return self.guest.tool(command.format(eth=self.eth))


@contextlib.contextmanager
def open_network_bench(assets: Assets, tools: Path) -> Iterator[NetworkBench]:
    """Boot the guest, and switch it off in order at the end.

    Args:
        assets: What it is made of.
        tools: Programs for this side, see :mod:`tests.guest.rig.host_tools`.
    """
    folder = assets.scratch / "network-bench"
    folder.mkdir(parents=True)
    with (
        contextlib.closing(Namespace(f"rig{os.getpid()}-lan")) as lan,
        streams(lan),
        serve_iperf(lan, tools, folder / "iperf3.log"),
    ):
        bench = NetworkBench(assets, folder)
        try:
            bench.start(lan)
            yield bench
            bench.guest.power_off()
        finally:
            bench.close()
            shutil.rmtree(folder, ignore_errors=True)
