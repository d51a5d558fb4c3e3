"""What is said of several outer machines at once."""

from __future__ import annotations

from tests.guest.rig.outer import _ready

TEST = b"tests/guest/test_boot.py::test_it_boots PASSED [ 50%]\n"


def test_only_whole_lines_are_said():
    assert _ready(TEST + b"tests/guest/test_boot.py::test") == len(TEST)
    assert _ready(b"tests/guest") == 0


def test_a_summary_is_said_in_one_piece():
    start = b"=== test session starts ===\n"
    assert _ready(start + TEST) == len(start + TEST)
    for heading in (b"FAILURES ====", b"ERRORS ====", b"slowest 10 durations ==", b"3 passed =="):
        assert _ready(start + TEST + b"====== " + heading + b"\nmore\n") == len(start + TEST)
