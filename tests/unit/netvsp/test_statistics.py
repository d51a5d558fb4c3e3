"""Counters: kinds of frames, and what people are shown."""

from __future__ import annotations

import json

from netvsp.frames.frame import Frame
from netvsp.statistics import AdapterStatistics, Direction
from tests.support.net_guest import MAC


def test_frames_are_counted_by_where_they_go():
    found = Direction()
    for target, length in ((MAC, 60), (MAC, 61), (b"\x01\x00\x5e\0\0\1", 62), (b"\xff" * 6, 63),
                           (b"\xff" * 5 + b"\xfe", 64)):  # fmt: skip
        found.count(Frame(target.ljust(length, b"\0")))
    assert found.frames == [2, 2, 1]
    assert found.bytes == [121, 126, 63]
    assert (found.total_frames, found.total_bytes) == (5, 310)


def test_a_frame_counts_the_same_wherever_its_tag_travels():
    inside, beside = Direction(), Direction()
    frame = Frame(MAC + MAC + b"\x81\x00\x00\x05\x08\x00" + bytes(46))
    inside.count(frame)
    beside.count(frame.untagged())
    for each, others in ((inside, [frame]), (beside, [frame.untagged()])):
        each.count_all(others)
        assert each.bytes == [128, 0, 0]


def test_a_description_is_json():
    found = Direction()
    found.count(Frame(b"\xff" * 60))
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
