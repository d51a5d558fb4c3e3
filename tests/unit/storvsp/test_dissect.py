"""vstor and SCSI in words."""

from __future__ import annotations

import pytest

from storvsp.dissect import StorvspDissector
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    CREATE_SUB_CHANNELS,
    DATA_IN,
    DATA_NONE,
    QUERY_PROTOCOL_VERSION,
    VERSION_6_2,
    build_packet,
    build_protocol_version,
    build_srb,
    build_srb_reply,
    parse_srb_untrusted,
)
from vmbus.dissect import RingPacket
from vmbus.errors import GuestProtocolError
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, IN_BAND

READ = build_srb(
    bytes.fromhex("28000000000800000800"), data_in=DATA_IN, transfer_length=4096, lun=3
)


def lines(payload: bytes, request: bytes | None = None, *, kind: int = IN_BAND) -> list[str]:
    packet = RingPacket(kind != COMPLETION, kind, 1, 7, payload, request)
    return [each.summary for each in StorvspDissector().packet_untrusted(packet)]


def answer(**values) -> bytes:
    return build_srb_reply(parse_srb_untrusted(READ), size=64, **values)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (READ, ["EXECUTE_SRB", "0:0:3 READ(10) LBA 8, 8 blocks, 4096 bytes in"]),
        (
            build_srb(bytes(6), data_in=DATA_NONE, transfer_length=0),
            ["EXECUTE_SRB", "0:0:0 TEST UNIT READY"],
        ),
        (build_packet(BEGIN_INITIALIZATION, b""), ["BEGIN_INITIALIZATION"]),
        (
            build_packet(QUERY_PROTOCOL_VERSION, build_protocol_version(VERSION_6_2)),
            ["QUERY_PROTOCOL_VERSION 6.2"],
        ),
        (build_packet(CREATE_SUB_CHANNELS, b"\x03\0"), ["CREATE_SUB_CHANNELS 3"]),
        (build_packet(77, b""), ["operation 77"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_request_says_what_is_wanted(payload, said):
    assert lines(payload, kind=GPA_DIRECT) == said


def test_an_answer_says_of_what_and_how_it_ended():
    good = answer(srb_status=1, transfer_length=4096)
    assert lines(good, READ, kind=COMPLETION) == ["COMPLETE_IO", "READ(10) GOOD, 4096 bytes"]
    sense = bytes.fromhex("700005000000000a00000000210000000000")
    bad = answer(srb_status=0x84, scsi_status=2, sense=sense, transfer_length=0)
    assert lines(bad, READ, kind=COMPLETION) == [
        "COMPLETE_IO", "READ(10) CHECK CONDITION, SRB 0x84, sense 5/21/00",
    ]  # fmt: skip
    odd = answer(srb_status=6, scsi_status=0x99, transfer_length=0, status=0xC0000010)
    assert lines(odd, READ, kind=COMPLETION) == [
        "COMPLETE_IO, NTSTATUS 0xc0000010", "READ(10) status 0x99, SRB 0x06",
    ]  # fmt: skip


def test_an_answer_without_its_request_is_an_answer():
    good = answer(srb_status=1, transfer_length=4096)
    assert lines(good, kind=COMPLETION) == ["COMPLETE_IO"]
    begin = build_packet(BEGIN_INITIALIZATION, b"")
    assert lines(good, begin, kind=COMPLETION) == ["COMPLETE_IO of BEGIN_INITIALIZATION"]


def test_memory_is_that_of_its_command():
    dissector = StorvspDissector()
    (layer,) = dissector.memory_untrusted(b"x", 1, READ)
    assert layer.summary == "data of READ(10)"
    assert dissector.memory_untrusted(b"x", 1, None) == []
    assert dissector.memory_untrusted(b"x", 1, build_packet(BEGIN_INITIALIZATION, b"")) == []


def test_what_is_no_packet_of_vstor_is_refused():
    with pytest.raises(GuestProtocolError):
        lines(bytes(8))
