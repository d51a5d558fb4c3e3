"""A queue in which nobody takes another's place."""

from __future__ import annotations

from collections import Counter

import pytest

from netvsp.frames.frame import Frame
from netvsp.switch.queue import OVERHEAD, QUANTUM, FairQueue

ALL = 1 << 30


def make(source: str, length: int = 100) -> Frame:
    return Frame(source.encode().ljust(length, b"."))


def push(queue: FairQueue[str], source: str, frame: Frame) -> int:
    return queue.push(source, frame, len(frame))


def senders(frames: list[Frame]) -> str:
    return "".join(chr(each.head[0]) for each in frames)


def test_what_one_sender_sends_stays_in_order():
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        assert push(queue, "a", Frame(bytes([number]))) == 0
    assert queue.count == 100
    assert [each.head[0] for each in queue.pop(60, ALL)] == list(range(60))
    assert [each.head[0] for each in queue.pop(60, ALL)] == list(range(60, 100))
    assert queue.pop(60, ALL) == []


def test_a_turn_is_for_so_many_bytes_of_each():
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        push(queue, "a", make("a", QUANTUM // 4 - OVERHEAD))
    for _ in range(8):
        push(queue, "b", make("b", QUANTUM // 4 - OVERHEAD))
    assert senders(queue.pop(24, ALL)) == "aaaabbbbaaaabbbbaaaaaaaa"


def test_long_frames_have_no_more_than_short_ones():
    queue: FairQueue[str] = FairQueue(ALL)
    for _ in range(200):
        push(queue, "a", make("a", 60_000))
        for _ in range(50):
            push(queue, "b", make("b", 1500))
    sent: Counter[str] = Counter()
    while sent.total() < 4_000_000:
        for frame in queue.pop(64, 128 << 10):
            sent[chr(frame.head[0])] += len(frame) + OVERHEAD
    assert sent["a"] == pytest.approx(sent["b"], rel=0.1)


def test_one_long_frame_at_a_time_is_no_way_to_have_more():
    queue: FairQueue[str] = FairQueue(ALL)
    for _ in range(4000):
        push(queue, "b", make("b", 1500))
    sent: Counter[str] = Counter()
    push(queue, "a", make("a", 60_000))
    for _ in range(2000):
        for frame in queue.pop(1, ALL):
            name = chr(frame.head[0])
            sent[name] += len(frame) + OVERHEAD
            if name == "a":
                push(queue, "a", make("a", 60_000))
    assert sent["a"] < 1.1 * sent["b"]


def test_a_full_queue_takes_from_whoever_has_most():
    queue: FairQueue[str] = FairQueue(100 * (100 + OVERHEAD))
    assert sum(push(queue, "greedy", make("g")) for _ in range(1000)) == 900
    assert sum(push(queue, "b", make("b")) for _ in range(50)) == 50  # of the greedy one's
    assert push(queue, "b", make("b")) == 1  # its own: it has its half
    assert queue.count == 100
    assert sorted(Counter(senders(queue.pop(1000, ALL))).items()) == [("b", 50), ("g", 50)]


def test_the_longest_line_is_found_wherever_it_is():
    queue: FairQueue[str] = FairQueue(100 * (100 + OVERHEAD))
    for source, count in (("a", 10), ("greedy", 80), ("c", 10)):
        for _ in range(count):
            push(queue, source, make(source[0]))
    for _ in range(20):
        assert push(queue, "late", make("l")) == 1
    found = Counter(senders(queue.pop(1000, ALL)))
    assert found == {"a": 10, "g": 60, "c": 10, "l": 20}


def test_a_long_frame_makes_room_for_itself_or_is_dropped():
    queue: FairQueue[str] = FairQueue(100 * (100 + OVERHEAD))
    for _ in range(100):
        push(queue, "a", make("a"))
    assert push(queue, "b", make("b", 50_000)) == 46
    assert queue.count == 55
    assert push(queue, "b", make("b", 50_000)) == 1
    assert push(queue, "c", make("c", 200_000)) == 1
    assert queue.count == 55


def test_bytes_of_one_call_are_bounded_but_for_the_first_frame():
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        push(queue, "a", make("a", 10_000))
    assert len(queue.pop(64, 5_000)) == 1
    assert len(queue.pop(64, 20_000)) == 2


def test_a_sender_can_be_forgotten_and_all_can():
    queue: FairQueue[str] = FairQueue(100 * (100 + OVERHEAD))
    for _ in range(20):
        push(queue, "a", make("a"))
        push(queue, "b", make("b"))
    queue.forget("a")
    queue.forget("never there")
    assert queue.count == 20
    assert set(senders(queue.pop(5, ALL))) == {"b"}
    queue.clear()
    assert not queue.count
    assert queue.pop(5, ALL) == []
    # Nothing is left that would count.
    assert sum(push(queue, "a", make("a")) for _ in range(100)) == 0
