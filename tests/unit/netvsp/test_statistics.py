"""Counters: kinds of frames, and what people are shown."""

from __future__ import annotations

import json

from netvsp.statistics import AdapterStatistics, Direction
from tests.support.net_guest import MAC


def test_frames_are_counted_by_where_they_go():
    found = Direction()
    for target, length in ((MAC, 60), (MAC, 61), (b"\x01\x00\x5e\0\0\1", 62), (b"\xff" * 6, 63),
                           (b"\xff" * 5 + b"\xfe", 64)):  # fmt: skip
        found.count(target + bytes(8), length)
    assert found.frames == [2, 2, 1]
    assert found.bytes == [121, 126, 63]
    assert (found.total_frames, found.total_bytes) == (5, 310)


def test_a_description_is_json():
    found = Direction()
    found.count(b"\xff" * 6, 60)
    found.dropped["spoofed"] += 2
    found.segments, found.checksums, found.errors = 3, 4, 5
    assert json.loads(json.dumps(found.describe())) == {
        "frames": 1,
        "bytes": 60,
        "multicast": 0,
        "broadcast": 1,
        "segments": 3,
        "checksums": 4,
        "errors": 5,
        "dropped": {"spoofed": 2},
    }
    both = AdapterStatistics()
    assert both.transmit is not both.receive
