"""Packets of the demo's stations: what is built is what scapy reads, and anything can come."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from netvsp.demo.packets import (
    ECHO_REQUEST,
    HEADERS,
    REPLY,
    REQUEST,
    Arp,
    Datagram,
    Echo,
    Station,
    build_arp,
    build_echo,
    build_udp,
    parse,
)

ONE = Station(b"\x00\x15\x5d\x00\x00\x01", bytes([10, 0, 0, 1]))
TWO = Station(b"\x00\x15\x5d\x00\x00\x02", bytes([10, 0, 0, 2]))


@pytest.mark.parametrize("operation", [REQUEST, REPLY])
def test_arp_is_what_others_read_and_what_was_built(operation):
    frame = build_arp(operation, ONE, TWO)
    packet = Ether(frame)
    assert packet.dst == ("ff:ff:ff:ff:ff:ff" if operation == REQUEST else "00:15:5d:00:00:02")
    assert (packet[ARP].op, packet[ARP].psrc, packet[ARP].pdst) == (
        operation, "10.0.0.1", "10.0.0.2",
    )  # fmt: skip
    assert parse(frame) == Arp(operation, ONE, TWO)


@given(st.binary(max_size=1400), st.integers(0, 0xFFFFFFFF))
def test_pings_have_right_sums(data, number):
    frame = build_echo(ECHO_REQUEST, ONE, TWO, number, data)
    packet = Ether(frame)
    assert (packet[IP].src, packet[IP].dst, packet[ICMP].type) == ("10.0.0.1", "10.0.0.2", 8)
    again = packet.copy()
    del again[IP].chksum, again[ICMP].chksum
    assert bytes(again) == frame
    assert parse(frame) == Echo(ECHO_REQUEST, ONE, number, data)


@given(st.binary(max_size=1400))
def test_datagrams_have_right_sums_or_none(data):
    frame = build_udp(ONE, TWO, (4001, 4000), data)
    packet = Ether(frame)
    again = packet.copy()
    del again[IP].chksum, again[UDP].chksum
    assert bytes(again) == frame
    assert parse(frame) == Datagram(ONE, 4000, data, sum_right=True)
    left = build_udp(ONE, TWO, (4001, 4000), data, sums=False)
    assert Ether(left)[UDP].chksum == 0
    assert len(left) == max(60, HEADERS + len(data))


@given(st.integers(HEADERS, HEADERS + 99), st.integers(0, 7))
def test_a_bit_that_has_changed_is_noticed(place, bit):
    frame = bytearray(build_udp(ONE, TWO, (4001, 4000), bytes(range(100))))
    frame[place] ^= 1 << bit
    found = parse(bytes(frame))
    assert isinstance(found, Datagram)
    assert not found.sum_right


@given(st.binary(max_size=200), st.sampled_from([b"\x08\x00", b"\x08\x06", b"\x86\xdd"]))
def test_anything_can_come(data, kind):
    for frame in (data, bytes(12) + kind + data, bytes(12) + kind + b"\x45" + data):
        assert parse(frame) is None or isinstance(parse(frame), Arp | Echo | Datagram)


def test_what_is_none_of_these_is_nothing():
    for packet in (
        Ether(type=0x88B5) / Raw(b"x" * 50),
        Ether() / IP(options=[b"\x01"]) / UDP(),
        Ether() / IP(proto=6) / Raw(b"x" * 20),
    ):
        assert parse(bytes(packet)) is None
    broken = bytearray(build_echo(ECHO_REQUEST, ONE, TWO, 1, b"data"))
    broken[40] ^= 1
    assert parse(bytes(broken)) is None
