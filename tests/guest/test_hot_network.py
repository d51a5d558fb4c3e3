"""Network adapters that come to a running Linux, and go under traffic."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.guest.conftest import Lab, Server
from tests.guest.rig.guest import Guest, until
from tests.support.patience import LONG_TEST
from vmbus.cli.client import send_command

pytestmark = pytest.mark.timeout(LONG_TEST)

FIRST = "00:15:5d:00:bb:01"
FLOOD = """
import contextlib, socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    while True:
        with contextlib.suppress(OSError):
            sock.sendto(bytes(1400), ("10.78.0.2", 9))
        time.sleep(0.002)
"""
"""Sends to the guest, which answers that nobody is there."""
_numbers = itertools.count()


@pytest.fixture
def tap() -> Iterator[str]:
    """A TAP interface of this machine, with an address."""
    name = f"vmhot{next(_numbers)}"
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)
    subprocess.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"], check=True)
    try:
        subprocess.run(["ip", "addr", "add", "10.78.0.1/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def nic(server: Server, action: str, **request: object) -> dict[str, Any]:
    """Carry out what ``vmbus nic`` asks of a server."""
    answer: dict[str, Any] = send_command(
        server.socket, {"backend": "endpoint", "action": f"{action}-device", **request}
    )
    return answer


def interface(guest: Guest, address: str) -> str:
    """Return the guest's name of an interface, as soon as it has it."""
    return guest.run(
        "for try in $(seq 1200); do for each in /sys/class/net/eth*; do"
        f' [ "$(cat $each/address 2>/dev/null)" = {address} ] && basename $each && exit 0;'
        " done; usleep 50000; done; exit 1"
    ).strip()


def wait_gone(guest: Guest, name: str) -> None:
    """Wait until an interface is gone."""
    guest.run(
        "for try in $(seq 1200); do"
        f" [ -e /sys/class/net/{name} ] || exit 0; usleep 50000; done; exit 1"
    )


def sent(server: Server, index: int) -> int:
    """How many frames the guest has sent with an adapter."""
    request = {"backend": "endpoint", "index": index, "action": "stats"}
    return int(send_command(server.socket, request)["transmit"]["frames"])


def wait_sent(server: Server, index: int, count: int) -> None:
    """Wait until the guest has sent so many frames with an adapter."""
    until(lambda: sent(server, index) >= count, what=f"frame {count} of adapter {index}")


def test_an_adapter_comes_and_goes_under_traffic(lab: Lab, tap: str):
    """Five times: what it sends, what it is sent, and the guest's other adapter are under way."""
    server = lab.serve(options=[f"--net=null:[mac={FIRST}]"])
    guest = lab.boot(server, "--cpus=2", modules=("hv_netvsc",))
    first = interface(guest, FIRST)
    guest.run(f"ip link set {first} up; ip addr add 10.79.0.2/24 dev {first}; ip link set lo up")
    # Nobody answers there; what is sent is taken.
    guest.run("arp -s 10.79.0.1 00:15:5d:00:bb:ff; ping -i 0.05 10.79.0.1 >/dev/null 2>&1 &")
    addresses = set()

    for _ in range(5):
        added = nic(server, "add", specs=[f"tap:{tap}"])
        addresses.add(added["mac"])
        name = interface(guest, added["mac"])
        guest.run(f"ip link set {name} up && ip addr add 10.78.0.2/24 dev {name}")
        guest.run("ping -c 2 -W 10 10.78.0.1")
        flood = subprocess.Popen([sys.executable, "-c", FLOOD])
        guest.run("(while ping -c 1 -s 1400 10.78.0.1; do :; done) >/dev/null 2>&1 &")
        try:
            wait_sent(server, added["index"], 50)
            assert nic(server, "remove", index=added["index"]) == {}
        finally:
            flood.kill()
            flood.wait()
        wait_gone(guest, name)

    assert len(addresses) == 1, "it is the same adapter each time"
    wait_sent(server, 0, sent(server, 0) + 1)
    (state,) = server.guests()
    assert (state["faults"], len(state["devices"])) == (0, 2)
    guest.check_log()
    guest.power_off()


def test_several_adapters_come_at_once_and_the_first_one_can_go(lab: Lab):
    server = lab.serve(options=[f"--net=null:[mac={FIRST}]"])
    guest = lab.boot(server, "--cpus=2", modules=("hv_netvsc",))
    first = interface(guest, FIRST)

    added = [nic(server, "add", specs=[f"switch:[addresses=2]lan{at % 2}"]) for at in range(4)]
    names = [interface(guest, each["mac"]) for each in added]
    assert len({first, *names}) == 5
    assert nic(server, "remove", index=0) == {}
    wait_gone(guest, first)
    for each, name in zip(added, names, strict=True):
        guest.run(f"ip link set {name} up")  # and IPv6 says hello
        wait_sent(server, each["index"], 1)
    for each, name in zip(added, names, strict=True):
        nic(server, "remove", index=each["index"])
        wait_gone(guest, name)

    (state,) = server.guests()
    assert state["faults"] == 0
    assert [each["plugin"] for each in state["devices"]] == ["storvsp"]
    guest.check_log()
    guest.power_off()
