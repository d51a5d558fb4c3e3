"""What a demo remembers: phases, digests, images compared."""

from __future__ import annotations

import json

import pytest

from storvsp.demo.trial import GRAIN, fingerprint
from tests.support.demo_report import DISK, phase, report_of
from vmbus.cli.demo_report import DiskReport, Images, Problem, Report, file_digest, size_option


def test_the_report_keeps_what_the_guest_tells():
    report = report_of(
        DISK,
        {"event": "progress", **{k: v for k, v in phase("write").items() if k != "event"}},
        phase("write"),
        phase("mixed", requests=0, bytes=0),
        {"event": "contents", "address": "0:0:0", "when": "after", "digest": "ab"},
        {"event": "ready", "action": "add"},
        {"event": "verified", "address": "0:0:0", "unmapped": 4096},
        {"event": "gone", "address": "0:0:0"},
        {"event": "left", "interrupts": 1, "signals": 2},
    )
    disk = report.disks["0:0:0"]
    assert (disk.backend, disk.verified, disk.unmapped, disk.gone) == ("RamDisk", True, 4096, True)
    assert disk.digests == {"after": "ab"}
    assert disk.rate("write", "bytes") == 81920
    assert disk.rate("mixed", "requests") is None
    assert disk.rate("read", "bytes") is None
    assert disk.total("write", "read") == 40960
    assert (report.total("requests"), report.total("bytes")) == (10, 40960)
    assert report.ok
    report.take({"event": "problem", "where": "guest", "text": "no"})
    assert report.problems == [Problem("guest", "no")]
    assert not report.ok
    document = report.as_json()
    json.dumps(document)
    assert document["disks"][0]["phases"]["write"]["requests"] == 10


def test_both_sides_agree_what_a_digest_is(tmp_path):
    data = bytes(range(256)) * 40
    path = tmp_path / "file"
    path.write_bytes(data)
    prints = [fingerprint(data[start : start + GRAIN]) for start in range(0, 8192, GRAIN)]
    assert file_digest(path, 8192) == fingerprint(b"".join(prints)).hex()


@pytest.mark.parametrize(("size", "text"), [(32 << 20, "32M"), ((1 << 20) + 4096, "1028K")])
def test_sizes_are_written_as_options_take_them(size, text):
    assert size_option(size) == text


def test_files_are_compared_with_what_the_guest_has_seen(tmp_path):
    images = Images(tmp_path, 1 << 20)
    images.make()
    images.raw.write_bytes(bytes(1 << 20))
    paths = {"0:0:1": images.raw, "0:0:2": images.base, "0:0:3": images.cd}
    report = Report()
    for address, path in paths.items():
        digest = file_digest(path, 1 << 20)
        report.disks[address] = DiskReport(
            address, "-", {"used": 1 << 20}, digests={"before": digest, "after": digest}
        )
    assert images.compare(report) == [
        "disk.img holds what was written",
        "base.img showed through the overlay",
        "cd.iso was read as it is",
        "base.img is unchanged",
    ]
    assert not report.problems
    for path in paths.values():
        with path.open("r+b") as file:
            file.seek(70000)
            file.write(b"?!?")
    assert images.compare(report) == []
    assert [problem.where for problem in report.problems] == ["0:0:1", "0:0:2", "0:0:3", "0:0:2"]
