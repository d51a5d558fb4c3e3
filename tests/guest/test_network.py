"""Linux's network driver on our adapter: what it finds, and what its tools say of that."""

from __future__ import annotations

import re

import pytest

from tests.guest.network_bench import (
    CPUS,
    HOST,
    MAC,
    NetworkBench,
)
from tests.guest.rig.guest import until
from tests.guest.rig.network_work import exchange, make_data, ping
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)


@pytest.fixture
def bench(network_bench: NetworkBench) -> NetworkBench:
    network_bench.guest.run("dmesg -c >/dev/null")
    return network_bench


def counters(text: str, pattern: str) -> list[int]:
    """Return the values of what ``ethtool -S`` calls something like that, in order."""
    return [int(number) for number in re.findall(rf"^ *{pattern}: (\d+)$", text, re.MULTILINE)]


def test_the_interface_is_what_operators_have_made_of_it(bench: NetworkBench):
    look = f"cd /sys/class/net/{bench.eth}; cat address ifalias speed mtu operstate"
    assert bench.guest.run(look).split() == [MAC, "wan", "10000", "1500", "up"]
    said = bench.tool("ethtool -i {eth}")
    assert "driver: hv_netvsc" in said
    found = bench.adapter()
    for line in ("Speed: 10000Mb/s", "Duplex: Full", "Link detected: yes"):
        assert line in bench.tool("ethtool {eth}")
    assert (found["nvsp_version"], found["link"], found["refused"]) == ("6.1", "up", 0)
    features = bench.tool("ethtool -k {eth}")
    for feature in ("tx-checksum-ipv4", "tx-checksum-ipv6", "tx-tcp-segmentation",
                    "tx-tcp6-segmentation", "rx-checksumming"):  # fmt: skip
        assert f"{feature}: on" in features, features
    bench.guest.check_log()


def test_the_guest_has_a_channel_for_each_processor_or_as_many_as_it_likes(bench: NetworkBench):
    assert bench.tool("ethtool -l {eth}").count(f"Combined:\t{CPUS}") == 2  # can be, are
    for number in (1, CPUS):
        bench.set_channels(number)
        assert f"Combined:\t{number}" in bench.tool("ethtool -l {eth}")
        ping(bench.guest, HOST)
    bench.guest.check_log()


def test_counters_of_the_guest_are_those_of_the_adapter(bench: NetworkBench):
    ways = {"tx": "transmit", "rx": "receive"}

    def both() -> tuple[list[int], list[int]]:
        found = bench.adapter()
        said = bench.tool("ethtool -S {eth}")
        guest = [
            sum(counters(said, rf"{way}_queue_\d+_{what}"))
            for way in ways
            for what in ("packets", "bytes")
        ]
        ours = [found[way][what] for way in ways.values() for what in ("frames", "bytes")]
        return guest, ours

    # The driver counts what a segment is cut into, and forgets all when its channels change.
    bench.tool("ethtool -K {eth} tso off lro off")
    make_data(bench.guest, 0.5)
    start = both()
    bench.guest.run(exchange(HOST))
    ping(bench.guest, HOST, size=1400)

    def agree() -> bool:
        guest, ours = (
            [new - old for new, old in zip(now, before, strict=True)]
            for now, before in zip(both(), start, strict=True)
        )
        print(guest, ours)
        return guest == ours and min(guest) > 100

    until(agree, what="that the counters agree")  # frames of IPv6 may come and go meanwhile
    said = bench.tool("ethtool -S {eth}")
    for name in ("tx_no_memory", "tx_no_space", "tx_too_big", "tx_busy", "rx_no_memory",
                 "vlan_error", "rx_comp_busy"):  # fmt: skip
        assert counters(said, name) == [0], said
    bench.tool("ethtool -K {eth} tso on lro on")
    bench.guest.check_log()


def test_flows_go_where_the_guests_table_sends_them(bench: NetworkBench):
    table = bench.tool("ethtool -x {eth}")
    rows = re.findall(r"^ *\d+: +([\d ]+)$", table, re.MULTILINE)
    entries = " ".join(rows).split()
    assert len(entries) == 128
    assert set(entries) == {str(queue) for queue in range(CPUS)}
    assert re.search(r"^(?:[0-9a-f]{2}:){39}[0-9a-f]{2}$", table, re.MULTILINE)
    assert "toeplitz: on" in table

    def packets() -> list[int]:
        return counters(bench.tool("ethtool -S {eth}"), r"rx_queue_\d+_packets")

    make_data(bench.guest, 0.25)
    for queue in (2, 1):
        weights = " ".join(str(int(each == queue)) for each in range(CPUS))
        bench.tool(f"ethtool -X {{eth}} weight {weights}")
        before = packets()
        bench.guest.run(exchange(HOST))
        moved = [new - old for old, new in zip(before, packets(), strict=True)]
        # What is no stream, such as a question for an address, comes on the first.
        assert moved[queue] > 20, (queue, moved)
        assert sum(moved[1:]) == moved[queue], (queue, moved)
    bench.tool("ethtool -X {eth} default")
    bench.guest.check_log()
