"""Guest memory: regions, ranges across them, hot removal, and what cannot be mapped."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from vmbus import memory as memory_module
from vmbus.errors import ConfigError, GuestProtocolError
from vmbus.memory import (
    PAGE_SIZE,
    GuestMemory,
    allocate_memory,
    full_fence,
    is_sealed,
    total_length,
)


def memfd(pages: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE_SIZE)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def add(memory: GuestMemory, pfn: int, pages: int, *, read_only: bool = False) -> None:
    fd = memfd(pages)
    memory.add_region(pfn * PAGE_SIZE, pages * PAGE_SIZE, fd, read_only=read_only)
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Pages 0-1, 2-4 and 8-9 (read-only), every page filled with its number plus 1."""
    memory = GuestMemory()
    add(memory, 2, 3)
    add(memory, 0, 2)
    for pfn in range(5):
        memory.page(pfn)[:] = bytes([pfn + 1]) * PAGE_SIZE
    fd = memfd(2)
    os.pwrite(fd, b"\x09" * PAGE_SIZE + b"\x0a" * PAGE_SIZE, 0)
    memory.add_region(8 * PAGE_SIZE, 2 * PAGE_SIZE, fd, read_only=True)
    os.close(fd)
    yield memory
    memory.close()
    assert memory.drained()


def test_regions_are_in_order_of_address_and_not_of_arrival(memory):
    assert [region.gpa for region in memory.regions] == [0, 2 * PAGE_SIZE, 8 * PAGE_SIZE]
    assert memory.size == 7 * PAGE_SIZE


def test_a_range_that_crosses_regions_comes_in_one_view_per_region(memory):
    views = memory.views(PAGE_SIZE, 3 * PAGE_SIZE)
    assert [len(view) for view in views] == [PAGE_SIZE, 2 * PAGE_SIZE]
    assert b"".join(views) == b"".join(bytes([n]) * PAGE_SIZE for n in (2, 3, 4))
    assert total_length(views) == 3 * PAGE_SIZE


@pytest.mark.parametrize("cut", [1, 7, 8, 4095, 4096, 4097])
def test_every_byte_of_a_crossing_range_is_the_right_one(memory, cut):
    start = 2 * PAGE_SIZE - cut
    data = os.urandom(2 * cut)
    memory.write(start, data)
    assert memory.read(start, 2 * cut) == data
    assert memory.read(start + cut, cut) == data[cut:]
    assert memory.read(start - 1, 1) == (b"\x02" if cut < PAGE_SIZE else b"\x01")[:1]


def test_many_regions_in_any_order_are_one_address_space():
    memory = GuestMemory()
    order = [(7 * n) % 64 for n in range(64)]
    for pfn in order:
        add(memory, pfn, 1)
    data = os.urandom(64 * PAGE_SIZE)
    memory.write(0, data)
    assert memory.read(0, len(data)) == data
    for pfn in order:
        assert memory.read(pfn * PAGE_SIZE, PAGE_SIZE) == data[pfn << 12 : (pfn + 1) << 12]
    assert len(memory.views(0, len(data))) == 64
    memory.close()


def test_an_empty_range_is_empty_wherever_it_is(memory):
    assert memory.views(1 << 60, 0) == []
    assert memory.read(1 << 60, 0) == b""
    memory.write(1 << 60, b"")
    assert memory.contains(1 << 60, 0)


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (5 * PAGE_SIZE, 1),
        (5 * PAGE_SIZE - 1, 2),
        (7 * PAGE_SIZE, 2 * PAGE_SIZE),
        (10 * PAGE_SIZE - 1, 2),
        (0, 6 * PAGE_SIZE),
        (0, 1 << 64),
        (1 << 52, 1),
        ((1 << 52) - 1, 1),
        ((1 << 64) - 1, 1),
        (1 << 76, 8),
        (-1, 1),
    ],
)
def test_a_range_outside_of_memory_is_the_guests_mistake(memory, gpa, length):
    assert not memory.contains(gpa, length)
    with pytest.raises(GuestProtocolError) as caught:
        memory.views(gpa, length)
    assert caught.value.field == "gpa"
    with pytest.raises(GuestProtocolError):
        memory.read(gpa, length)


def test_a_write_that_does_not_fit_writes_nothing(memory):
    with pytest.raises(GuestProtocolError):
        memory.write(5 * PAGE_SIZE - 4, b"12345678")
    assert memory.read(5 * PAGE_SIZE - 4, 4) == b"\5\5\5\5"


def test_pages_by_number(memory):
    assert bytes(memory.page(3)) == b"\4" * PAGE_SIZE
    for pfn in (5, 7, 10, 1 << 40, (1 << 64) - 1):
        with pytest.raises(GuestProtocolError):
            memory.page(pfn)


def test_anything_with_bytes_can_be_written(memory):
    memory.write(0, bytearray(b"abcd"))
    memory.write(4, memoryview(b"efgh").cast("I"))
    assert memory.read(0, 8) == b"abcdefgh"


# -- read-only memory ------------------------------------------------------------------------------


def test_read_only_memory_is_read_and_never_written(memory):
    assert memory.read(8 * PAGE_SIZE, 1) == b"\x09"
    assert bytes(memory.page(9, write=False)) == b"\x0a" * PAGE_SIZE
    calls: tuple[Callable[[], object], ...] = (
        lambda: memory.write(8 * PAGE_SIZE, b"x"),
        lambda: memory.views(9 * PAGE_SIZE, 1, write=True),
        lambda: memory.page(8),
        lambda: memory.gather(0, 1, (8,), write=True),
        lambda: memory.gather(0, 2 * PAGE_SIZE, (8, 9), write=True),
        lambda: memory.gather(0, 2 * PAGE_SIZE, (1, 9), write=True),
    )
    for call in calls:
        with pytest.raises(GuestProtocolError) as caught:
            call()
        assert caught.value.field == "gpa"
    assert memory.contains(8 * PAGE_SIZE, 1)
    assert not memory.contains(8 * PAGE_SIZE, 1, write=True)


def test_a_view_of_read_only_memory_cannot_be_written_by_mistake(memory):
    for view in (
        memory.views(8 * PAGE_SIZE, 4)[0],
        memory.page(8, write=False),
        memory.gather(0, 4, (8,))[0],
    ):
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 0


# -- gathering -------------------------------------------------------------------------------------


def test_neighbouring_pages_are_joined_across_a_page_list(memory):
    views = memory.gather(100, 3 * PAGE_SIZE - 100, (2, 3, 4))
    assert [len(view) for view in views] == [3 * PAGE_SIZE - 100]
    views = memory.gather(100, 3 * PAGE_SIZE, (2, 4, 3, 2))
    assert [len(view) for view in views] == [3996, 4096, 4096, 100]
    assert [view[0] for view in views] == [3, 5, 4, 3]


def test_neighbouring_pages_of_two_regions_are_not_joined(memory):
    assert [len(view) for view in memory.gather(0, 2 * PAGE_SIZE, (1, 2))] == [4096, 4096]


def test_one_page_is_gathered_from_whatever_region_was_used_before(memory):
    for pfn in (0, 4, 8, 1, 9, 2):
        (view,) = memory.gather(5, 10, (pfn,))
        assert bytes(view) == bytes([pfn + 1]) * 10


def test_nothing_is_gathered_from_no_pages(memory):
    assert memory.gather(0, 0, ()) == []
    assert total_length(memory.gather(7, 0, (3,))) == 0


@pytest.mark.parametrize("pfns", [(5,), (0, 5), (5, 0), (4, 5), ((1 << 64) - 1,), (1 << 52, 0)])
def test_gathering_a_page_that_is_not_there_is_the_guests_mistake(memory, pfns):
    with pytest.raises(GuestProtocolError):
        memory.gather(0, len(pfns) * PAGE_SIZE, pfns)


# -- what cannot be mapped -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "size", "offset"),
    [
        (1, PAGE_SIZE, 0),
        (0, PAGE_SIZE - 1, 0),
        (0, PAGE_SIZE, 512),
        (0, 0, 0),
        (0, -PAGE_SIZE, 0),
        (-PAGE_SIZE, PAGE_SIZE, 0),
        (0, PAGE_SIZE, -PAGE_SIZE),
        (1 << 52, PAGE_SIZE, 0),
        ((1 << 52) - PAGE_SIZE, 2 * PAGE_SIZE, 0),
        (0, 5 * PAGE_SIZE, 0),
        (0, PAGE_SIZE, 4 * PAGE_SIZE),
        (0, PAGE_SIZE, 1 << 80),
        (0, 1 << 52, 0),
    ],
)
def test_a_region_that_cannot_be_is_refused(gpa, size, offset):
    memory = GuestMemory()
    fd = memfd(4)
    try:
        with pytest.raises(ConfigError):
            memory.add_region(gpa, size, fd, offset)
        assert memory.regions == ()
    finally:
        os.close(fd)


def test_the_last_page_below_two_to_the_52_is_memory():
    memory = GuestMemory()
    add(memory, (1 << 40) - 1, 1)
    memory.write((1 << 52) - 8, b"the end!")
    assert memory.read((1 << 52) - 8, 8) == b"the end!"
    with pytest.raises(GuestProtocolError):
        memory.read((1 << 52) - 8, 9)
    memory.close()


@pytest.mark.parametrize(
    ("pfn", "pages"), [(2, 1), (2, 3), (3, 1), (4, 1), (4, 4), (1, 1), (1, 2), (7, 2), (0, 100)]
)
def test_a_region_that_overlaps_another_is_refused(memory, pfn, pages):
    before = memory.regions
    fd = memfd(pages)
    try:
        with pytest.raises(ConfigError, match="overlaps"):
            memory.add_region(pfn * PAGE_SIZE, pages * PAGE_SIZE, fd)
    finally:
        os.close(fd)
    assert memory.regions == before


def test_a_region_fits_exactly_into_a_gap(memory):
    add(memory, 5, 3)
    assert memory.contains(0, 10 * PAGE_SIZE)


def test_a_file_that_its_owner_can_truncate_is_refused(tmp_path):
    memory = GuestMemory()
    loose = memfd(1, seals=0)
    grow_only = memfd(1, seals=fcntl.F_SEAL_GROW)
    file = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, PAGE_SIZE)
    try:
        for fd in (loose, grow_only, file, -1, 1 << 20, 1 << 40):
            assert not is_sealed(fd)
            with pytest.raises(ConfigError, match="F_SEAL_SHRINK"):
                memory.add_region(0, PAGE_SIZE, fd)
        for gpa, fd in enumerate((loose, grow_only, file)):
            memory.add_region(gpa * PAGE_SIZE, PAGE_SIZE, fd, trusted=True)
    finally:
        for fd in (loose, grow_only, file):
            os.close(fd)
    memory.close()


def test_a_descriptor_that_cannot_be_mapped_is_refused_even_if_trusted(tmp_path):
    memory = GuestMemory()
    read_end, write_end = os.pipe()
    file = os.open(tmp_path / "memory", os.O_RDONLY | os.O_CREAT)
    os.truncate(tmp_path / "memory", PAGE_SIZE)
    write_sealed = memfd(1, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    try:
        for fd in (read_end, file, write_sealed, -1, 1 << 20, 1 << 40):
            with pytest.raises(ConfigError):
                memory.add_region(0, PAGE_SIZE, fd, trusted=True)
        # To read, two of them are good enough.
        memory.add_region(0, PAGE_SIZE, file, trusted=True, read_only=True)
        memory.add_region(PAGE_SIZE, PAGE_SIZE, write_sealed, read_only=True)
    finally:
        for fd in (read_end, write_end, file, write_sealed):
            os.close(fd)
    memory.close()


def test_a_region_can_be_any_part_of_a_file_and_the_same_part_twice():
    memory = GuestMemory()
    fd = memfd(4)
    memory.add_region(0, PAGE_SIZE, fd, 3 * PAGE_SIZE)
    memory.add_region(PAGE_SIZE, 2 * PAGE_SIZE, fd, 2 * PAGE_SIZE)
    memory.write(10, b"alias")
    assert memory.read(2 * PAGE_SIZE + 10, 5) == b"alias"
    assert os.pread(fd, 5, 3 * PAGE_SIZE + 10) == b"alias"
    os.close(fd)
    memory.write(10, b"after")
    assert memory.read(2 * PAGE_SIZE + 10, 5) == b"after"
    memory.close()


# -- hot removal -----------------------------------------------------------------------------------


def is_mapped(region: object) -> bool:
    mapping: mmap.mmap = region._mapping  # type: ignore[attr-defined]
    return not mapping.closed


def test_a_removed_region_is_gone_for_new_requests_and_stays_for_old_views(memory):
    region = memory.regions[1]
    view = memory.page(3)
    control = memory.page(4).cast("I")
    memory.remove_region(2 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert [each.gpa for each in memory.regions] == [0, 8 * PAGE_SIZE]
    for pfn in (2, 3, 4):
        with pytest.raises(GuestProtocolError):
            memory.page(pfn)
    assert not memory.contains(PAGE_SIZE, 2 * PAGE_SIZE)
    assert not memory.drained()
    assert view[0] == 4
    control[0] = 1
    view.release()
    assert not memory.drained(), "the second view still holds it"
    assert is_mapped(region)
    control.release()
    assert memory.drained()
    assert not is_mapped(region)


def test_a_region_that_nobody_looks_at_is_unmapped_at_once(memory):
    region = memory.regions[0]
    memory.read(0, 100)
    memory.remove_region(0, 2 * PAGE_SIZE)
    assert not is_mapped(region)
    assert memory.drained()


def test_a_region_can_be_added_again_while_the_old_one_is_still_held(memory):
    old = memory.page(0)
    memory.remove_region(0, 2 * PAGE_SIZE)
    add(memory, 0, 2)
    assert memory.read(0, 4) == bytes(4)
    memory.write(0, b"new!")
    assert bytes(old[:4]) == b"\1\1\1\1"
    assert not memory.drained()
    old.release()
    assert memory.drained()


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0, PAGE_SIZE),
        (0, 3 * PAGE_SIZE),
        (PAGE_SIZE, PAGE_SIZE),
        (5 * PAGE_SIZE, PAGE_SIZE),
        (0, 5 * PAGE_SIZE),
    ],
)
def test_only_whole_regions_can_be_removed(memory, gpa, size):
    with pytest.raises(ConfigError, match="nothing is mapped"):
        memory.remove_region(gpa, size)
    assert len(memory.regions) == 3


def test_removal_survives_somebody_who_exports_the_whole_region(memory):
    region = memory.regions[0]
    export = ctypes.c_char.from_buffer(region.view)
    memory.remove_region(0, 2 * PAGE_SIZE)
    assert not memory.drained()
    assert export.value == b"\1"
    del export
    assert memory.drained()
    assert not is_mapped(region)


def test_an_exception_that_is_kept_does_not_keep_memory_mapped(memory):
    kept = []
    attempts: tuple[Callable[[], object], ...] = (
        lambda: memory.views(PAGE_SIZE, 10 * PAGE_SIZE),
        lambda: memory.gather(0, 3 * PAGE_SIZE, (0, 2, 7)),
        lambda: memory.gather(0, 3 * PAGE_SIZE, (0, 2, 8), write=True),
    )
    for attempt in attempts:
        with pytest.raises(GuestProtocolError) as caught:
            attempt()
        kept.append(caught.value)
    memory.close()
    assert memory.drained()
    assert len(kept) == 3


def test_close_can_be_repeated_and_waits_for_nothing(memory):
    view = memory.page(0)
    memory.close()
    memory.close()
    assert memory.regions == ()
    assert memory.size == 0
    assert not memory.drained()
    view.release()
    assert memory.drained()


def test_the_fence_can_be_used_from_many_threads_and_never_stays_locked():
    def spin() -> None:
        for _ in range(2000):
            full_fence()

    threads = [threading.Thread(target=spin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not memory_module._fence_lock.locked()


def test_the_fence_does_not_wait_for_another_thread():
    with memory_module._fence_lock:
        full_fence()
        assert memory_module._fence_lock.locked()


@pytest.mark.parametrize("pfns", [(), (0,), (2, 0, 1), (4, 2, 3, 2), (1, 2), (0, 4, 8)])
def test_pages_are_proven_to_be_memory_in_any_order(memory, pfns):
    memory.check_pages(pfns)


@pytest.mark.parametrize(
    "pfns", [(5,), (0, 5), (5, 0), (4, 5, 1), (3, 1 << 52), ((1 << 64) - 1, 2)]
)
def test_a_page_among_others_that_is_not_there_is_found(memory, pfns):
    with pytest.raises(GuestProtocolError, match="is not memory"):
        memory.check_pages(pfns)


@pytest.mark.parametrize("pfns", [(8,), (9, 8), (0, 8), (8, 4, 1)])
def test_a_page_among_others_that_cannot_be_written_is_found(memory, pfns):
    memory.check_pages(pfns)
    with pytest.raises(GuestProtocolError, match="read-only"):
        memory.check_pages(pfns, write=True)


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("offset", [0, 1, 4095])
@pytest.mark.parametrize("short", [0, 1, 4095])
def test_scattered_pages_of_one_region_begin_and_end_where_they_are_told(count, offset, short):
    memory = allocate_memory(100 * PAGE_SIZE)
    pfns = tuple(range(2 * count - 2, -1, -2))
    for pfn in pfns:
        memory.write(pfn * PAGE_SIZE, bytes([pfn]) * PAGE_SIZE)
    whole = b"".join(bytes([pfn]) * PAGE_SIZE for pfn in pfns)
    views = memory.gather(offset, len(whole) - offset - short, pfns, write=True)
    assert len(views) == count
    assert b"".join(views) == whole[offset : len(whole) - short]
    del views
    memory.close()
