"""Answers to OIDs: exactly as many bytes as drivers take."""

from __future__ import annotations

import struct

import pytest

from netvsp.frames.frame import Frame
from netvsp.link import Link
from netvsp.oid_answers import ANSWERS, SUPPORTED, Facts
from netvsp.statistics import AdapterStatistics
from netvsp.wire import oids
from tests.support.net_guest import MAC

OTHER = bytes.fromhex("00155d0a0b0c")


def facts(**changes) -> Facts:
    link = Link(MAC, mtu=9000, speed=25_000_000_000)
    return Facts(
        **{
            "link": link,
            "statistics": AdapterStatistics(),
            "mtu": 1500,
            "queues": 4,
            "friendly_name": "",
            **changes,
        }
    )


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


EXACT = {
    oids.GEN_HARDWARE_STATUS: word(0),
    oids.GEN_MEDIA_SUPPORTED: word(0),
    oids.GEN_MEDIA_IN_USE: word(0),
    oids.GEN_MAXIMUM_FRAME_SIZE: word(1500),
    oids.GEN_MAXIMUM_TOTAL_SIZE: word(1514),
    oids.GEN_TRANSMIT_BLOCK_SIZE: word(1514),
    oids.GEN_RECEIVE_BLOCK_SIZE: word(1514),
    oids.GEN_LINK_SPEED: word(250_000_000),
    oids.GEN_VENDOR_ID: word(0x155D),
    oids.GEN_VENDOR_DESCRIPTION: b"vmbus\0",
    oids.GEN_DRIVER_VERSION: b"\0\6",
    oids.GEN_MEDIA_CONNECT_STATUS: word(0),
    oids.GEN_MAXIMUM_SEND_PACKETS: word(8),
    oids.GEN_FRIENDLY_NAME: b"",
    oids.GEN_LINK_STATE: struct.pack(
        "<BBHII4xQQII", 0x80, 1, 40, 1, 2, 25_000_000_000, 25_000_000_000, 0, 0
    ),
    oids.GEN_MAX_LINK_SPEED: struct.pack("<QQ", 25_000_000_000, 25_000_000_000),
    oids.GEN_RECEIVE_SCALE_CAPABILITIES: struct.pack(
        "<BBHIIIH", 0x88, 2, 18, 0x07000701, 4, 4, 128
    ),
    oids.E802_3_PERMANENT_ADDRESS: MAC,
    oids.E802_3_CURRENT_ADDRESS: MAC,
    oids.E802_3_MULTICAST_LIST: b"",
    oids.OFFLOAD_ENCAPSULATION: word(2),
}
SIZES = {
    oids.GEN_MAXIMUM_LOOKAHEAD: 4,
    oids.GEN_CURRENT_LOOKAHEAD: 4,
    oids.GEN_TRANSMIT_BUFFER_SPACE: 4,
    oids.GEN_RECEIVE_BUFFER_SPACE: 4,
    oids.GEN_VENDOR_DRIVER_VERSION: 4,
    oids.GEN_MAC_OPTIONS: 4,
    oids.E802_3_MAXIMUM_LIST_SIZE: 4,
    oids.E802_3_MAC_OPTIONS: 4,
    oids.E802_3_RCV_ERROR_ALIGNMENT: 4,
    oids.E802_3_XMIT_ONE_COLLISION: 4,
    oids.E802_3_XMIT_MORE_COLLISIONS: 4,
    oids.GEN_RCV_CRC_ERROR: 4,
    oids.GEN_TRANSMIT_QUEUE_LENGTH: 4,
    oids.GEN_SUPPORTED_LIST: 4 * len(SUPPORTED),
}
COUNTERS = sorted(set(ANSWERS) - set(EXACT) - set(SIZES))


@pytest.mark.parametrize("oid", EXACT, ids=lambda oid: oids.NAMES[oid])
def test_an_answer_is_exactly_what_drivers_take(oid):
    """linux: an answer longer than its room ends the probe; UEFI: six bytes of address."""
    assert ANSWERS[oid](facts()) == EXACT[oid]


@pytest.mark.parametrize("oid", SIZES, ids=lambda oid: oids.NAMES[oid])
def test_an_answer_has_its_size(oid):
    assert len(ANSWERS[oid](facts())) == SIZES[oid]


@pytest.mark.parametrize("oid", COUNTERS, ids=lambda oid: oids.NAMES[oid])
def test_a_counter_has_64_bits(oid):
    assert ANSWERS[oid](facts()) == bytes(8)


def test_the_list_of_what_is_supported_is_that_of_what_is_answered():
    numbers = struct.unpack(f"<{len(SUPPORTED)}I", ANSWERS[oids.GEN_SUPPORTED_LIST](facts()))
    assert numbers == SUPPORTED == tuple(sorted(set(SUPPORTED)))
    assert set(ANSWERS) <= set(SUPPORTED)
    assert set(SUPPORTED) <= set(oids.NAMES)


def test_answers_follow_what_they_are_about():
    found = facts(friendly_name="Net 1")
    found.link.set_mac(OTHER)
    found.link.set_operator(up=False)
    found.link.speed = 10**13
    assert ANSWERS[oids.E802_3_CURRENT_ADDRESS](found) == OTHER
    assert ANSWERS[oids.E802_3_PERMANENT_ADDRESS](found) == MAC
    assert ANSWERS[oids.GEN_MEDIA_CONNECT_STATUS](found) == word(1)
    assert ANSWERS[oids.GEN_LINK_STATE](found)[4:8] == word(2)
    assert ANSWERS[oids.GEN_LINK_SPEED](found) == word(0xFFFFFFFF), "as much as there is room for"


@pytest.mark.parametrize("length", [5, 255, 256, 1000])
def test_a_name_ends_where_linux_sees_it(length):
    """linux: rndis_get_friendly_name looks for the end in 512 bytes of its stack."""
    answer = ANSWERS[oids.GEN_FRIENDLY_NAME](facts(friendly_name="n" * length))
    assert answer == ("n" * min(length, 255)).encode("utf-16-le") + b"\0\0"
    assert len(answer) <= 512


def test_a_name_that_is_cut_ends_with_a_whole_character():
    answer = ANSWERS[oids.GEN_FRIENDLY_NAME](facts(friendly_name="\U0001f5a7" * 200))
    assert answer.decode("utf-16-le") == "\U0001f5a7" * 127 + "\0"


def test_counters_count_the_way_that_the_guest_means():
    found = facts()
    frames = [Frame(first + bytes(50 + more)) for more, first in enumerate((MAC, b"\1" * 6))]
    for frame in [*frames, Frame(b"\xff" * 60)]:
        found.statistics.transmit.count(frame)
    found.statistics.transmit.errors = 1 << 64 | 5
    found.statistics.receive.count(Frame(b"\xff" * 99))
    found.statistics.receive.dropped["no buffer"] = 3
    got = {oid: int.from_bytes(ANSWERS[oid](found), "little") for oid in COUNTERS}
    assert {oid: value for oid, value in got.items() if value} == {
        oids.GEN_XMIT_OK: 3,
        oids.GEN_BYTES_XMIT: 56 + 57 + 60,
        oids.GEN_XMIT_ERROR: 5,
        oids.GEN_DIRECTED_FRAMES_XMIT: 1,
        oids.GEN_DIRECTED_BYTES_XMIT: 56,
        oids.GEN_MULTICAST_FRAMES_XMIT: 1,
        oids.GEN_MULTICAST_BYTES_XMIT: 57,
        oids.GEN_BROADCAST_FRAMES_XMIT: 1,
        oids.GEN_BROADCAST_BYTES_XMIT: 60,
        oids.GEN_RCV_OK: 1,
        oids.GEN_BYTES_RCV: 99,
        oids.GEN_BROADCAST_FRAMES_RCV: 1,
        oids.GEN_BROADCAST_BYTES_RCV: 99,
        oids.GEN_RCV_NO_BUFFER: 3,
    }
