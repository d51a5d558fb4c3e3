"""A guest of some bytes that shows what KVM is worth."""

from __future__ import annotations

import itertools
import os
from collections import deque
from contextlib import closing

import pytest

from tests.support.kvm import needs_kvm
from tests.support.kvm_fakes import FakeKvm, exits
from tests.support.leaks import open_descriptors
from tests.support.patience import PATIENCE, SOON
from vmbus.errors import ConfigError
from vmbus.kvm import api
from vmbus.kvm.api import Exit
from vmbus.kvm.trial import COUNT, DELAY_PORT, REPEATS, STEP_PORT, STEPS, Trial, try_guest
from vmbus.kvm.vcpu import Vcpu, ignore_kick_signal

DATA = 0x500


def out(port: int, value: int):
    """A step of a processor: OUT of one byte."""
    leave = exits(Exit.IO, api.RUN_IO.pack(1, 1, port, 1, DATA))

    def step(page):
        page[DATA] = value
        leave(page)

    return step


def run(*steps, kvm: FakeKvm | None = None, patience: float = PATIENCE) -> Trial:
    """Run the trial on a KVM that is made up; its clock goes on by a second with each look."""
    ignore_kick_signal()
    with closing(kvm or FakeKvm()) as kvm:
        kvm.scripts[0] = deque(steps)
        ticks = itertools.count()
        return try_guest(patience, path=os.devnull, call=kvm, clock=lambda: float(next(ticks)))


def test_a_guest_that_does_everything_is_timed_step_by_step():
    before = open_descriptors(collect=True)
    steps = [out(STEP_PORT, number + 1) for number in range(len(STEPS))]
    seen = run(*steps[:4], out(DELAY_PORT, 9), *steps[4:])
    assert seen == Trial((1.0,) * len(STEPS))
    assert seen.complete
    assert (seen.instructions, seen.exit_seconds) == (2 * COUNT, 1 / REPEATS)
    assert open_descriptors() == before


def test_a_guest_that_stands_still_is_stopped(monkeypatch):
    kvm, start = FakeKvm(), Vcpu.start

    def start_and_see_it_stand_still(vcpu):
        start(vcpu)
        assert kvm.idle.wait(PATIENCE)

    monkeypatch.setattr(Vcpu, "start", start_and_see_it_stand_still)
    seen = run(out(STEP_PORT, 1), kvm=kvm, patience=SOON)
    assert seen == Trial((1.0,))
    assert not seen.complete
    assert (seen.instructions, seen.exit_seconds) == (None, None)


def test_a_guest_that_comes_to_an_end_says_why():
    seen = run(out(STEP_PORT, 1), exits(Exit.SHUTDOWN))
    assert seen == Trial((1.0,), "triple fault on VP 0")


def test_steps_out_of_turn_do_not_count():
    assert run(out(STEP_PORT, 2), out(0x81, 1), exits(Exit.SHUTDOWN)).seconds == ()


def test_without_kvm_there_is_no_trial(tmp_path):
    before = open_descriptors(collect=True)
    with pytest.raises(ConfigError, match="No such file"):
        try_guest(PATIENCE, path=str(tmp_path / "kvm"))
    assert open_descriptors() == before


@needs_kvm
def test_the_real_kvm_runs_it():
    ignore_kick_signal()
    seen = try_guest(PATIENCE)
    assert seen.problem == ""
    assert seen.complete
