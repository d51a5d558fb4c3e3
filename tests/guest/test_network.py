"""Linux on the network: hv_netvsc on our adapter."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.guest.conftest import Lab, Server
from tests.guest.rig.guest import Guest, until
from tests.support.patience import LONG_TEST
from vmbus.cli.client import send_command

pytestmark = pytest.mark.timeout(LONG_TEST)

MAC = "00:15:5d:00:aa:01"
MODULES = ("hv_netvsc",)
_numbers = itertools.count()


def boot(lab: Lab, server: Server, *arguments: str, mtu: int = 1500, address: str = "") -> Guest:
    """Boot a guest with an adapter, and bring its interface up as eth0."""
    guest = lab.boot(server, *arguments, modules=MODULES)
    up(guest, mtu=mtu, address=address)
    return guest


def up(guest: Guest, *, mtu: int = 1500, address: str = "") -> None:
    """Bring the guest's interface up."""
    guest.run(
        "for try in $(seq 600); do [ -e /sys/class/net/eth0 ] && break; usleep 50000; done;"
        f" ip link set eth0 mtu {mtu} && ip link set eth0 up && ip link set lo up"
        + (f" && ip addr add {address} dev eth0" if address else "")
    )
    wait_carrier(guest, up=True)


def wait_carrier(guest: Guest, *, up: bool) -> None:
    """Wait until the guest sees its link as it is."""
    guest.run(
        "for try in $(seq 1200); do"
        f" [ $(cat /sys/class/net/eth0/carrier) = {int(up)} ] && exit 0; usleep 50000; done; exit 1"
    )


def nic(server: Server, **request: object) -> dict[str, Any]:
    """Carry out an operator's request."""
    answer: dict[str, Any] = send_command(
        server.socket, {"backend": "endpoint", "index": 0, **request}
    )
    return answer


def adapter(server: Server) -> dict[str, Any]:
    """What the server says of the guest's adapter."""
    (guest,) = server.guests()
    found: list[dict[str, Any]] = [
        each for each in guest["devices"] if each.get("backend") == "endpoint"
    ]
    return found[0]


@pytest.fixture
def tap() -> Iterator[str]:
    """A TAP interface of this machine, with an address."""
    name = f"vmtap{next(_numbers)}"
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)
    subprocess.run(
        ["ip", "tuntap", "add", name, "mode", "tap", "multi_queue", "vnet_hdr"], check=True
    )
    try:
        subprocess.run(["ip", "addr", "add", "10.77.0.1/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def test_the_interface_is_what_it_should_be(lab: Lab):
    server = lab.serve(lab.tools, options=[f"--net=null:[mac={MAC},name=wan]"])
    guest = lab.boot(server, "--cpus=2", modules=("hv_storvsc", "sd_mod", "hv_netvsc"))
    up(guest)

    assert guest.run("cat /sys/class/net/eth0/address").strip() == MAC
    assert guest.run("cat /sys/class/net/eth0/ifalias").strip() == "wan"
    assert guest.run("cat /sys/class/net/eth0/speed").strip() == "10000"
    guest.mount_tools(40)
    assert "driver: hv_netvsc" in guest.tool("ethtool -i eth0")
    assert "Combined:\t2" in guest.tool("ethtool -l eth0")
    features = guest.tool("ethtool -k eth0")
    for feature in ("tx-checksum-ipv4", "tx-checksum-ipv6", "tx-tcp-segmentation",
                    "tx-tcp6-segmentation", "rx-checksumming"):  # fmt: skip
        assert f"{feature}: on" in features, features
    found = adapter(server)
    assert (found["nvsp_version"], found["channels"], found["link"]) == ("6.1", 2, "up")
    assert found["refused"] == 0
    guest.check_log()
    guest.power_off()


def test_the_cable_is_plugged_out_and_in(lab: Lab):
    server = lab.serve(options=[f"--net=null:[mac={MAC}]"])
    guest = boot(lab, server)

    for _ in range(3):
        assert nic(server, action="link", up=False)["link"] == "down"
        wait_carrier(guest, up=False)
        assert nic(server, action="link", up=True)["link"] == "up"
        wait_carrier(guest, up=True)

    guest.check_log()
    guest.power_off()


def test_the_interface_goes_down_and_up_fifty_times(lab: Lab):
    server = lab.serve(options=[f"--net=null:[mac={MAC}]"])
    guest = boot(lab, server)

    guest.run(
        "for round in $(seq 50); do ip link set eth0 down && ip link set eth0 up || exit 1; done"
    )

    wait_carrier(guest, up=True)
    guest.check_log()
    guest.power_off()


def test_the_driver_goes_and_comes_back_twenty_times(lab: Lab):
    server = lab.serve(options=[f"--net=null:[mac={MAC}]"])
    guest = boot(lab, server, "--cpus=2")

    guest.run(
        # Its work on sub-channels, which goes on when the interface is up, holds the module.
        "for round in $(seq 20); do"
        " for try in $(seq 100); do rmmod hv_netvsc 2>/dev/null && break; usleep 100000; done;"
        " [ -e /sys/module/hv_netvsc ] && exit 1; modprobe hv_netvsc || exit 1;"
        " for try in $(seq 600); do [ -e /sys/class/net/eth0 ] && break; usleep 50000; done;"
        " ip link set eth0 up || exit 1; done"
    )

    (state,) = server.guests()
    assert state["faults"] == 0
    guest.run("rmmod hv_netvsc")
    until(lambda: not server.guests()[0]["channels"], what="the end of the channels")
    assert server.guests()[0]["gpadls"] == 0
    guest.check_log()
    guest.power_off()


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_a_guest_is_pinged_and_streams_through_a_tap(lab: Lab, tap: str, mtu: int):
    subprocess.run(["ip", "link", "set", tap, "mtu", str(mtu)], check=True)
    server = lab.serve(options=[f"--net=tap:[mac={MAC},queues=2]{tap}"])
    guest = boot(lab, server, "--cpus=2", mtu=mtu, address="10.77.0.2/24")

    guest.run("ping -c 3 -W 10 10.77.0.1")
    guest.run(f"ping -c 3 -W 10 -s {mtu - 28} 10.77.0.1")
    # A file each way, whose sums the guest's busybox compares.
    digest = stream_to_host(lab, guest)
    assert digest == stream_from_host(lab, guest)

    assert adapter(server)["refused"] == 0
    guest.check_log()
    guest.power_off()


def stream_to_host(lab: Lab, guest: Guest) -> str:
    """Send 16 MiB of the guest's to this machine; return their digest after comparing it."""
    with subprocess.Popen(
        ["python3", "-c", RECEIVE, lab.file("stream")], stdout=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        sent = guest.run(
            "dd if=/dev/urandom of=/run/data bs=64k count=256 2>/dev/null &&"
            " nc -w 60 10.77.0.1 4000 </run/data && sha256sum </run/data"
        ).split()[0]
        assert receiver.stdout.readline().strip() == sent
    return sent


def stream_from_host(lab: Lab, guest: Guest) -> str:
    """Have this machine send back what it got; return its digest in the guest."""
    with subprocess.Popen(
        ["python3", "-c", SEND, lab.file("stream")], stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdout is not None
        assert sender.stdout.readline() == "ready\n"
        return guest.run("nc -w 60 10.77.0.1 4001 </dev/null | sha256sum").split()[0]


RECEIVE = """
import hashlib, socket, sys
with socket.create_server(("10.77.0.1", 4000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    data = b"".join(iter(lambda: connection.recv(65536), b""))
open(sys.argv[1], "wb").write(data)
print(hashlib.sha256(data).hexdigest(), flush=True)
"""
SEND = """
import socket, sys
with socket.create_server(("10.77.0.1", 4001)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    with connection:
        connection.sendall(open(sys.argv[1], "rb").read())
"""
