"""One life of a machine: which SynIC it gets, and how it ends."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.support.kvm_life import USER, LifeRig
from tests.support.leaks import open_descriptors
from vmbus.errors import ConfigError
from vmbus.kvm.life import SynicMode
from vmbus.kvm.outcome import End, Outcome
from vmbus.kvm.synic_kernel import CAPABILITIES, KernelSynic
from vmbus.kvm.synic_user import UserSynic


def test_kvm_has_the_synic_if_it_can():
    with closing(LifeRig(CAPABILITIES)) as rig:
        assert isinstance(rig.life.synic, KernelSynic)
    with closing(LifeRig(USER)) as rig:
        assert isinstance(rig.life.synic, UserSynic)
    with closing(LifeRig(CAPABILITIES, SynicMode.USER)) as rig:
        assert isinstance(rig.life.synic, UserSynic)


def test_what_kvm_cannot_do_is_said_and_nothing_stays_open():
    before = open_descriptors(collect=True)

    with pytest.raises(ConfigError, match="--synic user"):
        LifeRig(USER, SynicMode.KERNEL)
    with pytest.raises(ConfigError, match=r"Linux 5\.10"):
        LifeRig()

    assert open_descriptors() == before


def test_only_the_first_end_counts():
    with closing(LifeRig(USER)) as rig:
        rig.life.ended(End(Outcome.PANIC, "first"))
        rig.life.ended(End(Outcome.TRIPLE_FAULT, "second"))

    assert rig.ends == [End(Outcome.PANIC, "first")]
