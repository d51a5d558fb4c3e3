"""RNDIS messages: the bytes that drivers send and take, and refusals."""

from __future__ import annotations

import struct

import pytest

from netvsp.wire import rndis
from tests.support.ids import plain
from vmbus.errors import GuestProtocolError


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def test_requests_have_the_bytes_that_linux_sends():
    """linux: rndis_filter_init_device, rndis_filter_query_device; offsets count from byte 8."""
    assert rndis.build_initialize(7, 0x4000) == words(2, 24, 7, 1, 0, 0x4000)
    assert rndis.build_request(rndis.QUERY, 8, 0x10106) == words(4, 28, 8, 0x10106, 0, 20, 0)
    assert rndis.build_request(rndis.SET, 9, 0x1010E, words(13)) == words(
        5, 32, 9, 0x1010E, 4, 20, 0, 13
    )
    assert rndis.build_id_message(rndis.HALT, 3) == words(3, 12, 3)


def test_replies_have_the_bytes_that_drivers_look_for():
    reply = rndis.build_initialize_reply(7, 0, max_packets=8, max_transfer=0x4000, alignment=3)
    assert reply == words(0x80000002, 52, 7, 0, 1, 0, 1, 0, 8, 0x4000, 3, 0, 0)
    assert rndis.build_query_reply(8, 0, b"abcdef") == words(0x80000004, 30, 8, 0, 6, 16) + (
        b"abcdef"
    )
    assert rndis.build_status_reply(rndis.SET, 9, 5) == words(0x80000005, 16, 9, 5)
    assert rndis.build_status_reply(rndis.KEEPALIVE, 9, 0) == words(0x80000008, 16, 9, 0)
    assert rndis.build_reset_reply(0, addressing_reset=True) == words(0x80000006, 16, 0, 1)
    assert rndis.build_indication(rndis.STATUS_MEDIA_CONNECT) == words(7, 20, 0x4001000B, 0, 12)
    speed = rndis.build_indication(rndis.STATUS_LINK_SPEED_CHANGE, words(1000))
    assert speed == words(7, 24, 0x40010013, 4, 12, 1000)


def test_an_empty_answer_has_the_offset_that_linux_insists_on():
    """linux: info_buf_offset is refused if it is less than 16, whatever the length."""
    reply = rndis.build_query_reply(8, rndis.STATUS_NOT_SUPPORTED)
    assert reply == words(0x80000004, 24, 8, 0xC00000BB, 0, 16)


def test_a_frame_stands_behind_header_and_information():
    header = rndis.build_packet_header(60, bytes(16))
    assert header == words(1, 120, 52, 60, 0, 0, 0, 36, 16, 0, 0) + bytes(16)
    assert rndis.parse_frame_untrusted(header + bytes(60)) == (120, 60, 60, 44, 16)
    plain = rndis.build_packet_header(60)
    assert plain == words(1, 104, 36, 60, 0, 0, 0, 0, 0, 0, 0)
    assert rndis.parse_frame_untrusted(plain) == (104, 44, 60, 0, 0)


SHORT = [
    (rndis.parse_request_id_untrusted, 12),
    (rndis.parse_initialize_untrusted, 24),
    (rndis.parse_request_untrusted, 28),
    (rndis.parse_initialize_reply_untrusted, 52),
    (rndis.parse_query_reply_untrusted, 24),
    (rndis.parse_status_reply_untrusted, 16),
    (rndis.parse_indication_untrusted, 20),
    (rndis.parse_parameter_untrusted, 20),
]


@pytest.mark.parametrize(("parse", "size"), SHORT, ids=plain)
def test_each_message_is_refused_if_it_is_a_byte_too_short(parse, size):
    parse(bytes(size))
    with pytest.raises(GuestProtocolError, match=f"of {size - 1} bytes, needs {size}"):
        parse(bytes(size - 1))


def test_messages_are_read():
    assert rndis.parse_request_id_untrusted(words(3, 12, 77)) == 77
    assert rndis.parse_initialize_untrusted(words(2, 24, 7, 1, 0, 0x4000)) == (7, 1, 0, 0x4000)
    reply = rndis.build_initialize_reply(7, 5, max_packets=8, max_transfer=16, alignment=3)
    assert rndis.parse_initialize_reply_untrusted(reply) == (7, 5, 1, 0, 1, 0, 8, 16, 3)
    assert rndis.parse_status_reply_untrusted(words(0x80000005, 16, 9, 5)) == (9, 5)
    assert rndis.parse_indication_untrusted(words(7, 24, 1, 4, 12, 99)) == (1, words(99))
    assert rndis.parse_query_reply_untrusted(words(4, 28, 8, 0, 4, 16, 99)) == (8, 0, words(99))
    assert rndis.parse_request_untrusted(words(5, 32, 9, 6, 4, 20, 0, 13)) == (9, 6, words(13))
    # A buffer need not be where it usually is, and there may be something behind it.
    assert rndis.parse_request_untrusted(words(5, 40, 9, 6, 4, 24, 0, 1, 2, 3)).buffer == words(2)
    assert rndis.parse_request_untrusted(words(5, 28, 9, 6, 0, 999, 0)).buffer == b""


@pytest.mark.parametrize(
    ("length", "offset"),
    [(4, 19), (4, 21), (5, 20), (4, 0xFFFFFFF8), (0xFFFFFFFF, 20), (1, 0)],
)
def test_a_buffer_that_is_not_in_its_message_is_refused(length, offset):
    with pytest.raises(GuestProtocolError) as caught:
        rndis.parse_request_untrusted(words(5, 32, 9, 6, length, offset, 0, 13))
    assert caught.value.field == "info_buf_offset"


@pytest.mark.parametrize("message", [b"", words(1), words(1, 7), words(1, 9), words(1, 0xFFFFFFFF)])
def test_a_length_that_is_not_between_8_and_what_there_is_is_refused(message):
    with pytest.raises(GuestProtocolError) as caught:
        rndis.parse_header_untrusted(message)
    assert caught.value.field == "msg_len"
    assert rndis.parse_header_untrusted(words(1, 12, 3)) == (1, 12)


def packet(length: int, data: int, size: int, info: int = 0, info_size: int = 0) -> bytes:
    return words(1, length, data, size, 0, 0, 0, info, info_size, 0, 0)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (packet(104, 36, 60)[:43], "msg_len"),
        (packet(43, 36, 0), "data_offset"),
        (packet(104, 35, 60), "data_offset"),
        (packet(104, 36, 61), "data_offset"),
        (packet(104, 37, 60), "data_offset"),
        (packet(104, 0xFFFFFFF8, 60), "data_offset"),
        (packet(104, 36, 0xFFFFFFFF), "data_offset"),
        (packet(104, 36, 60, 35, 16), "per_pkt_info_offset"),
        (packet(104, 36, 60, 81, 16), "per_pkt_info_offset"),
        (packet(104, 36, 60, 0, 16), "per_pkt_info_offset"),
        (packet(104, 36, 60, 36, 0xFFFFFFFF), "per_pkt_info_offset"),
    ],
)
def test_a_frame_that_is_not_in_its_message_is_refused(message, field):
    with pytest.raises(GuestProtocolError) as caught:
        rndis.parse_frame_untrusted(message)
    assert caught.value.field == field


def test_information_of_no_length_is_none_wherever_it_is():
    """linux sets per_pkt_info_offset in every packet, with or without information."""
    assert rndis.parse_frame_untrusted(packet(104, 36, 60, 36, 0)) == (104, 44, 60, 0, 0)
    assert rndis.parse_frame_untrusted(packet(104, 36, 60, 0xFFFFFFFF, 0)) == (104, 44, 60, 0, 0)


def test_a_parameter_is_the_one_that_linux_sends():
    """linux: rndis_filter_set_device_mac."""
    built = rndis.build_parameter("NetworkAddress", "00155d010203")
    assert built[:20] == words(20, 28, 2, 48, 24)
    assert built[20:48].decode("utf-16-le") == "NetworkAddress"
    assert rndis.parse_parameter_untrusted(built) == ("NetworkAddress", "00155d010203")
    number = struct.pack("<I", 20) + words(28, 0) + built[12:]
    assert rndis.parse_parameter_untrusted(number) == ("NetworkAddress", "")


@pytest.mark.parametrize(
    "header",
    [
        (20, 29, 2, 20, 8),
        (21, 28, 2, 20, 8),
        (20, 8, 2, 41, 8),
        (20, 8, 2, 20, 0xFFFFFFFF),
        (0xFFFFFFFF, 2, 2, 20, 8),
        (20, 7, 2, 20, 8),
        (20, 600, 2, 20, 8),
    ],
)
def test_a_parameter_that_is_not_in_its_buffer_is_refused(header):
    with pytest.raises(GuestProtocolError):
        rndis.parse_parameter_untrusted(
            words(*header).ljust(700 if header[1] == 600 else 40, b"\0")
        )


def test_what_is_no_text_is_refused():
    with pytest.raises(GuestProtocolError, match="not UTF-16"):
        rndis.parse_parameter_untrusted(words(20, 2, 2, 20, 2) + b"\x00\xd8")


def test_every_message_has_a_name():
    assert rndis.MESSAGE_NAMES[rndis.QUERY | rndis.COMPLETE] == "QUERY_CMPLT"
