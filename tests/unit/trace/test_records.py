"""Records as the bytes of a packet."""

from __future__ import annotations

import pytest

from vmbus.errors import TraceError
from vmbus.trace.records import (
    HEADER_SIZE,
    MAX_DATA,
    Kind,
    Record,
    Way,
    channel_interface,
    pack_record,
    parse_record_untrusted,
)

RECORD = Record(
    Kind.MEMORY, b"bytes", flags=5, relid=7, life=2, number=9, ref=2**64 - 1, offset=3, total=8
)


def test_a_record_is_read_as_it_was_written():
    data = pack_record(RECORD)
    assert len(data) == HEADER_SIZE + 5
    found = parse_record_untrusted(data, 123)
    assert found == RECORD
    assert found.position == 123
    assert found != Record(Kind.MEMORY, b"bytez")
    assert found != b"bytes"


def test_a_kind_of_later_days_is_a_record_too():
    found = parse_record_untrusted(pack_record(Record(200, b"?")))
    assert found.kind_name == "KIND_200"
    assert repr(Record(Kind.PACKET, bytes(8), relid=5, life=1, number=4)) == (
        "<Record 4 PACKET 5.1 8 bytes>"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (pack_record(RECORD)[: HEADER_SIZE - 1], "no record"),
        (b"VMBX" + bytes(40), "no record"),
        (b"VMBT\2" + bytes(40), "version 2"),
    ],
)
def test_what_is_no_record_is_an_error_with_its_position(data, text):
    with pytest.raises(TraceError, match=text) as error:
        parse_record_untrusted(data, 99)
    assert error.value.position == 99


def test_interfaces_are_named_for_people_and_records_fit_into_wireshark():
    assert channel_interface(5, 2, "scsi") == "vmbus:channel/5.2/scsi"
    assert HEADER_SIZE + MAX_DATA < 262_144
    assert (Way.TO_HOST, Way.TO_GUEST) == (1, 2)
