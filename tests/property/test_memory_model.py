"""Guest memory against a dictionary of pages."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmbus.errors import ConfigError, GuestProtocolError
from vmbus.memory import PAGE_SIZE, GuestMemory, create_memfd, total_length

PAGES = 24
"""Addresses used, in pages; some of them are holes."""


def map_pages(memory: GuestMemory, pfn: int, count: int) -> None:
    fd = create_memfd("test", count * PAGE_SIZE)
    try:
        memory.add_region(pfn * PAGE_SIZE, count * PAGE_SIZE, fd)
    finally:
        os.close(fd)


def patterned() -> tuple[GuestMemory, dict[int, bytes]]:
    """Regions of 1 to 5 pages with holes between some, and what every page holds."""
    memory = GuestMemory()
    for pfn, count in ((0, 1), (1, 3), (6, 5), (11, 1), (12, 2), (20, 4)):
        map_pages(memory, pfn, count)
    pages = {}
    for region in memory.regions:
        for pfn in range(region.gpa // PAGE_SIZE, region.end // PAGE_SIZE):
            pages[pfn] = (pfn.to_bytes(4, "little") + os.urandom(60)) * 64
            memory.write(pfn * PAGE_SIZE, pages[pfn])
    return memory, pages


MEMORY, CONTENT = patterned()


@st.composite
def gpa_ranges(draw) -> tuple[int, int, tuple[int, ...]]:
    offset = draw(st.integers(0, 4095) | st.sampled_from([0, 1, 4095]))
    count = draw(st.integers(1, 6 * PAGE_SIZE) | st.sampled_from([1, 4096, 8192]))
    needed = -(-(offset + count) // PAGE_SIZE)
    runs = draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(CONTENT)), st.integers(1, needed)),
            min_size=needed,
            max_size=needed,
        )
    )
    pfns: list[int] = []
    for start, length in runs:
        pfns += [pfn for pfn in range(start, start + length) if pfn in CONTENT]
    return offset, count, tuple(pfns[:needed])


@given(gpa_ranges(), st.booleans())
@settings(max_examples=300)
def test_gathering_gives_the_bytes_that_page_by_page_copying_gives(case, write):
    offset, count, pfns = case
    expected = b"".join(CONTENT[pfn] for pfn in pfns)[offset : offset + count]
    views = MEMORY.gather(offset, count, pfns, write=write)
    assert total_length(views) == count == len(expected)
    assert b"".join(views) == expected
    assert all(len(view) for view in views)


@given(gpa_ranges())
@settings(max_examples=300)
def test_gathering_joins_all_that_can_be_joined(case):
    offset, count, pfns = case
    ends = {region.end // PAGE_SIZE for region in MEMORY.regions}
    breaks = sum(1 for one, two in itertools.pairwise(pfns) if two != one + 1 or two in ends)
    assert len(MEMORY.gather(offset, count, pfns)) == breaks + 1


@given(st.integers(-1, 26 * PAGE_SIZE), st.integers(1, 26 * PAGE_SIZE))
@settings(max_examples=300)
def test_a_range_is_read_if_all_its_pages_are_there_and_refused_otherwise(gpa, length):
    first, last = gpa // PAGE_SIZE, (gpa + length - 1) // PAGE_SIZE
    there = all(pfn in CONTENT for pfn in range(first, last + 1))
    assert MEMORY.contains(gpa, length) is there
    if there:
        flat = b"".join(CONTENT[pfn] for pfn in range(first, last + 1))
        start = gpa - first * PAGE_SIZE
        assert MEMORY.read(gpa, length) == flat[start : start + length]
    else:
        with pytest.raises(GuestProtocolError):
            MEMORY.read(gpa, length)


@given(
    st.integers(0, 4095),
    st.integers(0, 1 << 33),
    st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, PAGES), max_size=6),
    st.booleans(),
)
def test_any_page_list_is_gathered_or_refused(offset, count, pfns, write):
    needed = -(-(offset + count) // PAGE_SIZE)
    pfns = pfns[:needed]
    count = min(count, max(len(pfns) * PAGE_SIZE - offset, 0))
    try:
        views = MEMORY.gather(offset, count, pfns, write=write)
    except GuestProtocolError:
        assert not set(pfns) <= set(CONTENT)
        return
    assert total_length(views) == (count if pfns else 0)


class MemoryMachine(RuleBasedStateMachine):
    """Regions come and go while views of them are held."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = GuestMemory()
        self.bytes: dict[int, bytearray] = {}
        self.mapped: dict[int, int] = {}
        self.held: list[tuple[memoryview, int]] = []
        self.generation = 0
        self.owner: dict[int, int] = {}
        self.removed: set[int] = set()

    @rule(pfn=st.integers(0, PAGES), count=st.integers(1, 6))
    def add(self, pfn, count):
        wanted = range(pfn, pfn + count)
        if any(each in self.bytes for each in wanted):
            with pytest.raises(ConfigError):
                map_pages(self.memory, pfn, count)
            return
        map_pages(self.memory, pfn, count)
        self.generation += 1
        self.mapped[pfn] = count
        self.owner[pfn] = self.generation
        for each in wanted:
            self.bytes[each] = bytearray(PAGE_SIZE)

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def remove(self, data):
        pfn = data.draw(st.sampled_from(sorted(self.mapped)))
        count = self.mapped.pop(pfn)
        self.memory.remove_region(pfn * PAGE_SIZE, count * PAGE_SIZE)
        self.removed.add(self.owner.pop(pfn))
        for each in range(pfn, pfn + count):
            del self.bytes[each]

    @rule(gpa=st.integers(0, (PAGES + 6) * PAGE_SIZE), data=st.binary(min_size=1, max_size=9000))
    def write(self, gpa, data):
        touched = range(gpa // PAGE_SIZE, (gpa + len(data) - 1) // PAGE_SIZE + 1)
        if all(each in self.bytes for each in touched):
            self.memory.write(gpa, data)
            for position, byte in enumerate(data, gpa):
                self.bytes[position // PAGE_SIZE][position % PAGE_SIZE] = byte
        else:
            with pytest.raises(GuestProtocolError):
                self.memory.write(gpa, data)

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def hold(self, data):
        pfn = data.draw(st.sampled_from(sorted(self.mapped)))
        view = self.memory.page(pfn)
        self.held.append((view, self.owner[pfn]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.held.pop(index)[0].release()

    @invariant()
    def every_page_holds_what_was_written(self):
        for pfn in range(PAGES + 6):
            if pfn in self.bytes:
                assert self.memory.page(pfn) == self.bytes[pfn]
            else:
                assert not self.memory.contains(pfn * PAGE_SIZE, 1)
        assert self.memory.size == len(self.bytes) * PAGE_SIZE

    @invariant()
    def removed_regions_are_drained_when_nobody_holds_a_view(self):
        still = any(owner in self.removed for _view, owner in self.held)
        assert self.memory.drained() is not still

    def teardown(self) -> None:
        for view, _owner in self.held:
            view.release()
        self.memory.close()
        assert self.memory.drained()


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
