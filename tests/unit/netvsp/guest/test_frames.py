"""Frames of a guest's own: where their headers are, and the sums that they leave to the device."""

from __future__ import annotations

import struct

import pytest

from netvsp.guest.frames import (
    TCP,
    UDP,
    Headers,
    flow_hash,
    leave_checksum,
    leave_segments,
    ones_sum,
    parse_headers,
)

ETHERNET = bytes.fromhex("00155d0a0b0c 00155d010203")
TCP_HEADER = struct.pack(">HHIIBBHHH", 80, 4000, 1, 2, 5 << 4, 0x18, 512, 0xAAAA, 0)


def ipv4(protocol: int, body: bytes, *, options: bytes = b"") -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45 + len(options) // 4, 0, 20 + len(options) + len(body), 1, 0, 64, protocol, 0xBEEF,
        bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]),
    )  # fmt: skip
    return ETHERNET + b"\x08\x00" + header + options + body


def ipv6(protocol: int, body: bytes) -> bytes:
    header = struct.pack(">IHBB16s16s", 6 << 28, len(body), protocol, 64, b"a" * 16, b"b" * 16)
    return ETHERNET + b"\x86\xdd" + header + body


def tcp(size: int) -> bytes:
    return TCP_HEADER + bytes(n & 0xFF for n in range(size))


def udp(size: int) -> bytes:
    return struct.pack(">HHHH", 53, 5353, 8 + size, 0xAAAA) + bytes(range(size))


def test_headers_are_found():
    assert parse_headers(ipv4(TCP, tcp(0))) == Headers(14, 34, TCP, ipv6=False)
    assert parse_headers(ipv4(UDP, udp(0), options=bytes(8))) == Headers(14, 42, UDP, ipv6=False)
    assert parse_headers(ipv6(UDP, udp(0))) == Headers(14, 54, UDP, ipv6=True)
    tagged = ipv4(TCP, tcp(0))
    tagged = tagged[:12] + b"\x81\0\0\7" + tagged[12:]
    assert parse_headers(tagged) == Headers(18, 38, TCP, ipv6=False)
    assert parse_headers(ETHERNET + b"\x08\x06" + bytes(28)) is None


@pytest.mark.parametrize("frame", [bytes(13), ipv4(TCP, b"")[:33], ipv6(TCP, b"")[:53]])
def test_a_frame_that_ends_in_its_headers_is_refused(frame):
    with pytest.raises(ValueError, match="frame"):
        parse_headers(frame)


@pytest.mark.parametrize(
    ("frame", "place", "addresses"),
    [
        (ipv4(TCP, tcp(11)), 50, slice(26, 34)),
        (ipv4(UDP, udp(4)), 40, slice(26, 34)),
        (ipv6(TCP, tcp(4)), 70, slice(22, 54)),
        (ipv6(UDP, udp(3)), 60, slice(22, 54)),
    ],
)
def test_a_sum_that_is_left_out_is_that_of_the_pseudo_header(frame, place, addresses):
    """The device sums up the segment as it finds it, and that is all it has to do."""
    changed, headers = leave_checksum(frame)
    length = len(frame) - headers.transport
    pseudo = frame[addresses] + struct.pack(">II", length, headers.protocol)
    right = bytearray(frame)
    right[place : place + 2] = bytes(2)
    total = ones_sum(pseudo + bytes(right[headers.transport :]))
    assert ones_sum(changed[headers.transport :]) in (total, total % 0xFFFF)
    assert changed[:place] == frame[:place]
    assert changed[place + 2 :] == frame[place + 2 :]


def test_what_is_to_be_cut_has_no_lengths():
    """linux netvsc_xmit: tot_len and check are 0, and the sum of TCP leaves the length out."""
    frame = ipv4(TCP, tcp(4000))
    changed, headers = leave_segments(frame)
    assert headers == Headers(14, 34, TCP, ipv6=False)
    assert changed[16:18] == changed[24:26] == bytes(2)
    assert changed[50:52] == struct.pack(">H", ones_sum(frame[26:34] + struct.pack(">I", TCP)))
    same = bytearray(changed)
    same[16:18], same[24:26], same[50:52] = frame[16:18], frame[24:26], frame[50:52]
    assert same == frame
    frame = ipv6(TCP, tcp(4000))
    changed, headers = leave_segments(frame)
    assert headers.ipv6
    assert changed[18:20] == bytes(2)
    assert changed[70:72] == struct.pack(">H", ones_sum(frame[22:54] + struct.pack(">I", TCP)))


def test_only_what_has_a_sum_can_leave_it_out():
    with pytest.raises(ValueError, match="neither"):
        leave_checksum(ipv4(1, bytes(8)))
    with pytest.raises(ValueError, match="neither"):
        leave_checksum(ETHERNET + b"\x08\x06" + bytes(28))
    with pytest.raises(ValueError, match="ends within"):
        leave_checksum(ipv4(TCP, tcp(0)[:16]))
    with pytest.raises(ValueError, match="only TCP"):
        leave_segments(ipv4(UDP, udp(10)))


def test_the_frames_of_a_flow_have_one_hash():
    one, other = ipv4(TCP, tcp(3)), ipv4(TCP, tcp(300))
    assert flow_hash(one) == flow_hash(other) != 0
    assert flow_hash(one) != flow_hash(ipv4(UDP, udp(3)))
    assert flow_hash(ipv6(1, bytes(8))) == flow_hash(ipv6(1, b"12345678"))
    assert flow_hash(ETHERNET + b"\x08\x06" + bytes(28)) == 0


def test_sums_wrap_around():
    assert ones_sum(b"\xff\xff\x00\x01") == 1
    assert ones_sum(b"\x12") == 0x1200
