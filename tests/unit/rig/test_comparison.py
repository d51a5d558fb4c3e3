"""The arithmetic of ``make guest-bench``, and the table it prints."""

from __future__ import annotations

from functools import partial

import pytest

from tests.guest.rig.comparison import (
    ROUNDS,
    Kind,
    Spread,
    machine_speed,
    order,
    ratios,
    report,
    spread,
    table,
)

BOOT, READS = Kind("s", 1, less=True), Kind("iops")


def test_the_spread_is_the_median_and_both_ends():
    assert spread([3.0, 1.0, 2.0, 9.0, 4.0]) == Spread(3.0, 1.0, 9.0)
    assert spread([3.0, 1.0, 2.0, 9.0, 4.0]).text(0, "iops") == "3 (1 to 9) iops"
    assert spread([1.2345]).text(2) == "1.23 (1.23 to 1.23)"


def test_a_ratio_is_of_one_round_and_above_1_if_we_are_better():
    # The machine was half as fast in the second round: the ratio does not see it.
    assert ratios([100.0, 50.0], [80.0, 40.0], READS) == [1.25, 1.25]
    assert ratios([2.0], [3.0], BOOT) == [1.5]


def test_rounds_that_only_one_side_has_are_not_compared():
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0], READS)


def test_the_table_says_how_far_the_rounds_were_apart():
    ours = {"boot": [4.0, 5.0, 4.5], "reads": [1000.0, 2000.0, 1500.0]}
    theirs = {"boot": [4.4, 4.0, 4.5], "reads": [500.0, 4000.0, 1500.0]}
    sides = {"vmbus": ours, "QEMU": theirs}
    assert table(sides, {"boot": BOOT, "reads": READS}) == [
        "| | vmbus | QEMU | ratio |",
        "|---|---|---|---|",
        "| boot | 4.5 (4.0 to 5.0) s | 4.4 (4.0 to 4.5) s | 1.00 (0.80 to 1.10) |",
        "| reads | 1500 (1000 to 2000) iops | 1500 (500 to 4000) iops | 1.00 (0.50 to 2.00) |",
    ]


def test_several_sides_stand_beside_ours_each_with_its_ratio():
    sides = {"vmbus": {"reads": [8.0]}, "A": {"reads": [4.0]}, "B": {"reads": [16.0]}}
    assert table(sides, {"reads": READS}) == [
        "| | vmbus | A | ratio | B | ratio |",
        "|---|---|---|---|---|---|",
        "| reads | 8 (8 to 8) iops | 4 (4 to 4) iops | 2.00 (2.00 to 2.00)"
        " | 16 (16 to 16) iops | 0.50 (0.50 to 0.50) |",
    ]


def test_who_begins_changes_from_round_to_round():
    turns: list[str] = []
    for number in range(3):
        order(number, *(partial(turns.append, each) for each in "abc"))
    assert "".join(turns) == "abcbcacab"


def test_the_machines_own_speed_is_what_it_does_in_a_second():
    moments = iter([10.0, 10.5, 20.0, 20.25])
    speed = machine_speed(lambda: next(moments))
    assert speed["Python, steps of an empty loop"] == pytest.approx(2.0)
    assert speed["copy of 32 MiB"] == pytest.approx((32 << 20) / 0.25 / 1e9)


def test_the_report_names_machine_emulator_and_rounds():
    machine = {"Python, steps of an empty loop": [20.0, 30.0, 25.0], "copy of 32 MiB": [5.0]}
    options = {"guest": "Linux 6.1", "emulator": "QEMU emulator version 11.1", "machine": machine}
    lines = report(**options, comparison=["| table |"], rounds=ROUNDS)  # type: ignore[arg-type]
    text = "\n".join(lines)
    assert "Guest: Linux 6.1. Beside: QEMU emulator version 11.1. Medians of 5 rounds" in text
    assert "| Python, steps of an empty loop | 25.0 (20.0 to 30.0) million/s |" in text
    assert "| copy of 32 MiB | 5.00 (5.00 to 5.00) GB/s |" in text
    assert lines[-1] == "| table |"
    assert "fewer" not in text


def test_too_few_rounds_are_called_that():
    (first, *_) = report(guest="g", emulator="q", machine={}, comparison=[], rounds=2)
    assert "fewer than 5 rounds say nothing of the spread" in first
