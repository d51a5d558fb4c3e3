"""The vstor layouts: sizes, values, refusals."""

from __future__ import annotations

import struct

import pytest

from storvsp import wire
from vmbus.errors import GuestProtocolError


def test_a_request_has_its_fields_where_the_drivers_put_them():
    packet = wire.build_srb(
        bytes(range(1, 17)),
        data_in=wire.DATA_IN,
        transfer_length=0x11223344,
        path=1,
        target=2,
        lun=3,
        sense_length=20,
        queue_tag=7,
        queue_action=0x20,
        srb_flags=0x55667788,
    )
    assert len(packet) == 64
    assert struct.unpack_from("<III", packet) == (3, 1, 0)
    srb = packet[12:]
    assert struct.unpack_from("<H", srb) == (52,)
    assert list(srb[2:11]) == [0, 0, 0, 1, 2, 3, 16, 20, 1]
    assert struct.unpack_from("<I", srb, 12) == (0x11223344,)
    assert srb[16:32] == bytes(range(1, 17))
    assert list(srb[38:40]) == [7, 0x20]
    assert struct.unpack_from("<III", srb, 40) == (0x55667788, 60, 0)


def test_a_short_request_is_the_beginning_of_a_long_one():
    long = wire.build_srb(b"\x28", data_in=0, transfer_length=512)
    short = wire.build_srb(b"\x28", data_in=0, transfer_length=512, size=48)
    assert short[14:] == long[14:48]
    assert wire.parse_srb_untrusted(short).length == 36
    assert wire.parse_srb_untrusted(short).timeout == 0
    assert wire.parse_srb_untrusted(long).timeout == 60


def test_packets_are_found_inside_larger_data():
    packet = wire.build_packet(wire.BEGIN_INITIALIZATION, b"body")
    data = b"x" * 16 + packet
    assert wire.parse_packet_untrusted(data, 16).body[:4] == b"body"
    assert wire.parse_packet_untrusted(data, 16, 16 + 48) == (7, 1, 0, b"body" + bytes(48))


@pytest.mark.parametrize(
    ("parse", "size"),
    [(wire.parse_packet_untrusted, size) for size in (0, 11, 65, 80)]
    + [
        (parse, size)
        for parse in (wire.parse_srb_untrusted, wire.parse_srb_reply_untrusted)
        for size in (0, 12, 47, 65, 80)
    ],
)
def test_other_sizes_are_refused(parse, size):
    with pytest.raises(GuestProtocolError, match=f"{size} bytes"):
        parse(bytes(size))


def test_a_request_without_parameters_may_be_a_header_only():
    assert wire.parse_packet_untrusted(struct.pack("<III", 8, 1, 0)) == (8, 1, 0, bytes(52))
    assert wire.build_completion(b"ignored", status=5, size=12) == struct.pack("<III", 1, 0, 5)


@pytest.mark.parametrize(
    ("position", "value", "field"),
    [(12 + 8, 0, "cdb_length"), (12 + 8, 17, "cdb_length"), (12 + 10, 3, "data_in")],
)
def test_srbs_that_make_no_sense_are_refused(position, value, field):
    packet = bytearray(wire.build_srb(b"\x00", data_in=2, transfer_length=0))
    packet[position] = value
    with pytest.raises(GuestProtocolError) as caught:
        wire.parse_srb_untrusted(bytes(packet))
    assert caught.value.field == field


def test_an_answer_echoes_the_address_and_cuts_the_sense_data():
    srb = wire.parse_srb_untrusted(
        wire.build_srb(b"\x12", data_in=1, transfer_length=36, path=1, target=1, lun=9)
    )
    raw = wire.build_srb_reply(
        srb, srb_status=0x84, scsi_status=2, transfer_length=5, sense=bytes(range(1, 33))
    )
    assert len(raw) == 64
    reply = wire.parse_srb_reply_untrusted(raw)
    assert reply[:4] == (wire.COMPLETE_IO, 0, 0, 52)
    assert (reply.path, reply.target, reply.lun) == (1, 1, 9)
    assert (reply.sense_length, reply.sense) == (20, bytes(range(1, 21)))
    assert reply.transfer_length == 5
    short = wire.build_srb_reply(srb._replace(sense_length=18), srb_status=0x84, sense=bytes(32))
    assert wire.parse_srb_reply_untrusted(short).sense_length == 18


def test_bodies_go_both_ways():
    properties = wire.build_properties(
        max_channel_count=3, max_transfer_bytes=1 << 20, multi_channel=True
    )
    assert len(properties) == 24
    assert wire.parse_properties_untrusted(properties) == (3, 1, 1 << 20)
    plain = wire.build_properties(max_channel_count=0, max_transfer_bytes=1, multi_channel=False)
    assert wire.parse_properties_untrusted(plain).flags == 0
    assert wire.parse_protocol_version_untrusted(wire.build_protocol_version(0x602)) == (0x602, 0)
    assert wire.parse_sub_channels_untrusted(wire.build_sub_channels(4)) == 4
    ports = wire.FibreChannelData(1, b"p" * 8, b"n" * 8, b"P" * 8, b"N" * 8)
    assert wire.parse_fibre_channel_untrusted(wire.build_fibre_channel(ports)) == ports


def test_short_bodies_are_refused():
    for parse, size in (
        (wire.parse_properties_untrusted, 24),
        (wire.parse_protocol_version_untrusted, 4),
        (wire.parse_sub_channels_untrusted, 2),
        (wire.parse_fibre_channel_untrusted, 36),
    ):
        parse(bytes(size))
        with pytest.raises(GuestProtocolError, match=f"{size - 1} bytes"):
            parse(bytes(size - 1))


def test_completions_have_64_bytes_whatever_they_answer():
    """Checklist row 26."""
    assert len(wire.build_completion()) == 64
    answer = wire.parse_packet_untrusted(wire.build_completion(b"ab", status=0xC0000059))
    assert answer[:3] == (wire.COMPLETE_IO, 0, 0xC0000059)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="53 bytes"):
        wire.build_packet(3, bytes(53))
    with pytest.raises(ValueError, match="do not fit"):
        wire.build_packet(3, size=47)
    with pytest.raises(ValueError, match="17"):
        wire.build_srb(bytes(17), data_in=0, transfer_length=0)
    with pytest.raises(ValueError, match="50"):
        wire.build_srb(bytes(6), data_in=0, transfer_length=0, size=50)


def test_6_1_is_known_and_not_supported():
    assert wire.VERSION_6_1 not in wire.SUPPORTED_VERSIONS
    assert {f"{v >> 8}.{v & 0xFF}" for v in wire.SUPPORTED_VERSIONS} == {
        "2.0",
        "4.2",
        "5.1",
        "6.0",
        "6.2",
    }
    assert wire.OPERATION_NAMES[wire.EXECUTE_SRB] == "EXECUTE_SRB"
