"""Receive-side scaling: Microsoft's examples, and which channel a frame goes to."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from netvsp import rss
from netvsp.wire import ndis
from tests.support.net_frames import Shape, packet
from tests.support.turns import counting

# "Verifying the RSS hash calculation" of the WDK: destination, source, hash of addresses and ports,
# hash of addresses.
KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
EXAMPLES = [
    ("161.142.100.80:1766", "66.9.149.187:2794", 0x51CCC178, 0x323E8FC2),
    ("65.69.140.83:4739", "199.92.111.2:14230", 0xC626B0EA, 0xD718262A),
    ("12.22.207.184:38024", "24.19.198.95:12898", 0x5C2B394A, 0xD2D0A5DE),
    ("209.142.163.6:2217", "38.27.205.30:48228", 0xAFC7327F, 0x82989176),
    ("202.188.127.2:1303", "153.39.163.191:44251", 0x10E828A2, 0x5D1809C5),
    ("3ffe:2501:200:3::1:1766", "3ffe:2501:200:1fff::7:2794", 0x40207D3D, 0x2CC18CD5),
    ("ff02::1:4739", "3ffe:501:8::260:97ff:fe40:efab:14230", 0xDDE51BBF, 0x0F0C461C),
    (
        "fe80::200:f8ff:fe21:67cf:38024",
        "3ffe:1900:4545:3:200:f8ff:fe21:67cf:44251",
        0x02D1FEEF,
        0x4B61E985,
    ),
]
ALL = ndis.HASH_TOEPLITZ | ndis.HASH_IPV4 | ndis.HASH_TCP_IPV4 | ndis.HASH_IPV6 | ndis.HASH_TCP_IPV6
ADDRESSES = ndis.HASH_TOEPLITZ | ndis.HASH_IPV4 | ndis.HASH_IPV6


def parts(text: str) -> tuple[bytes, bytes]:
    address, _colon, port = text.rpartition(":")
    return ipaddress.ip_address(address).packed, int(port).to_bytes(2, "big")


def frame(target: str, source: str, *, protocol: int = 6, options: int = 0) -> bytes:
    (to, to_port), (origin, from_port) = parts(target), parts(source)
    ethernet = bytes(12)
    tcp = from_port + to_port + bytes(16)
    if len(to) == 16:
        header = struct.pack(">IHBB", 6 << 28, 20, protocol, 64)
        return ethernet + b"\x86\xdd" + header + origin + to + tcp
    header = struct.pack(">BBHHHBBH", 0x45 + options, 0, 40, 1, 0x4000, 64, protocol, 0)
    return ethernet + b"\x08\x00" + header + origin + to + bytes(4 * options) + tcp


@pytest.mark.parametrize(("target", "source", "with_ports", "without"), EXAMPLES)
def test_hashes_are_those_that_microsoft_publishes(target, source, with_ports, without):
    scaling = rss.Scaling(KEY, ALL, (0,))
    assert scaling.hash(frame(target, source)) == with_ports
    assert scaling.hash(frame(target, source)) == with_ports, "it is remembered"
    assert scaling.hash(frame(target, source, protocol=17)) == without
    assert rss.Scaling(KEY, ADDRESSES, (0,)).hash(frame(target, source)) == without


def test_options_stand_before_the_ports():
    target, source, with_ports, without = EXAMPLES[0]
    scaling = rss.Scaling(KEY, ALL, (0,))
    assert scaling.hash(frame(target, source, options=3)) == with_ports
    assert scaling.hash(frame(target, source, options=3)[:49]) == without, "ports are cut off"


def test_a_fragment_is_hashed_by_its_addresses():
    """Only the first one has ports; all have to go the same way."""
    target, source, _with_ports, without = EXAMPLES[0]
    scaling = rss.Scaling(KEY, ALL, (0,))
    for fragment in (0x2000, 0x0001, 0x1FFF, 0x0100):
        whole = frame(target, source)
        whole = whole[:20] + fragment.to_bytes(2, "big") + whole[22:]
        assert scaling.hash(whole) == without


def test_what_has_no_hash_has_none():
    target, source, _with_ports, _without = EXAMPLES[0]
    whole = frame(target, source)
    assert rss.Scaling(KEY, ndis.HASH_IPV6, (0,)).hash(whole) == 0
    assert rss.Scaling(KEY, ndis.HASH_IPV4, (0,)).hash(frame(*EXAMPLES[5][:2])) == 0
    scaling = rss.Scaling(KEY, ALL, (0,))
    assert scaling.hash(whole[:12] + b"\x08\x06" + whole[14:]) == 0
    assert scaling.hash(packet(Shape(4, "tcp", "inside"), b"")) == 0, "its tag is in the way"


@pytest.mark.parametrize("example", [EXAMPLES[0], EXAMPLES[5]])
def test_a_frame_that_is_cut_off_anywhere_is_no_harm(example):
    scaling = rss.Scaling(KEY, ALL, (0,))
    whole = frame(*example[:2])
    known = {0, *example[2:]}
    assert {scaling.hash(whole[:length]) for length in range(len(whole))} <= known


def test_a_key_that_is_short_ends_in_zeros():
    short = rss.Toeplitz(KEY[:16])
    assert short.hash(b"\xff" * 12) == rss.Toeplitz(KEY[:16] + bytes(24)).hash(b"\xff" * 12)
    assert rss.Toeplitz(b"").hash(b"\xff" * 36) == 0


def test_no_more_than_so_many_flows_are_remembered():
    scaling = rss.Scaling(KEY, ALL, (0,))
    for number in range(rss.MAX_FLOWS + 10):
        scaling.hash(frame(f"10.0.0.1:{number}", "10.0.0.2:1"))
    assert len(scaling._flows) == 10
    target, source, with_ports, _ = EXAMPLES[0]
    assert scaling.hash(frame(target, source)) == with_ports


async def test_a_key_that_is_set_costs_nothing_before_a_frame_is_hashed():
    with counting(rss, "Toeplitz") as made:
        for number in range(100):
            scaling = rss.Scaling(bytes((number,)) * 40, ALL, (0,))
        assert made.total == 0
        for target, source, _with_ports, _without in EXAMPLES:
            assert scaling.hash(frame(target, source))
    assert made.total == 1
