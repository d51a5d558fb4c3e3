"""Offloads, said as endpoints understand it and done in software: compared with scapy."""

from __future__ import annotations

import struct

import pytest

from netvsp.frames import offload
from netvsp.frames.frame import (
    DATA_VALID,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    HEADERS,
    NEEDS_CHECKSUM,
    Frame,
    Offload,
)
from netvsp.wire import ppi
from tests.support.net_frames import (
    SHAPES,
    TCI,
    Shape,
    from_guest,
    packet,
    pieces_of,
    pseudo_sum,
    uncut,
    without_sum,
)
from vmbus.errors import GuestProtocolError

TCP_SHAPES = [each for each in SHAPES if each.protocol == "tcp"]
UDP_SHAPES = [each for each in SHAPES if each.protocol == "udp"]
V4 = Shape(4, "tcp", "none")
V6 = Shape(6, "tcp", "none")


def data(size: int) -> bytes:
    return bytes(number * 7 & 0xFF for number in range(size))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 100, 1301])
def test_a_sum_that_is_left_to_us_is_what_scapy_computes(shape, size):
    whole = packet(shape, data(size))
    left, items = without_sum(shape, whole)
    assert left != whole
    frame = from_guest(left, items, cut=HEADERS if len(left) > HEADERS else None)
    field = 16 if shape.protocol == "tcp" else 6
    assert frame.offload == Offload(NEEDS_CHECKSUM, 0, 0, 0, shape.transport, field)
    assert frame.tci == shape.tci
    assert frame.tobytes() == left, "who takes it with its offload gets it as it is"
    done = offload.fill_checksum(frame)
    assert done.tobytes() == whole
    assert done.offload is not None
    assert done.offload.flags == DATA_VALID
    assert done.tci == shape.tci
    assert offload.fill_checksum(done) is done


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_may_be_filled_in_when_the_tag_is_in_the_frame(shape):
    """An endpoint that takes no tags beside a frame gets them in it."""
    whole = packet(shape._replace(vlan="none" if shape.vlan == "none" else "inside"), data(99))
    left, items = without_sum(shape, packet(shape, data(99)))
    frame = from_guest(left, items).tagged()
    assert offload.fill_checksum(frame).tobytes() == whole
    again = offload.fill_checksum(frame.untagged())
    assert again.tci == (None if shape.vlan == "none" else TCI)
    assert again.tagged().tobytes() == whole


@pytest.mark.parametrize("shape", TCP_SHAPES, ids=str)
@pytest.mark.parametrize(("size", "mss"), [(3000, 1448), (2896, 1448), (64000, 1000), (101, 100)])
def test_a_segment_is_cut_into_what_scapy_builds(shape, size, mss):
    """Lengths, sums, sequence numbers, flags and IP ids; these go over their ends, too."""
    payload = data(size)
    whole = packet(shape, payload, flags="CPFA")
    left, items = uncut(shape, whole, mss)
    frame = from_guest(left, items, cut=HEADERS if size > HEADERS else None)
    kind = (GSO_TCPV4 if shape.version == 4 else GSO_TCPV6) | GSO_ECN
    assert frame.offload == Offload(NEEDS_CHECKSUM, kind, shape.headers, mss, shape.transport, 16)
    assert frame.tci == shape.tci
    # What goes out uncut has its lengths, and the pseudo header's sum over them.
    assert offload.fill_checksum(
        Frame(frame.head, frame.rest, frame.offload._replace(gso_type=0))
    ).tobytes() == whole  # fmt: skip
    pieces = offload.complete(frame)
    assert [each.tobytes() for each in pieces] == list(pieces_of(shape, payload, mss, flags="CPFA"))
    assert {each.tci for each in pieces} == {shape.tci}
    assert len(pieces) == -(-size // mss)


@pytest.mark.parametrize("shape", TCP_SHAPES, ids=str)
def test_a_segment_of_one_piece_is_no_segment(shape):
    whole = packet(shape, data(1000))
    left, items = uncut(shape, whole, 1000)
    frame = from_guest(left, items)
    assert frame.offload == Offload(NEEDS_CHECKSUM, 0, 0, 0, shape.transport, 16)
    (piece,) = offload.complete(frame)
    assert piece.tobytes() == whole


@pytest.mark.parametrize("shape", UDP_SHAPES, ids=str)
def test_udp_is_cut_for_endpoints_that_have_it(shape):
    payload = data(2500)
    left, _items = without_sum(shape, packet(shape, payload))
    large = Offload(NEEDS_CHECKSUM, GSO_UDP, shape.headers, 1000, shape.transport, 6)
    pieces = offload.complete(Frame(left, (), large))
    wanted = [
        packet(shape, payload[start : start + 1000], identity=0xFFFE + number & 0xFFFF)
        for number, start in enumerate(range(0, 2500, 1000))
    ]
    assert [each.tobytes() for each in pieces] == wanted


def test_a_sum_of_udp_that_is_zero_is_sent_as_ones():
    """RFC 768: zero means that there is none."""
    shape = Shape(4, "udp", "none")
    whole = packet(shape, b"\0\0")
    total = struct.unpack_from(">H", whole, shape.transport + 6)[0]
    whole = packet(shape, total.to_bytes(2, "big"))
    assert whole[shape.transport + 6 : shape.transport + 8] in {b"\xff\xff", b"\0\0"}
    left, items = without_sum(shape, whole)
    done = offload.fill_checksum(from_guest(left, items)).tobytes()
    assert done[shape.transport + 6 : shape.transport + 8] == b"\xff\xff"


def test_an_ip_header_sum_is_filled_in():
    """Windows leaves it to us; the transport's may be left, too, or not."""
    for shape in (V4, V4._replace(vlan="inside")):
        whole = packet(shape, data(50))
        left = bytearray(whole)
        left[shape.network + 10 : shape.network + 12] = b"\xab\xcd"
        frame = from_guest(bytes(left), {ppi.CHECKSUM: ppi.TX_IPV4 | ppi.TX_IP_HEADER})
        assert frame.tobytes() == whole
        assert frame.offload is None
        unsummed, items = without_sum(shape, bytes(left))
        items[ppi.CHECKSUM] |= ppi.TX_IP_HEADER
        assert offload.fill_checksum(from_guest(unsummed, items)).tobytes() == whole


def test_a_header_without_its_place_is_looked_for():
    """Drivers before NDIS 6 leave the offset zero."""
    for shape in SHAPES:
        whole = packet(shape, data(50))
        left, items = without_sum(shape, whole)
        items[ppi.CHECKSUM] &= 0xFFFF
        assert offload.fill_checksum(from_guest(left, items)).tobytes() == whole


def test_what_is_not_asked_for_is_not_done():
    whole = packet(V4, data(50))
    for items in ({}, {ppi.CHECKSUM: 0}, {ppi.CHECKSUM: ppi.TX_IPV4}, {ppi.HASH_VALUE: 77}):
        frame = from_guest(whole, items)
        assert frame.offload is None
        assert frame.tobytes() == whole
        assert frame.flow == items.get(ppi.HASH_VALUE, 0)
        assert offload.complete(frame) == [frame]


def large(mss: int = 100, start: int = 34, **more: bool) -> dict[int, int]:
    return {ppi.LARGE_SEND: ppi.pack_large_send(ppi.LargeSend(mss, start, more.get("ipv6", False)))}


def with_bytes(frame: bytes, position: int, new: bytes) -> bytes:
    return frame[:position] + new + frame[position + len(new) :]


SEGMENT = packet(V4, data(1000))
SEGMENT6 = packet(V6, data(1000))


@pytest.mark.parametrize(
    ("frame", "items", "field"),
    [
        (SEGMENT, {ppi.LARGE_SEND: 100 | 34 << 20}, "lso.type"),
        (SEGMENT, large(ipv6=True, start=54), "lso.ip_version"),
        (SEGMENT6, large(start=54), "lso.ip_version"),
        (with_bytes(SEGMENT, 12, b"\x88\xb5"), large(), "lso.ip_version"),
        (b"", large(), "lso.ip_version"),
        (SEGMENT, large(start=33), "lso.tcp_header_offset"),
        (SEGMENT6, large(start=53, ipv6=True), "lso.tcp_header_offset"),
        (SEGMENT[:53], large(), "lso.tcp_header_offset"),
        (SEGMENT[:1040], large(start=1023), "lso.tcp_header_offset"),
        (with_bytes(SEGMENT, 46, b"\x40"), large(), "tcp.doff"),
        (with_bytes(SEGMENT, 46, b"\xf0")[:93], large(), "tcp.doff"),
        (SEGMENT, large(mss=47), "lso.mss"),
        (SEGMENT, large(mss=0), "lso.mss"),
        (SEGMENT + bytes(65536), large(), "data_len"),
        (SEGMENT6 + bytes(65536), large(start=54, ipv6=True), "data_len"),
    ],
)
def test_a_segment_that_cannot_be_cut_is_refused(frame, items, field):
    with pytest.raises(GuestProtocolError) as caught:
        from_guest(frame, items)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("frame", "value", "field"),
    [
        (SEGMENT, ppi.TX_TCP | 13 << 16, "csum.tcp_header_offset"),
        (SEGMENT[:51], ppi.TX_TCP | 34 << 16, "csum.tcp_header_offset"),
        (SEGMENT[:41], ppi.TX_UDP | 34 << 16, "csum.tcp_header_offset"),
        (SEGMENT[:1040], ppi.TX_TCP | 1023 << 16, "csum.tcp_header_offset"),
        (with_bytes(SEGMENT, 12, b"\x88\xb5"), ppi.TX_TCP, "csum.tcp_header_offset"),
        (SEGMENT[:14], ppi.TX_TCP, "csum.tcp_header_offset"),
        (b"", ppi.TX_TCP, "csum.tcp_header_offset"),
        (SEGMENT[:14], ppi.TX_IP_HEADER, "ip.ihl"),
        (SEGMENT[:33], ppi.TX_IP_HEADER, "ip.ihl"),
        (with_bytes(SEGMENT, 14, b"\x44"), ppi.TX_IP_HEADER, "ip.ihl"),
        (with_bytes(SEGMENT, 14, b"\x4f")[:73], ppi.TX_IP_HEADER, "ip.ihl"),
    ],
)
def test_a_sum_that_cannot_be_filled_in_is_refused(frame, value, field):
    with pytest.raises(GuestProtocolError) as caught:
        from_guest(frame, {ppi.CHECKSUM: value})
    assert caught.value.field == field


def test_a_header_that_says_another_version_is_cut_by_what_its_type_says():
    """The first byte of the IP header is the guest's, and nobody has looked at it."""
    frame = with_bytes(packet(V6, data(1000)) + bytes(64500), 14, b"\x4f")
    left, items = uncut(V6, frame, 64500)
    pieces = offload.complete(from_guest(left, items))
    assert [len(each) for each in pieces] == [74 + 64500, 74 + 1000]
    assert struct.unpack_from(">H", pieces[0].head, 18) == (64520,)


@pytest.mark.parametrize(
    "said",
    [
        Offload(NEEDS_CHECKSUM, GSO_TCPV4, 54, 0, 34, 16),
        Offload(NEEDS_CHECKSUM, GSO_TCPV4, 54, 100, 33, 16),
        Offload(NEEDS_CHECKSUM, GSO_TCPV4, 53, 100, 34, 16),
        Offload(NEEDS_CHECKSUM, GSO_TCPV4, 54 + 1000, 100, 34, 16),
        Offload(NEEDS_CHECKSUM, GSO_TCPV4, 2000, 100, 34, 16),
        Offload(NEEDS_CHECKSUM, GSO_TCPV6, 54, 100, 34, 16),
        Offload(NEEDS_CHECKSUM, GSO_UDP, 41, 100, 34, 6),
        Offload(NEEDS_CHECKSUM, 3, 54, 100, 34, 16),
    ],
)
def test_an_endpoint_that_says_nonsense_gets_its_segment_uncut(said):
    frame = Frame(SEGMENT, (), said)
    assert [*offload.cut(frame)] == [frame]


def test_a_segment_of_no_protocol_is_not_cut():
    frame = Frame(with_bytes(SEGMENT, 12, b"\x88\xb5"), (), Offload(1, GSO_UDP, 54, 100, 34, 6))
    assert [*offload.cut(frame)] == [frame]
    huge = Frame(SEGMENT, (bytes(70000),), Offload(1, GSO_TCPV4, 54, 66000, 34, 16))
    assert [*offload.cut(huge)] == [huge], "its length does not fit into the header"


def test_a_sum_that_lies_outside_is_not_filled_in():
    for start, field in ((1054, 0), (1053, 0), (2000, 6), (1040, 16)):
        frame = Frame(SEGMENT, (), Offload(NEEDS_CHECKSUM, 0, 0, 0, start, field))
        assert offload.fill_checksum(frame) is frame


@pytest.mark.parametrize("flags", [NEEDS_CHECKSUM, DATA_VALID])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_guest_is_told_what_is_known_of_sums(shape, flags):
    value = offload.receive_value(
        Frame(packet(shape, data(9)), (), Offload(flags, csum_start=shape.transport))
    )
    wanted = ppi.RX_TCP_SUCCEEDED if shape.protocol == "tcp" else ppi.RX_UDP_SUCCEEDED
    assert value == wanted | (ppi.RX_IP_SUCCEEDED if shape.version == 4 else 0)


def test_a_guest_is_told_nothing_where_nothing_is_known():
    whole = packet(V4, data(9))
    assert offload.receive_value(Frame(whole)) == 0
    assert offload.receive_value(Frame(whole, (), Offload(0))) == 0
    for head in (whole[:14], whole[:23], with_bytes(whole, 12, b"\x08\x06"), b"",
                 with_bytes(whole, 23, b"\x01"), packet(V6, b"")[:20]):  # fmt: skip
        assert offload.receive_value(Frame(head, (), Offload(DATA_VALID))) == 0
    # Behind extension headers, where the sum is says what it is of.
    behind = with_bytes(packet(V6, data(30)), 20, b"\x00")
    for place, value in ((16, ppi.RX_TCP_SUCCEEDED), (6, ppi.RX_UDP_SUCCEEDED)):
        said = Offload(NEEDS_CHECKSUM, 0, 0, 0, 62, place)
        assert offload.receive_value(Frame(behind, (), said)) == value
    assert offload.receive_value(Frame(behind, (), Offload(DATA_VALID))) == 0


def test_virtio_headers_go_both_ways():
    said = Offload(NEEDS_CHECKSUM, GSO_TCPV4 | GSO_ECN, 54, 1448, 34, 16)
    header = offload.pack_virtio(said)
    assert header == struct.pack("<BBHHHHH", 1, 0x81, 54, 1448, 34, 16, 0)
    assert offload.unpack_virtio(header) == said
    assert offload.unpack_virtio(offload.PLAIN) is None
    assert offload.pack_virtio(None) == bytes(12)
    # linux: tun_get_user refuses flags it does not know, and DATA_VALID is not for who sends.
    assert offload.pack_virtio(Offload(DATA_VALID, csum_start=34))[0] == 0
    assert offload.unpack_virtio(bytes((DATA_VALID,)) + bytes(11)) == Offload(DATA_VALID)


def test_the_pseudo_header_of_these_tests_is_scapys():
    """The tests take sums of pseudo headers apart from the code; so they have to be right."""
    for shape in SHAPES:
        whole = packet(shape, data(33))
        field = shape.transport + (16 if shape.protocol == "tcp" else 6)
        rest = with_bytes(whole, field, b"\0\0")[shape.transport :]
        total = pseudo_sum(shape, whole, len(rest))
        total += sum(struct.unpack(f">{(len(rest) + 1) // 2}H", rest + bytes(len(rest) & 1)))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        assert ~total & 0xFFFF == struct.unpack_from(">H", whole, field)[0]
