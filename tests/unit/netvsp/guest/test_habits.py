"""The table of drivers."""

from __future__ import annotations

import pytest

from netvsp.guest import HABITS
from netvsp.guest.habits import Step
from netvsp.wire import nvsp
from vmbus.guest import PERSONALITIES


def test_every_row_has_a_personality():
    keys = {each.key for each in PERSONALITIES.values()}
    assert HABITS.keys() == keys - {"haiku"}


@pytest.mark.parametrize("key", HABITS)
def test_rows_make_sense(key):
    habits = HABITS[key]
    assert list(habits.versions) == sorted(habits.versions, reverse=True)
    assert set(habits.versions) <= set(nvsp.VERSIONS)
    assert habits.steps[0] is Step.INITIALIZE
    assert habits.message_size <= 40
    assert (Step.SUB_CHANNELS in habits.steps) == (habits.max_channels > 1)
    assert habits.receive_size >= habits.receive_size_old or key == "uefi"


@pytest.mark.parametrize(
    ("key", "version", "bits"),
    [
        ("linux-6.1", nvsp.VERSION_1, 0),
        ("linux-6.1", nvsp.VERSION_2, 0x8),
        ("linux-6.1", nvsp.VERSION_4, 0x8),
        ("linux-6.1", nvsp.VERSION_5, 0x2C),
        ("linux-6.1", nvsp.VERSION_6_1, 0xAC),
        ("freebsd", nvsp.VERSION_6, 0x8),
        ("freebsd", nvsp.VERSION_6_1, 0x88),
        ("dpdk", nvsp.VERSION_6_1, 0xC),
        ("uefi", nvsp.VERSION_5, 0),
    ],
)
def test_what_a_driver_can_do_depends_on_the_version(key, version, bits):
    assert HABITS[key].capabilities_of(version) == bits
