"""Files that follow each other, full disks, and a ring."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

import pytest

from vmbus.trace import FileSink, Kind, RingSink, Trace, TraceWriter, Way, open_trace, sinks


def put(writer: TraceWriter, count: int, size: int = 1000) -> None:
    for _ in range(count):
        writer.write(
            Kind.PACKET, Way.TO_HOST, 5, 1, bytes(size), time_ns=(writer.number + 1) * 10**9
        )


def numbers(path: Path) -> list[int]:
    with open_trace(path) as trace:
        found = [each.number for each in trace]
        assert trace.cut is None
    return found


def test_a_file_is_its_owners_and_has_all(tmp_path):
    path = tmp_path / "a.pcapng"
    sink = FileSink(path)
    put(TraceWriter(sink), 200)
    sink.close()
    sink.close()
    assert numbers(path) == list(range(1, 201))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (sink.records, sink.lost, sink.failure) == (200, 0, "")


def test_little_is_lost_if_nobody_closes_it(tmp_path):
    path = tmp_path / "a.pcapng"
    sink = FileSink(path)
    put(TraceWriter(sink), 200)
    assert len(numbers(path)) > 200 - sinks.BUFFER // 1000
    sink.flush()
    assert len(numbers(path)) == 200
    sink.close()


def test_files_follow_each_other_by_size_and_the_oldest_go(tmp_path):
    sink = FileSink(tmp_path / "a.pcapng", size=1, files=2)
    put(TraceWriter(sink), 200)
    sink.close()
    found = sorted(tmp_path.iterdir())
    assert [each.name for each in found] == ["a.0002.pcapng", "a.0003.pcapng"]
    assert [number for each in found for number in numbers(each)] == list(
        range(numbers(found[0])[0], 201)
    )
    assert found[0].stat().st_size < sinks.MIN_ROTATION + 2000


def test_files_follow_each_other_by_time(tmp_path):
    sink = FileSink(tmp_path / "a.pcapng", span=10)
    writer = TraceWriter(sink)
    put(writer, 5)
    sink.look_at_clock(10 * 10**9)
    put(writer, 5)
    sink.look_at_clock(11 * 10**9)
    put(writer, 5)
    sink.close()
    assert numbers(tmp_path / "a.pcapng") == list(range(1, 11))
    assert numbers(tmp_path / "a.0001.pcapng") == list(range(11, 16))


def test_a_full_disk_costs_a_gap_and_not_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.pcapng"
    sink = FileSink(path)
    writer = TraceWriter(sink)
    put(writer, 10)
    sink.flush()
    write = os.write
    left = [3000]

    def write_a_little(file: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", write_a_little)
    put(writer, 90)
    assert sink.lost
    assert sink.failure == "No space left on device"
    monkeypatch.undo()
    put(writer, 10)
    sink.close()

    with open_trace(path) as trace:
        found = list(trace)
    gaps = [each for each in found if each.kind == Kind.GAP]
    assert sum(each.ref for each in gaps) == sink.lost
    assert b"No space left on device" in {each.data for each in gaps}
    assert sum(each.kind == Kind.PACKET for each in found) + sink.lost == 110
    assert found[-1].number == writer.number
    assert trace.cut is None


def test_half_a_block_in_a_pipe_is_said():
    reading, writing = os.pipe()
    sink = FileSink(f"/proc/self/fd/{writing}")
    os.set_blocking(sink._file, False)
    put(TraceWriter(sink), 200)
    assert sink.failure == "half a block is in a pipe"
    os.read(reading, 1 << 20)
    put(TraceWriter(sink), 200)
    assert sink.lost > 200, "what follows would be taken for the rest of that block"
    for each in (reading, writing):
        os.close(each)
    sink.close()


def test_a_next_file_that_cannot_be_made_lets_the_old_one_go_on(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    sink = FileSink(folder / "a.pcapng", size=1)
    writer = TraceWriter(sink)
    put(writer, 50)
    file = os.open(folder / "a.pcapng", os.O_RDONLY)
    (folder / "a.pcapng").unlink()
    folder.rmdir()
    put(writer, 50)
    sink.close()
    with open(file, "rb") as left:
        assert [each.number for each in Trace(left)] == list(range(1, 101))


def test_a_file_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileSink(tmp_path / "no" / "a.pcapng")


def test_a_ring_has_the_end_of_a_trace(tmp_path):
    sink = RingSink(2 << 20)
    writer = TraceWriter(sink)
    put(writer, 5000)
    assert len(sink) <= 2 << 20
    path = tmp_path / "a.pcapng"
    assert sink.save(path) == path.stat().st_size == len(sink)
    found = numbers(path)
    assert found == list(range(found[0], 5001))
    assert len(found) > 1700
    assert sink.take_lost() == (0, "")
    put(writer, 1)
    assert len(list(Trace(io.BytesIO(b"".join(sink.pieces()))))) == len(found) + 1


def test_a_small_ring_has_something(tmp_path):
    sink = RingSink(1)
    put(TraceWriter(sink), 500)
    assert 0 < len(sink) <= 2 * sinks.MIN_ROTATION
