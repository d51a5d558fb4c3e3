"""No file makes reading raise anything but its own error, or give what is not in it."""

from __future__ import annotations

import io

from hypothesis import given, strategies as st

from vmbus.errors import TraceError
from vmbus.trace import Kind, Record, Trace, TraceWriter, Way
from vmbus.trace.pcapng import (
    Block,
    parse_interface_untrusted,
    parse_packet_untrusted,
    parse_section_untrusted,
    parse_simple_untrusted,
)
from vmbus.trace.records import HEADER_SIZE, parse_record_untrusted

records = st.builds(
    Record,
    st.sampled_from(list(Kind)),
    st.binary(max_size=64),
    way=st.sampled_from(list(Way)),
    time_ns=st.integers(0, 2**62),
    flags=st.integers(0, 7),
    relid=st.integers(0, 2047),
    life=st.integers(0, 3),
    ref=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**32 - 1),
    total=st.integers(0, 2**32 - 1),
    comment=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)


class Memory:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.full = False
        self.data = b""

    def begin(self, time_ns: int) -> None:
        self.full = False

    def write(self, data: bytes, records: int) -> None:
        self.data += data

    def take_lost(self) -> tuple[int, str]:
        return 0, ""


def written(some: list[Record]) -> bytes:
    sink = Memory()
    writer = TraceWriter(sink, guest="alice")
    for each in some:
        writer.put(each)
    return sink.data


def read(data: bytes) -> list[Record]:
    return list(Trace(io.BytesIO(data)))


def attempt(data: bytes) -> None:
    position = 0
    try:
        for each in Trace(io.BytesIO(data)):
            position = each.position
    except TraceError as error:
        position = error.position
    assert 0 <= position <= len(data)


@given(st.lists(records, max_size=8))
def test_records_are_read_as_they_were_written(some):
    found = read(written(some))
    assert found == some
    assert [each.number for each in found] == list(range(1, len(some) + 1))


@given(st.lists(records, min_size=1, max_size=6), st.data())
def test_a_file_that_is_cut_anywhere_has_all_that_is_before_the_cut(some, data):
    whole = written(some)
    end = data.draw(st.integers(1, len(whole)))
    trace = Trace(io.BytesIO(whole[:end]))
    found = list(trace)
    assert found == some[: len(found)]
    assert sum(each.position < end for each in read(whole)) - len(found) in {0, 1}
    if end == len(whole):
        assert len(found) == len(some)
        assert trace.cut is None
    else:
        assert trace.cut is None or trace.cut < end


@given(st.lists(records, max_size=4), st.data())
def test_no_changed_byte_makes_reading_raise_anything_else(some, data):
    whole = bytearray(written(some) or b"\0")
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    attempt(bytes(whole))


@given(st.binary(max_size=200))
def test_any_bytes_behind_a_section_are_read_or_an_error(tail):
    attempt(written([Record(Kind.NOTE)]) + tail)
    attempt(tail)


@given(st.binary(max_size=100), st.sampled_from("<>"))
def test_any_body_of_a_block_is_parsed_or_an_error(body, order):
    block = Block(5, 6, order, body)
    for parse in (
        parse_section_untrusted, parse_interface_untrusted, parse_packet_untrusted,
        parse_simple_untrusted,
    ):  # fmt: skip
        position = 5
        try:
            parse(block)
        except TraceError as error:
            position = error.position
        assert position == 5


@given(st.binary(max_size=HEADER_SIZE + 8), st.booleans())
def test_any_packet_is_a_record_or_an_error(data, magic):
    try:
        found = parse_record_untrusted(b"VMBT\1" + data if magic else data)
    except TraceError:
        return
    assert found.data == (b"VMBT\1" + data)[HEADER_SIZE:]
