"""DPDK's driver in user space: another peer of our adapter than the kernel's, written by others."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from netvsp.frames.frame import PROTOCOL_UDP
from netvsp.frames.internet import Udp, build_ipv4, build_udp
from netvsp.rss import Toeplitz
from netvsp.wire.ndis import RSS_TABLE_ENTRIES
from tests.guest.conftest import TOOLS_LUN, Lab, Server
from tests.guest.rig.guest import until
from tests.guest.rig.testpmd import (
    KERNEL_DRIVER,
    USER_DRIVER,
    Testpmd,
    adapters,
    give,
    mount_dpdk,
    start,
)
from tests.guest.rig.wire import Wire, open_wire
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)

DPDK_LUN = 41
MACS = ("00:15:5d:00:cc:01", "00:15:5d:00:cc:02")
PEER = bytes.fromhex("02000000aa01")
TAGGED = b"\x81\x00" + struct.pack(">H", 3 << 13 | 77)
PAYLOADS = (0, 18, 100, 214, 470, 900, 1472)
"""Bytes of UDP: frames that are copied into the send buffer, several at a time, and those that are
not; from the shortest to the longest."""
FRAMES = 84
TAGS = len(range(0, FRAMES, 5))
"""Frames of those that are tagged."""
WAYS = ("transmit", "receive")
KEY = bytes.fromhex(
    "2cc681d15bdbf4f7fca28319db1a3e946b9e38d92c9c03d1ad9944a7d9563d59063c25f3fc1fdc2a"
)
"""With which DPDK has flows spread (hn_ethdev.c: rss_default_key)."""


@pytest.fixture
def wires() -> Iterator[tuple[Wire, Wire]]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(open_wire()), stack.enter_context(open_wire())


def flow(number: int) -> bytes:
    """Return the addresses of a flow, as the hash takes them."""
    return bytes((10, 1, number // 8, number)) + bytes((10, 2, 3, 7 * number % 251))


def frames_to(mac: str) -> list[bytes]:
    """Return frames of many flows to a port: some tagged, one to everybody, one to a group."""
    found = []
    for number in range(FRAMES):
        source, target = flow(number)[:4], flow(number)[4:]
        data = bytes(number + place & 0xFF for place in range(PAYLOADS[number % len(PAYLOADS)]))
        udp = build_udp(source, target, Udp(1000 + number, 9, data))
        to = bytes.fromhex(mac.replace(":", ""))
        to = {3: b"\xff" * 6, 4: bytes.fromhex("01005e000001")}.get(number, to)
        frame = build_ipv4(PEER, to, source, target, protocol=PROTOCOL_UDP, payload=udp)
        if number % 5 == 0:
            frame = frame[:12] + TAGGED + frame[12:]
        found.append(frame)
    return found


def counted(server: Server, mac: str) -> dict[str, Counter[str]]:
    """Return what we have counted at an adapter in both directions."""
    (found,) = [each for each in server.adapters() if each["mac"] == mac]
    assert found["refused"] == 0, found
    assert found["failure"] == "", found
    return {way: _numbers(found[way]) for way in WAYS}


def _numbers(described: dict[str, Any]) -> Counter[str]:
    assert described["dropped"] == {}, described
    return Counter(
        {name: described[name] for name in ("frames", "bytes", "multicast", "broadcast")}
    )


def of_testpmd(found: dict[str, int], way: str, queues: int) -> Counter[str]:
    """Return what testpmd has counted at a port in a direction, by our names."""
    assert found["RX-errors"] == found["TX-errors"] == found["RX-missed"] == found["RX-nombuf"] == 0
    short = {"transmit": "tx", "receive": "rx"}[way]

    def total(name: str) -> int:
        return sum(found[f"{short}_q{queue}_{name}"] for queue in range(queues))

    packets, size = found[f"{short.upper()}-packets"], found[f"{short.upper()}-bytes"]
    assert (total("good_packets"), total("good_bytes")) == (packets, size)
    if way == "transmit":
        # The driver counts what is left of a frame when its tag has been put beside it.
        size += 4 * TAGS * (packets == FRAMES)
    return Counter(
        frames=packets,
        bytes=size,
        multicast=total("multicast_packets"),
        broadcast=total("broadcast_packets"),
    )


def as_forwarded(frame: bytes, mode: str, port: int) -> bytes:
    """Return a frame as a port sends it: with addresses of its own, if it does as routers do."""
    if mode == "io":
        return frame
    return bytes((2, 0, 0, 0, 0, port)) + bytes.fromhex(MACS[port].replace(":", "")) + frame[12:]


def test_testpmd_forwards_between_two_adapters_and_counts_what_we_count(
    lab: Lab, wires: tuple[Wire, Wire]
):
    server = lab.serve(
        lab.tools,
        f"raw:[ro,lun={DPDK_LUN}]{lab.assets.dpdk}",
        options=[
            f"--net=tap:[monitor,spoof,mac={mac}]{wire.name}"
            for mac, wire in zip(MACS, wires, strict=True)
        ],
    )
    guest = lab.boot(server, ordinary=True, memory="768M")
    guest.mount_tools(TOOLS_LUN)
    mount_dpdk(guest, DPDK_LUN)
    names = adapters(guest)
    give(guest, names, USER_DRIVER)

    # Being told of changes, the driver answers from what it knew at the start.
    for queues, mode, cable, *more in (
        (1, "io", hear_of_the_cable),
        (4, "mac", look_at_the_cable, "--no-lsc-interrupt"),
    ):
        before = {mac: counted(server, mac) for mac in MACS}
        testpmd = start(
            guest, f"--rxq={queues}", f"--txq={queues}", f"--forward-mode={mode}", *more
        )
        assert sorted(testpmd.macs) == sorted(MACS)
        testpmd.command("start", keep="^$")
        for index in (0, 1):
            there, back = wires[index], wires[1 - index]
            port = testpmd.macs.index(MACS[1 - index])
            sent = frames_to(MACS[index])
            there.send(sent)
            got = back.receive(len(sent))
            expected = [as_forwarded(frame, mode, port) for frame in sent]
            assert sorted(got) == sorted(expected)
            if queues == 1:
                assert got == expected
        agree(server, testpmd, before, queues)
        cable(server, testpmd)
        testpmd.quit()

    # The kernel's driver takes over what DPDK has left.
    give(guest, names, KERNEL_DRIVER)
    for number in (0, 1):
        guest.run(
            f"ip link set eth{number} up; for try in $(seq 1200); do"
            f" [ $(cat /sys/class/net/eth{number}/carrier) = 1 ] && exit 0; usleep 50000; done;"
            " exit 1"
        )
    guest.check_log()
    guest.power_off()


def agree(
    server: Server, testpmd: Testpmd, before: dict[str, dict[str, Counter[str]]], queues: int
) -> None:
    """See that testpmd has counted what we have, and as many in each queue as it should.

    Args:
        server: What has counted, too.
        testpmd: It has forwarded :data:`FRAMES` each way.
        before: What we had counted when testpmd started, by adapter.
        queues: How many there are.
    """
    ours = {
        mac: {way: counted(server, mac)[way] - before[mac][way] for way in WAYS} for mac in MACS
    }
    assert [each[way]["frames"] for each in ours.values() for way in WAYS] == [FRAMES] * 4
    found: dict[str, dict[str, int]] = {}

    def same() -> bool:
        found.update(zip(testpmd.macs, testpmd.statistics(), strict=True))
        return ours == {
            mac: {way: of_testpmd(found[mac], way, queues) for way in WAYS} for mac in MACS
        }

    # What has been sent counts there when its answer is seen.
    until(same, what=f"agreement on {ours}")
    spread = Counter(
        Toeplitz(KEY).hash(flow(number)) % RSS_TABLE_ENTRIES % queues for number in range(FRAMES)
    )
    for counters in found.values():
        assert {queue: counters[f"rx_q{queue}_good_packets"] for queue in spread} == spread


def hear_of_the_cable(server: Server, testpmd: Testpmd) -> None:
    """Plug the cable of an adapter out and in; testpmd is told of each."""
    port = testpmd.macs.index(MACS[0])
    for up in (False, True):
        server.nic(0, action="link", up=up)
        until(
            lambda: f"Port {port}: link state change event" in testpmd.command(keep="^Port"),
            what="the news of the link",
        )


def look_at_the_cable(server: Server, testpmd: Testpmd) -> None:
    """Plug the cable of an adapter out and in; testpmd sees it when it looks."""
    port = testpmd.macs.index(MACS[0])
    for state in ("down", "up"):
        server.nic(0, action="link", up=state == "up")
        until(
            lambda state=state: (
                f"Link status: {state}"
                in testpmd.command(f"show port info {port}", keep="Link status")
            ),
            what=f"a link that is {state}",
        )
