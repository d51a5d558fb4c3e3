"""The RNDIS messages that a network driver takes from its receive buffer."""

from __future__ import annotations

import struct

import pytest

from netvsp.guest.messages import (
    check_frame,
    check_header,
    check_indication,
    check_items,
    check_packet,
)
from netvsp.wire import ppi, rndis
from tests.support.fake_nic_host import frame_message
from vmbus.guest import GuestPanic

FRAME = bytes(range(60))
ITEMS = ppi.build_item(ppi.VLAN, ppi.pack_vlan(ppi.Vlan(7, 1, canonical=False))) + ppi.build_item(
    ppi.HASH_VALUE, 0xABCDEF
)


def panic(reason):
    raise GuestPanic("test", reason)


def changed(message, **words):
    """A message with some of its 32-bit words replaced, by their place in the header."""
    out = bytearray(message)
    for name, value in words.items():
        struct.pack_into("<I", out, int(name[1:]), value)
    return bytes(out)


def test_a_frame_is_found_where_the_message_says():
    found = check_packet(frame_message(FRAME, ITEMS), panic)
    assert found.data == FRAME
    assert found.items == {ppi.VLAN: 0x71, ppi.HASH_VALUE: 0xABCDEF}
    assert check_packet(frame_message(FRAME), panic) == (FRAME, {})


def test_what_is_behind_the_frame_is_padding():
    message = changed(frame_message(FRAME) + bytes(8), _4=44 + 60 + 8)
    assert check_packet(message, panic).data == FRAME


def test_a_header_counts_from_its_type():
    assert check_header(frame_message(FRAME) + b"more", panic) == (rndis.PACKET, 104)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "range of 0 bytes"),
        (struct.pack("<III", rndis.PACKET, 13, 0), "msg_len 13 in a range of 12"),
        (struct.pack("<III", rndis.PACKET, 11, 0), "msg_len 11 in a range of 12"),
        (bytes(11), "range of 11 bytes"),
    ],
)
def test_a_header_that_is_none_crashes_the_guest(message, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_header(message, panic)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"_12": 61}, "a frame of 61 bytes at offset 68"),
        ({"_8": 35}, "a frame of 60 bytes at offset 35"),
        ({"_8": 0xFFFFFFFF}, "offset 4294967295"),
        ({"_12": 0xFFFFFFFF}, "4294967295, 0 and 32 are in it"),
        ({"_12": 0}, "an empty frame: processIncoming panics"),
        ({"_16": 36}, "0 out-of-band items, 0 bytes at 36"),
        ({"_20": 4}, "4 bytes at 0"),
        ({"_24": 1}, "1 out-of-band items"),
        ({"_28": 32}, "32 bytes of per-packet information at offset 32"),
        ({"_28": 38}, "at offset 38"),
        ({"_28": 0}, "at offset 0"),
        ({"_32": 0}, "0 bytes of per-packet information at offset 36"),
        ({"_28": 100}, "32 bytes of information at 100"),
        ({"_28": 64}, "overlap"),
        ({"_32": 64}, "overlap"),
        ({"_32": 80}, "are in it"),
    ],
)
def test_a_packet_that_does_not_add_up_crashes_the_guest(words, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_packet(changed(frame_message(FRAME, ITEMS), **words), panic)


def test_a_packet_without_its_header_crashes_the_guest():
    with pytest.raises(GuestPanic, match="PACKET of 43 bytes"):
        check_packet(frame_message(FRAME)[:43], panic)


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (bytes(8), "8 bytes left"),
        (struct.pack("<IIII", 0, 0, 12, 0), "an item of 0 bytes where 16"),
        (struct.pack("<IIII", 20, 0, 12, 0), "an item of 20 bytes where 16"),
        (struct.pack("<IIII", 14, 0, 12, 0), "an item of 14 bytes"),
        (struct.pack("<IIII", 16, 0, 16, 0), "data at 16 of an item of 16"),
        (struct.pack("<IIIII", 20, 0, 16, 0, 0), "data at 16 of an item of 20"),
        (struct.pack("<III", 12, 0, 12), "data at 12 of an item of 12"),
        (ppi.build_item(0, 0) * 2, "two items of type 0x0"),
        (ppi.build_item(ppi.CHECKSUM, 0b1001), "right and wrong"),
        (ppi.build_item(ppi.CHECKSUM, 0b10010), "right and wrong"),
        (ppi.build_item(ppi.CHECKSUM, 0b100100), "right and wrong"),
        (ppi.build_item(ppi.VLAN, 1 << 16), "VLAN 0x10000"),
    ],
)
def test_items_that_drivers_stumble_over_crash_the_guest(items, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_items(items, panic)


def test_items_of_other_types_are_passed_over():
    assert check_items(struct.pack("<IIIIQ", 24, 9, 12, 5, 6) + ITEMS, panic)[9] == 5


@pytest.mark.parametrize(("size", "reason"), [(13, "13 bytes"), (1519, "1518 at most")])
def test_frames_of_impossible_lengths_crash_the_guest(size, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_frame(bytes(size), 1518, panic)
    check_frame(bytes(14), 1518, panic)
    check_frame(bytes(1518), 1518, panic)


def test_indications_carry_what_they_say():
    message = rndis.build_indication(rndis.STATUS_LINK_SPEED_CHANGE, struct.pack("<I", 77))
    assert check_indication(message, panic) == (rndis.STATUS_LINK_SPEED_CHANGE, b"M\0\0\0")
    message = rndis.build_indication(rndis.STATUS_MEDIA_CONNECT)
    assert check_indication(message, panic) == (rndis.STATUS_MEDIA_CONNECT, b"")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (rndis.build_indication(rndis.STATUS_MEDIA_CONNECT)[:16], "INDICATE_STATUS of 16 bytes"),
        (rndis.build_indication(0x40010099), "0x40010099: hn_rndis_rx_status"),
        (rndis.build_indication(rndis.STATUS_LINK_SPEED_CHANGE), "speed with 0 bytes"),
        (
            changed(rndis.build_indication(rndis.STATUS_NETWORK_CHANGE, bytes(4)), _16=8),
            "4 bytes at offset 8",
        ),
        (
            changed(rndis.build_indication(rndis.STATUS_NETWORK_CHANGE, bytes(4)), _12=5),
            "5 bytes at offset 12 of 16",
        ),
    ],
)
def test_indications_that_drivers_drop_crash_the_guest(message, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_indication(message, panic)
