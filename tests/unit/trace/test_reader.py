"""Reading traces: foreign packets, other byte orders, compressed and broken files."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys

import pytest

from tests.support.house import ROOT
from vmbus.errors import TraceError
from vmbus.trace import FileSink, Kind, Record, Trace, TraceWriter, Way, open_trace, reader
from vmbus.trace.pcapng import BYTE_ORDER_MAGIC, INTERFACE, PACKET, SECTION, pack_interface
from vmbus.trace.records import LINKTYPE, pack_record


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.pcapng"
    sink = FileSink(path)
    writer = TraceWriter(sink, guest="alice")
    for text in (b"one", b"two", b"three"):
        writer.put(Record(Kind.NOTE, text, time_ns=5, comment=text.decode()))
    sink.close()
    return path


def notes(trace: Trace) -> list[bytes]:
    return [each.data for each in trace]


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + length + body + length


def section(order: str) -> bytes:
    body = struct.pack(f"{order}IHHQ", BYTE_ORDER_MAGIC, 1, 0, 2**64 - 1)
    return block(order, SECTION, body)


def packet(order: str, interface: int, data: bytes, ticks: int = 0, length: int = 0) -> bytes:
    head = struct.pack(
        f"{order}IIIII", interface, ticks >> 32, ticks & 0xFFFFFFFF, len(data), length or len(data)
    )
    return block(order, PACKET, head + data)


@pytest.mark.parametrize("order", "<>")
def test_other_programs_may_have_written_the_file_anew(order):
    """Records are little-endian in any section; times and lengths are the packets'."""
    microseconds = block(order, INTERFACE, struct.pack(f"{order}HHI", LINKTYPE, 0, 0))
    ethernet = block(order, INTERFACE, struct.pack(f"{order}HHI", 1, 0, 0))
    simple = block(order, 3, struct.pack(f"{order}I", 3) + b"abc")
    record = Record(Kind.PACKET, b"data", relid=5, life=1, number=7)
    file = b"".join((
        section(order), microseconds, ethernet, packet(order, 1, bytes(60)),
        packet(order, 0, pack_record(record), ticks=1_700_000_000_000_001, length=1000),
        packet(order, 0, b"something else"), simple,
    ))  # fmt: skip
    trace = Trace(io.BytesIO(file))
    (found,) = trace
    assert (found.data, found.relid, found.way) == (b"data", 5, Way.NONE)
    assert found.time_ns == 1_700_000_000_000_001_000
    assert found.length == 960
    assert trace.foreign == 3


def test_a_packet_of_an_interface_that_nobody_has_described_is_an_error():
    file = section("<") + packet("<", 0, bytes(60))
    with pytest.raises(TraceError, match="interface 0, of 0"):
        list(Trace(io.BytesIO(file)))


def test_there_are_not_interfaces_without_end(monkeypatch):
    monkeypatch.setattr(reader, "MAX_INTERFACES", 3)
    file = section("<") + pack_interface(147) * 3
    assert list(Trace(io.BytesIO(file))) == []
    assert list(Trace(io.BytesIO(file + file))) == []
    with pytest.raises(TraceError, match="more than 3 interfaces"):
        list(Trace(io.BytesIO(file + pack_interface(147))))


def test_a_file_is_opened_by_name_and_closed(path):
    with open_trace(path) as trace:
        assert notes(trace) == [b"one", b"two", b"three"]
        assert (trace.guest, trace.name, trace.cut) == ("alice", str(path), None)


def test_a_compressed_file_is_read_as_it_is(path):
    whole = gzip.compress(path.read_bytes())
    path.write_bytes(whole)
    with open_trace(path) as trace:
        assert notes(trace) == [b"one", b"two", b"three"]
    path.write_bytes(whole[:-20])
    with open_trace(path) as trace:
        found = notes(trace)
        assert found == [b"one", b"two", b"three"][: len(found)]
        assert trace.cut is not None
    path.write_bytes(whole[:30] + bytes(20) + whole[50:])
    with open_trace(path) as trace, pytest.raises(TraceError, match="compressed data"):
        notes(trace)


def test_a_trace_is_read_from_a_pipe(path):
    program = "from vmbus.trace import open_trace; print(len(list(open_trace('-'))))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=path.read_bytes(), capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.stdout == b"3\n"


def test_an_empty_file_and_none_at_all_are_errors(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="empty is empty"):
        open_trace(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        open_trace(tmp_path / "none")


def test_reading_takes_no_more_memory_for_a_longer_file(tmp_path):
    """4 GiB, most of it a hole: blocks that nobody knows, and one record behind them."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(section("<"))
        length = 1 << 30
        for _ in range(4):
            file.write(struct.pack("<II", 0xBAD, length))
            file.seek(length - 12, os.SEEK_CUR)
            file.write(struct.pack("<I", length))
        file.write(pack_interface(LINKTYPE) + packet("<", 0, pack_record(Record(Kind.NOTE, b"x"))))
    program = (
        "import sys; from vmbus.trace import open_trace\n"
        "print(len(list(open_trace(sys.argv[1]))))\n"
        # Not getrusage: that counts what the process was before it became this program.
        "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True, check=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    count, kib = found.stdout.split()
    assert count == "1"
    assert int(kib) < 300 << 10
