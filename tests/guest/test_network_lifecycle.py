"""Links, interfaces, drivers and channels come and go under traffic, and Linux goes on."""

from __future__ import annotations

import os

import pytest

from tests.guest.network_bench import CPUS, HOST, MAC, MODULES, TAP, NetworkBench
from tests.guest.rig.guest import until
from tests.guest.rig.network_work import (
    begin_exchange,
    end_exchange,
    exchange,
    iperf,
    make_data,
    ping,
    wait_carrier,
)
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)

ROUNDS = 20
LONG = os.environ.get("VMBUS_LONG") == "1"
BUSY = 3600 if LONG else 30
"""Seconds for which disk and network have work at the same time; each does it all, however long
that takes."""


@pytest.fixture
def bench(network_bench: NetworkBench) -> NetworkBench:
    network_bench.guest.run("dmesg -c >/dev/null")
    return network_bench


def sent(bench: NetworkBench) -> int:
    """Return how many frames the guest has sent."""
    frames: int = bench.adapter()["transmit"]["frames"]
    return frames


def test_the_cable_is_plugged_out_and_in_under_a_stream(bench: NetworkBench):
    make_data(bench.guest, 2)
    begin_exchange(bench.guest, HOST)

    for _ in range(3):
        assert bench.server.nic(action="link", up=False)["link"] == "down"
        wait_carrier(bench.guest, bench.eth, up=False)
        assert bench.server.nic(action="link", up=True)["link"] == "up"
        wait_carrier(bench.guest, bench.eth, up=True)
    # The same for the interface of the host.
    for state in ("down", "up"):
        bench.lan.ip(f"link set {TAP} {state}")
        wait_carrier(bench.guest, bench.eth, up=state == "up")
    bench.restore_host6()

    end_exchange(bench.guest)
    bench.guest.check_log()


def test_the_interface_goes_down_and_up_fifty_times_under_a_stream(bench: NetworkBench):
    make_data(bench.guest, 1)
    begin_exchange(bench.guest, HOST)

    bench.guest.run(
        f"for round in $(seq 50); do ip link set {bench.eth} down &&"
        f" ip link set {bench.eth} up || exit 1; done"
    )

    wait_carrier(bench.guest, bench.eth, up=True)
    end_exchange(bench.guest)
    bench.guest.check_log()


def test_the_mtu_and_the_channels_change_under_a_stream(bench: NetworkBench):
    make_data(bench.guest, 1)
    begin_exchange(bench.guest, HOST)

    for mtu, channels in ((9000, 2), (1400, 1), (4000, 3), (1500, CPUS)):
        before = sent(bench)
        bench.guest.run(f"ip link set {bench.eth} mtu {mtu}")
        bench.set_channels(channels)
        ping(bench.guest, HOST, count=1)
        assert sent(bench) > before

    end_exchange(bench.guest)
    assert bench.adapter()["mtu"] == 1500
    bench.guest.check_log()


@pytest.mark.parametrize(
    ("away", "back"),
    [
        pytest.param(
            # Its work on sub-channels, which goes on when the interface is up, holds the module.
            "for try in $(seq 200); do rmmod hv_netvsc 2>/dev/null && break; usleep 50000; done;"
            " [ ! -e /sys/module/hv_netvsc ]",
            "modprobe hv_netvsc",
            id="module",
        ),
        pytest.param(
            "echo $device >/sys/bus/vmbus/drivers/hv_netvsc/unbind",
            "echo $device >/sys/bus/vmbus/drivers/hv_netvsc/bind",
            id="binding",
        ),
    ],
)
def test_the_driver_goes_and_comes_back_twenty_times(bench: NetworkBench, away: str, back: str):
    bench.guest.run(
        f"device=$(basename $(readlink -f /sys/class/net/{bench.eth}/device))\n"
        f"for round in $(seq {ROUNDS}); do\n"
        f"    {away} || exit 1\n"
        f"    {back} || exit 1\n"
        "    name=\n"
        '    until [ -n "$name" ]; do for each in /sys/class/net/*; do\n'
        f'        [ "$(cat $each/address)" = {MAC} ] && name=$(basename $each); done; done\n'
        "    ip link set $name up || exit 1\n"
        "done"
    )

    bench.configure()
    make_data(bench.guest, 0.25)
    bench.guest.run(exchange(HOST))
    (state,) = bench.server.guests()
    assert state["faults"] == 0
    # Each channel has a ring, and the adapter two buffers.
    assert state["gpadls"] == len(state["channels"]) + 2
    bench.guest.check_log()


def test_without_its_driver_nothing_is_left_of_an_adapter(bench: NetworkBench):
    channels = len(bench.server.guests()[0]["channels"])

    bench.guest.run("rmmod hv_netvsc")

    until(
        lambda: len(bench.server.guests()[0]["channels"]) == channels - CPUS,
        what="the end of the channels",
    )
    (state,) = bench.server.guests()
    assert state["gpadls"] == len(state["channels"]), "those of the disk"
    bench.guest.run(f"modprobe {MODULES[-1]}")
    bench.configure()
    bench.guest.check_log()


def test_disk_and_network_are_busy_together(bench: NetworkBench):
    name = bench.guest.disk(0)
    fio = bench.guest.begin(
        "exec chroot /tools fio --name=job --ioengine=libaio --iodepth=16 --rw=randrw --bs=16k"
        f" --filename=/dev/{name} --direct=1 --verify=crc32c --verify_fatal=1 --size=8M"
        f" --verify_state_save=0 --time_based --runtime={BUSY} --minimal >/run/fio 2>&1 &"
        " echo $! >/run/fio.pid"
    )
    assert bench.guest.finish(fio)[0] == 0
    make_data(bench.guest, 0.5)
    rounds = 0
    while bench.guest.attempt("kill -0 $(cat /run/fio.pid)")[0] == 0:
        bench.guest.run(exchange(HOST))
        for way in ("", "-R"):
            iperf(bench.guest, HOST, way)
        rounds += 1

    code, text = bench.guest.attempt("cut -d';' -f5 /run/fio; cut -c1-200 /run/fio")
    assert not code, text
    assert text.splitlines()[0] == "0", text  # fio's error
    assert rounds, "both were at work"
    bench.guest.check_log()
