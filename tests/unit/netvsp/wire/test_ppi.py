"""Per-packet information: items as linux makes them, and lists that are none."""

from __future__ import annotations

import struct

import pytest

from netvsp.wire import ppi
from vmbus.errors import GuestProtocolError


def item(size: int, kind: int, offset: int, data: bytes = b"") -> bytes:
    return struct.pack("<III", size, kind, offset) + data


def test_items_are_found_by_type_and_the_first_one_counts():
    """linux: init_ppi_data."""
    built = item(16, 6, 12, b"\x50\1\0\0") + item(16, 0, 12, b"\5\0\x22\0") + ppi.build_item(6, 9)
    assert ppi.parse_items_untrusted(built) == {6: 0x150, 0: 0x220005}
    assert ppi.parse_items_untrusted(b"") == {}
    assert ppi.build_item(2, 0x12345678) == item(16, 2, 12, b"\x78\x56\x34\x12")


def test_an_item_may_be_long_and_its_data_may_begin_late():
    assert ppi.parse_items_untrusted(item(24, 5, 16, bytes(4) + b"\1\2\3\4" + bytes(4))) == {
        5: 0x04030201
    }
    assert ppi.parse_items_untrusted(item(12, 5, 12)) == {}, "no data is none that we know"


@pytest.mark.parametrize(
    ("information", "field"),
    [
        (item(16, 0, 12, bytes(4)) + b"\0", "per_pkt_info_len"),
        (item(16, 0, 12, bytes(4))[:11], "per_pkt_info_len"),
        (item(16, 0, 12), "ppi.size"),
        (item(0, 0, 12), "ppi.size"),
        (item(8, 0, 8), "ppi.size"),
        (item(13, 0, 12, bytes(4)), "ppi.size"),
        (item(0xFFFFFFFC, 0, 12, bytes(4)), "ppi.size"),
        (item(16, 0, 11, bytes(4)), "ppi_offset"),
        (item(16, 0, 0, bytes(4)), "ppi_offset"),
        (item(16, 0, 17, bytes(4)), "ppi_offset"),
        (item(16, 0, 0xFFFFFFFF, bytes(4)), "ppi_offset"),
        (item(16, 0, 12, bytes(4)) * 17, "per_pkt_info_len"),
    ],
)
def test_lists_that_are_none_are_refused(information, field):
    with pytest.raises(GuestProtocolError) as caught:
        ppi.parse_items_untrusted(information)
    assert caught.value.field == field


def test_sixteen_items_are_not_too_many():
    assert len(ppi.parse_items_untrusted(b"".join(ppi.build_item(n, n) for n in range(16)))) == 16


def test_a_large_send_has_linux_bit_fields():
    """linux: struct ndis_tcp_lso_info, lso_v2_transmit: mss:20, offset:10, type:1, ip_version:1."""
    for ipv6 in (False, True):
        value = 1448 | 54 << 20 | 1 << 30 | ipv6 << 31
        assert ppi.pack_large_send(ppi.LargeSend(1448, 54, ipv6)) == value
        assert ppi.unpack_large_send(value) == (1448, 54, ipv6)


def test_a_tag_has_linux_bit_fields():
    """linux: struct ndis_pkt_8021q_info: pri:3, cfi:1, vlanid:12; in a frame reversed."""
    vlan = ppi.Vlan(0x123, 5, canonical=True)
    assert ppi.pack_vlan(vlan) == 0x123 << 4 | 1 << 3 | 5
    assert ppi.unpack_vlan(0xFFFF0000 | ppi.pack_vlan(vlan)) == vlan
    assert vlan.tci == 5 << 13 | 1 << 12 | 0x123
    assert ppi.vlan_of_tci(vlan.tci) == vlan


def test_a_part_of_a_segment_is_marked_as_linux_reads_it():
    """linux: struct rndis_pktinfo_id, version 1; the item is an internal one."""
    built = ppi.build_packet_id(ppi.FRAGMENT_SUB_ALLOCATION | ppi.FRAGMENT_LAST, 0x1234)
    assert built == item(16, 1 << 31 | 1, 12, b"\x01\x05\x34\x12")
