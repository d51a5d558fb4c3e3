"""Records go into sections, whose interfaces are described before they are used."""

from __future__ import annotations

import io

import pytest

from vmbus.trace import Kind, Record, RingSink, Trace, TraceWriter, Way, writer
from vmbus.trace.pcapng import INTERFACE, PACKET, SECTION, blocks_untrusted


class Memory:
    """A sink that keeps all, and loses what it is told to."""

    def __init__(self) -> None:
        self.full = False
        self.data = b""
        self.lost = 0
        self.begun: list[int] = []

    def begin(self, time_ns: int) -> None:
        self.full = False
        self.begun.append(time_ns)

    def write(self, data: bytes, records: int) -> None:
        self.data += data

    def take_lost(self) -> tuple[int, str]:
        lost, self.lost = self.lost, 0
        return lost, "the disk is full"


@pytest.fixture
def sink() -> Memory:
    return Memory()


def kinds(data: bytes) -> list[int]:
    return [each.kind for each in blocks_untrusted(io.BytesIO(data))]


def test_an_interface_is_described_when_it_is_used_first(sink):
    writer = TraceWriter(sink, guest="alice", application="a test")
    for _ in range(2):
        writer.write(Kind.MESSAGE, Way.TO_HOST, 0, 0, b"message", time_ns=5)
    writer.write(Kind.SIGNAL, Way.TO_GUEST, 3, 1, b"", time_ns=6, ref=1)

    assert kinds(sink.data) == [SECTION, INTERFACE, PACKET, PACKET, INTERFACE, PACKET]
    trace = Trace(io.BytesIO(sink.data))
    assert [each.number for each in trace] == [1, 2, 3]
    assert (trace.guest, trace.application) == ("alice", "a test")
    assert [each.name for each in trace.interfaces] == ["vmbus:control", "vmbus:signals"]
    assert sink.begun == [5]


def test_each_life_of_a_channel_has_an_interface(sink):
    writer = TraceWriter(sink)
    assert writer.open_channel(5, "scsi", "SCSI controller") == 1
    writer.write(Kind.OPEN, Way.NONE, 5, 1, b"{}", time_ns=1)
    writer.write(Kind.PACKET, Way.TO_HOST, 5, 1, b"packet", time_ns=2)
    writer.close_channel(5, 1)
    assert writer.open_channel(5, "nic") == 2
    writer.write(Kind.PACKET, Way.TO_HOST, 5, 2, b"packet", time_ns=3)
    writer.name_channel(6, 4, "nic")
    assert writer.open_channel(6, "scsi") == 5
    writer.write(Kind.RAW, Way.TO_HOST, 7, 1, b"what", time_ns=3)

    trace = Trace(io.BytesIO(sink.data))
    assert [(each.relid, each.life) for each in trace] == [(5, 1), (5, 1), (5, 2), (7, 1)]
    assert [(each.name, each.description) for each in trace.interfaces] == [
        ("vmbus:channel/5.1/scsi", "SCSI controller"),
        ("vmbus:channel/5.2/nic", ""),
        ("vmbus:channel/7.1/unknown", ""),
    ]


def test_a_section_stands_by_itself(sink):
    writer = TraceWriter(sink, guest="alice")
    writer.open_channel(5, "scsi")
    writer.write(Kind.PACKET, Way.TO_HOST, 5, 1, b"one", time_ns=1)
    sink.full, first = True, len(sink.data)
    writer.write(Kind.PACKET, Way.TO_HOST, 5, 1, b"two", time_ns=2)

    trace = Trace(io.BytesIO(sink.data[first:]))
    (found,) = trace
    assert (found.number, found.data, trace.guest) == (2, b"two", "alice")
    assert trace.interfaces[0].name == "vmbus:channel/5.1/scsi"


def test_no_section_has_more_interfaces_than_readers_take(sink, monkeypatch):
    monkeypatch.setattr(writer, "SECTION_INTERFACES", 3)
    made = TraceWriter(sink)
    for relid in range(1, 9):
        made.write(Kind.PACKET, Way.TO_HOST, relid, 1, b"", time_ns=relid)
    assert kinds(sink.data).count(SECTION) == 3
    assert [each.relid for each in Trace(io.BytesIO(sink.data))] == list(range(1, 9))


def test_what_was_lost_is_said_where_it_is_missing(sink):
    writer = TraceWriter(sink)
    writer.write(Kind.NOTE, Way.NONE, 0, 0, b"one", time_ns=1)
    sink.lost = 7
    writer.write(Kind.NOTE, Way.NONE, 0, 0, b"two", time_ns=2)
    writer.gap(3, "nobody looked", 3)

    found = list(Trace(io.BytesIO(sink.data)))
    assert [(each.kind, each.ref, each.data) for each in found] == [
        (Kind.NOTE, 0, b"one"),
        (Kind.GAP, 7, b"the disk is full"),
        (Kind.NOTE, 0, b"two"),
        (Kind.GAP, 3, b"nobody looked"),
    ]
    assert found[1].comment == "7 records are missing: the disk is full"
    assert [each.number for each in found] == [1, 2, 3, 4]


def test_a_gap_may_come_first(sink):
    TraceWriter(sink).gap(3, "late", 9)
    (found,) = Trace(io.BytesIO(sink.data))
    assert (found.ref, found.time_ns) == (3, 9)


def test_a_record_that_has_a_number_keeps_it(sink):
    writer = TraceWriter(sink)
    for number in (5, 0, 90):
        writer.put(Record(Kind.NOTE, number=number, time_ns=1, length=7, comment="x" * 9999))
    found = list(Trace(io.BytesIO(sink.data)))
    assert [each.number for each in found] == [5, 6, 90]
    assert {(each.length, len(each.comment)) for each in found} == {(7, 4096)}


def test_a_comment_that_is_cut_is_still_text():
    sink = RingSink(1 << 20)
    TraceWriter(sink).put(Record(Kind.NOTE, comment="x" + "ü" * 4096))
    data = b"".join(sink.pieces())
    (found,) = Trace(io.BytesIO(data))
    assert found.comment == "x" + "ü" * 2047
