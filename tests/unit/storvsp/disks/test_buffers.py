"""Ranges that stay inside, and extents that are joined."""

import pytest

from storvsp.disk import Extent, OutOfRangeError
from storvsp.disks.buffers import check_range, merge_extents


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
