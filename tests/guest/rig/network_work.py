"""What guests do on the network."""

from __future__ import annotations

import re

from tests.guest.rig.guest import Guest
from tests.guest.rig.internet import IPERF_PORT, STREAM_PORT

_LEASE = """
#!/bin/sh
# Called by udhcpc, with what it has been given.
case $1 in bound | renew)
    ip addr flush dev $interface
    ip addr add $ip/$mask dev $interface
    [ -z "$router" ] || ip route replace default via $router dev $interface
    mkdir -p /etc
    for each in $dns; do echo nameserver $each; done >/etc/resolv.conf
esac
"""
IPERF_SECONDS = 2
IPERF_LEAST = 1 << 10
"""Bytes that must have arrived: that it works is shown, and not how fast."""
_RECEIVED = re.compile(r"([\d.]+) ([KMG]?)Bytes .*receiver")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def interface(guest: Guest, mac: str) -> str:
    """Return the name of the interface with an address, as soon as there is one."""
    return guest.run(
        "for try in $(seq 2400); do for each in /sys/class/net/*; do"
        f' [ "$(cat $each/address)" = {mac} ] && basename $each && exit; done; usleep 50000;'
        " done; exit 1"
    ).strip()


def bring_up(guest: Guest, name: str, *addresses: str, mtu: int = 1500) -> None:
    """Bring an interface up, with addresses. Returns when its link is up."""
    guest.run(
        f"ip link set lo up; ip link set {name} mtu {mtu} && ip link set {name} up || exit 1;"
        f" for each in {' '.join(addresses)}; do ip addr add $each dev {name} || exit 1; done"
    )
    wait_carrier(guest, name, up=True)


def wait_carrier(guest: Guest, name: str, *, up: bool) -> None:
    """Wait until the guest sees its link as it is."""
    guest.run(
        "for try in $(seq 2400); do"
        f" [ $(cat /sys/class/net/{name}/carrier) = {int(up)} ] && exit 0; usleep 50000; done;"
        " exit 1"
    )


def get_address(guest: Guest, name: str) -> str:
    """Have it get an address, a route and name servers by DHCP. Returns the address."""
    guest.run(
        f"ip link set lo up; ip link set {name} up; cat >/run/lease <<'END'{_LEASE}END\n"
        f"chmod +x /run/lease; udhcpc -i {name} -s /run/lease -n -q -t 20 -T 3"
    )
    return guest.run(f"ip -4 -o addr show dev {name}").split()[3].partition("/")[0]


def ping(guest: Guest, address: str, *, count: int = 3, size: int = 56) -> None:
    """Have it ping somebody, who must answer every time."""
    # The first may wait for an address to be found out.
    guest.run(
        f"for try in $(seq {count}); do ping -q -c 1 -W 20 -s {size} {address} || exit 1; done"
    )


def make_data(guest: Guest, megabytes: float) -> None:
    """Make what :func:`exchange` sends."""
    guest.run(f"dd if=/dev/urandom of=/run/data bs=64k count={int(megabytes * 16)} 2>/dev/null")


def exchange(address: str, port: int = STREAM_PORT) -> str:
    """Return a command that sends a stream to who gives it back, and compares."""
    return f"nc -w 120 {address} {port} </run/data | cmp - /run/data"


def begin_exchange(guest: Guest, address: str) -> None:
    """Have it do that beside what else it does. Returns when the stream has begun."""
    # The other side forgets who is about to connect when its link goes down.
    guest.run(
        f"rm -f /run/exchanged; ({exchange(address)}; echo $? >/run/exchanging;"
        " mv /run/exchanging /run/exchanged) >/run/exchange.log 2>&1 &"
        f" until grep -q ':{STREAM_PORT:04X} 01' /proc/net/tcp || [ -e /run/exchanged ];"
        " do usleep 10000; done"
    )


def end_exchange(guest: Guest) -> None:
    """Wait for its end; all must have come back."""
    guest.run(
        "until [ -e /run/exchanged ]; do usleep 50000; done; cat /run/exchange.log;"
        " exit $(cat /run/exchanged)"
    )


def iperf(guest: Guest, address: str, *options: str) -> None:
    """Have ``iperf3`` send to a server for a while, or with ``-R`` fetch from it.

    Raises:
        GuestError: It failed.
        AssertionError: Nothing has arrived to speak of.
    """
    out = guest.tool(
        f"env TMPDIR=/run iperf3 -c {address} -p {IPERF_PORT} -f k -t {IPERF_SECONDS}"
        f" {' '.join(options)} >/run/iperf3 2>&1; code=$?; grep -E 'receiver|error' /run/iperf3;"
        " exit $code"
    )
    assert received(out) >= IPERF_LEAST, out


def received(text: str) -> float:
    """Return how many bytes have arrived, as ``iperf3`` says it; of several streams, in all."""
    found = _RECEIVED.findall(text)
    assert found, text
    count, unit = found[-1]
    return float(count) * _UNITS[unit]
