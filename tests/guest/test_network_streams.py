"""Linux sends and receives: in whatever pieces, on whatever channels, the bytes are the same."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import TOOLS_LUN, Lab, Server
from tests.guest.network_bench import CPUS, HOST, HOST6, TAP, NetworkBench
from tests.guest.rig.guest import Guest, until
from tests.guest.rig.internet import IPERF_PORT, STREAM_PORT
from tests.guest.rig.network_work import bring_up, exchange, interface, iperf, make_data, ping
from tests.support.patience import LONG_TEST, PATIENCE

pytestmark = pytest.mark.timeout(LONG_TEST)

HEADERS = 28
"""Bytes of IPv4 and ICMP."""


@pytest.fixture
def bench(network_bench: NetworkBench) -> NetworkBench:
    network_bench.guest.run("dmesg -c >/dev/null")
    return network_bench


def moved(bench: NetworkBench, way: str, before: list[int]) -> list[int]:
    """Return how many packets each queue has had since, as the guest counts them."""
    return [new - old for old, new in zip(before, packets(bench, way), strict=True)]


def packets(bench: NetworkBench, way: str) -> list[int]:
    """Return how many packets each queue has had, one way: ``tx`` or ``rx``."""
    said = bench.tool("ethtool -S {eth}")
    return [int(count) for count in re.findall(rf"{way}_queue_\d+_packets: (\d+)", said)]


@pytest.mark.parametrize("channels", [1, CPUS])
def test_iperf_both_ways_on_channels(bench: NetworkBench, channels: int):
    bench.set_channels(channels)
    for way in ("tx", "rx"):
        before = packets(bench, way)
        iperf(bench.guest, HOST, "-P", "4", *(("-R",) if way == "rx" else ()))
        each = moved(bench, way, before)
        assert len(each) == channels
        assert sum(count > 0 for count in each) > (channels > 1), each
    # As other tests want it, of which the next one may be run by another machine.
    bench.set_channels(CPUS)
    assert bench.adapter()["refused"] == 0
    bench.guest.check_log()


@pytest.mark.parametrize(
    "features",
    ["tx on rx on tso on", "tso off", "tx off rx off tso off gro off sg off"],
    ids=["all", "no segments", "none"],
)
def test_offloads_carry_the_same_stream(bench: NetworkBench, features: str):
    make_data(bench.guest, 0.5)
    bench.tool(f"ethtool -K {{eth}} {features}")
    before = bench.adapter()["transmit"]

    for address in (HOST, HOST6):
        bench.guest.run(exchange(address))

    sent = bench.adapter()["transmit"]
    used = {what: sent[what] > before[what] for what in ("segments", "checksums")}
    assert used == {"segments": "tso on" in features, "checksums": "tx off" not in features}
    bench.tool("ethtool -K {eth} tx on rx on tso on gro on sg on")
    bench.guest.check_log()


def test_long_frames_go_whole(bench: NetworkBench):
    make_data(bench.guest, 1)
    for mtu in (9000, 576, 1500):
        bench.guest.run(f"ip link set {bench.eth} mtu {mtu}")
        bench.lan.ip(f"link set {TAP} mtu {mtu}")
        assert bench.adapter()["mtu"] >= mtu
        ping(bench.guest, HOST, size=mtu - HEADERS)
        ping(bench.guest, HOST, size=3 * mtu)  # in fragments
        bench.guest.run(exchange(HOST))
    bench.restore_host6()
    # The network carries no more, whatever somebody wishes.
    look = f"ip link set {bench.eth} mtu 9001; cat /sys/class/net/{bench.eth}/mtu"
    assert bench.guest.run(look).strip() == "9000"
    bench.guest.run(f"ip link set {bench.eth} mtu 1500")
    bench.wait_channels(CPUS)
    bench.guest.check_log()


def test_tagged_frames_are_in_their_vlan(bench: NetworkBench):
    vlan, address, other = f"{TAP}.5", "10.78.0.1", "10.78.0.2"
    bench.lan.ip(
        f"link add link {TAP} name {vlan} type vlan id 5",
        f"addr add {address}/24 dev {vlan}",
        f"link set {vlan} up",
    )
    bench.guest.run(
        f"modprobe 8021q; ip link add link {bench.eth} name vlan5 type vlan id 5 &&"
        f" ip addr add {other}/24 dev vlan5 && ip link set vlan5 up"
    )
    make_data(bench.guest, 1)

    ping(bench.guest, address, size=1500 - HEADERS)
    bench.guest.run(exchange(address))
    # Another tag is another network.
    bench.guest.run(
        f"ip link del vlan5; ip link add link {bench.eth} name vlan6 type vlan id 6 &&"
        f" ip addr add {other}/24 dev vlan6 && ip link set vlan6 up"
    )
    assert bench.guest.attempt(f"ping -c 1 -W 1 {address}")[0]

    bench.guest.run("ip link del vlan6")
    bench.lan.ip(f"link del {vlan}")
    ping(bench.guest, HOST)
    bench.guest.check_log()


CAPTURE = "udp or icmp or arp"
SHOW = ("-nn", "-t", "-e")
"""Everything but the time."""
LAST = 77
"""Bytes of the last ping, and of no other."""


def test_tcpdump_sees_the_same_inside_and_outside(
    bench: NetworkBench, host_tools: Path, tmp_path: Path
):
    # Inside, what is left to the adapter would not have been done yet.
    bench.tool("ethtool -K {eth} tx off")
    chroot = ["chroot", str(host_tools), "tcpdump"]
    capture = tmp_path / "outside.pcap"
    with open(capture, "wb") as file:
        outside = subprocess.Popen(
            ["ip", "netns", "exec", bench.lan.name, *chroot, "-Z", "root", "-U", "-i", TAP,
             "-w", "-", CAPTURE],
            stdout=file, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert outside.stderr is not None
    assert b"listening on" in outside.stderr.readline()
    bench.guest.run(
        f"chroot /tools tcpdump -Z root -U -i {bench.eth} -w /run/inside.pcap '{CAPTURE}'"
        " >/dev/null 2>/run/tcpdump & echo $! >/run/pid;"
        " until grep -q 'listening on' /run/tcpdump; do usleep 50000; done"
    )

    def both(*options: str) -> tuple[list[str], list[str]]:
        with open(capture, "rb") as file:
            shown = subprocess.run(
                [*chroot, *options, "-r", "-"], stdin=file, capture_output=True, check=False
            ).stdout
        there = " ".join(["tcpdump", *options, "-r", "/run/inside.pcap"])
        if "-xx" not in options:
            lines = bench.guest.tool(f"{there} 2>/dev/null; true").splitlines()
            return lines, shown.decode().splitlines()
        digest = bench.guest.run(f"chroot /tools {there} 2>/dev/null | sha256sum").split()[0]
        return [digest], [hashlib.sha256(shown).hexdigest()]

    try:
        for size in (0, 1, 56, 1472):
            ping(bench.guest, HOST, count=2, size=size)
        bench.guest.run(
            f"traceroute -q 3 -m 1 -w 5 {HOST} >/dev/null && ip neigh flush dev {bench.eth}"
        )
        ping(bench.guest, HOST, count=1, size=LAST)
        # Each writes its file in its own time.
        until(
            lambda: all(
                sum(f"length {LAST + 8}" in line for line in side) == 2 for side in both(*SHOW)
            ),
            what="the last frame in both files",
        )
    finally:
        outside.terminate()
        outside.wait(PATIENCE)
        outside.stderr.close()
    bench.guest.run(
        "kill $(cat /run/pid); while kill -0 $(cat /run/pid) 2>/dev/null; do usleep 50000; done"
    )
    bench.tool("ethtool -K {eth} tx on tso on")
    inside, shown = both(*SHOW)
    assert inside == shown
    assert sum("ICMP echo reply" in line for line in inside) == 9, inside
    assert any("UDP" in line for line in inside), inside
    # And every byte; the serial port would take long for that.
    inside, shown = both(*SHOW, "-xx")
    assert inside == shown
    bench.guest.check_log()


# -------------------------------------------------------------------------------- guest to guest


def meet(lab: Lab, server: Server, name: str) -> Guest:
    """Boot a guest of that name, with tools."""
    guest = lab.boot(
        server, f"--name={name}", modules=("hv_storvsc", "sd_mod", "hv_netvsc"), memory="384M"
    )
    guest.mount_tools(TOOLS_LUN)
    return guest


def test_two_guests_meet_at_a_switch(lab: Lab):
    server = lab.serve(
        lab.tools, options=["--net=switch:[trunk=all]lan", "--net=switch:[vlan=5]lan"]
    )
    one, two = (meet(lab, server, name) for name in ("one", "two"))
    trunk, other_trunk = (
        interface(guest, server.adapters(number)[0]["mac"])
        for number, guest in enumerate((one, two))
    )
    access = interface(two, server.adapters(1)[1]["mac"])

    # Both without a tag.
    bring_up(one, trunk, "10.1.0.1/24")
    bring_up(two, other_trunk, "10.1.0.2/24")
    ping(one, "10.1.0.2")
    two.run("chroot /tools env TMPDIR=/run iperf3 -s -D -p " + str(IPERF_PORT))
    for way in ("", "-R"):
        iperf(one, "10.1.0.2", way)
    # One with a tag, the other in that VLAN and without.
    one.run(
        f"modprobe 8021q; ip link add link {trunk} name vlan5 type vlan id 5 &&"
        " ip addr add 10.5.0.1/24 dev vlan5 && ip link set vlan5 up"
    )
    bring_up(two, access, "10.5.0.2/24")
    ping(one, "10.5.0.2", size=1500 - HEADERS)
    make_data(one, 1)
    number = two.begin(f"nc -l -p {STREAM_PORT} -e cat")
    one.run(f"until {exchange('10.5.0.2')}; do usleep 100000; done")
    assert two.finish(number)[0] == 0

    for number in range(2):
        assert all(each["refused"] == 0 for each in server.adapters(number))
    for guest in (one, two):
        guest.check_log()
        guest.power_off()
