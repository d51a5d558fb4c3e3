"""Cutting scatter lists, joining extents, keeping watchers, naming errors."""

import errno

import pytest
from hypothesis import given, strategies as st

from storvsp.disk import (
    DiskUnavailableError,
    Extent,
    MediumError,
    NoSpaceError,
    OutOfRangeError,
    ReadOnlyError,
    disk_errors,
)
from storvsp.disks.buffers import check_range, merge_extents
from vmbus.memory import total_length, window
from vmbus.watchers import Watchers


@given(st.lists(st.binary(max_size=6), max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_a_cut_of_a_scatter_list_is_a_slice_of_its_bytes(parts, start, length):
    buffers = [memoryview(bytearray(part)) for part in parts]
    whole = b"".join(parts)
    pieces = window(buffers, start, length)
    assert b"".join(pieces) == whole[start : start + length]
    assert total_length(pieces) == len(whole[start : start + length])
    assert total_length(buffers) == len(whole)


def test_a_cut_is_the_same_memory():
    memory = bytearray(8)
    view = memoryview(memory)
    for piece in window([view[:3], view[3:]], 2, 3):
        piece[:] = b"x" * len(piece)
    assert memory == b"\0\0xxx\0\0\0"


def test_ranges_up_to_the_end_are_inside():
    check_range(0, 512, 512)
    check_range(512, 0, 512)
    with pytest.raises(OutOfRangeError) as caught:
        check_range(0, 1024, 512)
    assert caught.value.offset == 512


def test_neighbouring_extents_of_one_state_become_one():
    assert merge_extents(
        [
            Extent(0, 0, mapped=True),
            Extent(0, 512, mapped=False),
            Extent(512, 512, mapped=False),
            Extent(1024, 512, mapped=True),
            Extent(1536, 0, mapped=False),
            Extent(1536, 512, mapped=True),
        ]
    ) == [Extent(0, 1024, mapped=False), Extent(1024, 1024, mapped=True)]


def test_watchers_are_called_until_they_end_their_watch():
    watchers = Watchers()
    calls = []

    def note():
        calls.append("same")

    end_first = watchers.add(note)
    watchers.add(note)

    def leave():
        calls.append("leaving")
        end()

    end = watchers.add(leave)
    watchers.notify()
    end_first()
    end_first()
    watchers.notify()
    assert calls == ["same", "same", "leaving", "same"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EROFS, ReadOnlyError),
        (errno.EPERM, ReadOnlyError),
        (errno.ENODEV, DiskUnavailableError),
        (errno.ENOENT, DiskUnavailableError),
        (errno.EIO, MediumError),
        (None, MediumError),
    ],
)
def test_an_os_error_becomes_the_disk_error_it_means(code, error):
    cause = OSError("strange") if code is None else OSError(code, "strange")
    with (
        pytest.raises(error, match="read failed: strange") as caught,
        disk_errors("read", offset=7),
    ):
        raise cause
    assert type(caught.value) is error
    assert caught.value.offset == 7
    assert caught.value.__cause__ is cause
