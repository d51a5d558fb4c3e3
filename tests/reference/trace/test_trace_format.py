"""The trace format, read a second time: by what the page says, with construct, and by tshark."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import construct as c
import pytest

from tests.reference.trace.make_golden import NAMES, RECORDS, START, make
from vmbus.trace import Record, Way, open_trace

GOLDEN = Path(__file__).parent / "session.pcapng"

OPTIONS = c.RepeatUntil(
    lambda option, _all, _context: option.code == 0,
    c.Struct(
        "code" / c.Int16ul,
        "size" / c.Int16ul,
        "value" / c.Aligned(4, c.Bytes(c.this.size)),
    ),
)
# docs/reference/trace-format.md, "The record".
HEADER = c.Struct(
    "magic" / c.Const(b"VMBT"),
    "version" / c.Const(1, c.Int8ul),
    "kind" / c.Int8ul,
    "flags" / c.Int16ul,
    "relid" / c.Int32ul,
    "life" / c.Int32ul,
    "number" / c.Int64ul,
    "ref" / c.Int64ul,
    "offset" / c.Int32ul,
    "total" / c.Int32ul,
    "data" / c.GreedyBytes,
)
BODIES: dict[int, Any] = {
    0x0A0D0D0A: c.Struct(
        "magic" / c.Const(0x1A2B3C4D, c.Int32ul),
        "version" / c.Const(bytes([1, 0, 0, 0]), c.Bytes(4)),
        "length" / c.Int64sl,
        "options" / OPTIONS,
    ),
    1: c.Struct("link" / c.Const(147, c.Int32ul), "snap" / c.Int32ul, "options" / OPTIONS),
    6: c.Struct(
        "interface" / c.Int32ul,
        "high" / c.Int32ul,
        "low" / c.Int32ul,
        "here" / c.Int32ul,
        "there" / c.Int32ul,
        "record" / c.Aligned(4, c.FixedSized(c.this.here, HEADER)),
        "options" / c.Optional(OPTIONS),
    ),
}
BLOCK = c.Struct(
    "kind" / c.Int32ul,
    "length" / c.Int32ul,
    "body" / c.FixedSized(c.this.length - 12, c.Switch(c.this.kind, BODIES)),
    "again" / c.Int32ul,
)


def value(options: Any, code: int) -> bytes:
    return next((bytes(each.value) for each in options or () if each.code == code), b"")


def test_the_example_is_what_the_writer_makes():
    assert GOLDEN.read_bytes() == make()


def test_the_example_is_read_by_what_the_page_says():
    section, *blocks = c.GreedyRange(BLOCK).parse(GOLDEN.read_bytes())
    assert section.kind == 0x0A0D0D0A
    assert value(section.body.options, 2) == b"alice"
    assert value(section.body.options, 4) == b"vmbus 0.1.0"
    interfaces = [each.body for each in blocks if each.kind == 1]
    assert [value(each.options, 2).decode() for each in interfaces] == list(NAMES)
    assert {value(each.options, 9) for each in interfaces} == {b"\x09"}
    packets = [each.body for each in blocks if each.kind == 6]
    assert len(packets) == len(RECORDS)
    assert all(each.length == each.again for each in blocks)
    for number, (packet, (interface, record)) in enumerate(zip(packets, RECORDS, strict=True), 1):
        found = packet.record
        assert packet.interface == interface
        assert packet.high << 32 | packet.low == START + number * 1000
        assert int.from_bytes(value(packet.options, 2), "little") == record.way
        assert value(packet.options, 1).decode() == record.comment
        assert packet.there - 40 == record.length
        assert Record(
            found.kind, bytes(found.data), way=Way(record.way), flags=found.flags,
            relid=found.relid, life=found.life, number=found.number, ref=found.ref,
            offset=found.offset, total=found.total, length=packet.there - 40,
            time_ns=packet.high << 32 | packet.low, comment=record.comment,
        ) == record  # fmt: skip


def test_the_reader_reads_the_example():
    with open_trace(GOLDEN) as trace:
        assert list(trace) == [record for _, record in RECORDS]
        assert (trace.guest, trace.application) == ("alice", "vmbus 0.1.0")


@pytest.mark.parametrize("tool", ["tshark", "capinfos"])
def test_others_open_it(tool):
    command: list[Any] = {
        "tshark": [
            "tshark", "-r", GOLDEN, "-T", "fields", "-e", "frame.interface_name",
            "-e", "frame.packet_flags_direction", "-e", "frame.len", "-e", "frame.comment",
        ],
        "capinfos": ["capinfos", "-c", "-M", GOLDEN],
    }[tool]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if tool == "capinfos":
        assert f"Number of packets:   {len(RECORDS)}" in found
        return
    assert [line.split("\t") for line in found.splitlines()] == [
        [
            NAMES[interface],
            f"{record.way.value:#010x}" if record.way else "",
            f"{40 + record.length}",
            record.comment,
        ]
        for interface, record in RECORDS
    ]
