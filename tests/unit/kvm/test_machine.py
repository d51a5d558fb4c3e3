"""Machines that cannot begin."""

from __future__ import annotations

import pytest

from vmbus.errors import ConfigError
from vmbus.kvm.bzimage import EntryState
from vmbus.kvm.machine import FOUR_GIB, LOW_MEMORY_LIMIT, Machine, ram_regions
from vmbus.memory import GuestMemory


def test_memory_is_below_3_gib_and_above_4():
    assert ram_regions(1 << 30) == [(0, 1 << 30)]
    assert ram_regions(5 << 30) == [(0, LOW_MEMORY_LIMIT), (FOUR_GIB, 2 << 30)]


def load_nothing(memory: GuestMemory) -> EntryState:
    raise AssertionError("this machine never runs")


@pytest.mark.parametrize("size", [0, 1 << 20, (4 << 20) + 1])
def test_too_little_memory_or_half_a_page_is_refused(size):
    with pytest.raises(ConfigError, match="2M at least"):
        Machine(size, 1, load_nothing, lambda data: None)
