"""The page that the benchmarks make."""

from __future__ import annotations

from tests.bench.__main__ import MODULES
from tests.bench.bench_channels import LONGEST, MEDIAN
from tests.bench.bench_guests import MODES
from tests.bench.bench_turns import CASES
from tests.bench.harness import Figure
from tests.bench.page import BEFORE, SECTIONS, make_page, plain, side_by_side, turns
from tests.support.house import ROOT

PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
FIGURES = {name: [Figure(f"what {name} measures", 3.0, "us", target=5)] for name in MODULES}


def test_every_benchmark_has_its_place_and_one_command_makes_the_page():
    assert sorted(each for section in SECTIONS for each in section.modules) == sorted(MODULES)
    page = make_page("", FIGURES, "a slow machine")
    assert page.count("a slow machine") == len(SECTIONS)
    for name in MODULES:
        assert f"| what {name} measures | " in page


def test_what_was_not_measured_stays_as_it_was():
    whole = make_page("", FIGURES, "a slow machine")
    assert make_page(whole, {}, "a fast machine") == whole
    one = {"bench_turns": [Figure("another turn", 7.0, "ms")]}
    page = make_page(whole, one, "a fast machine")
    assert page.count("a fast machine") == 1
    assert page.count("a slow machine") == len(SECTIONS) - 1
    assert "what bench_turns measures" not in page
    half = {"bench_ring": FIGURES["bench_ring"]}
    assert make_page(whole, half, "a fast machine") == whole, "a section is measured as a whole"


def test_the_page_is_one_that_the_benchmarks_have_made():
    page = PAGE.read_text()
    assert make_page(page, {}, "") == page
    for section in SECTIONS:
        assert section.text in page or section.name == "channels"


def test_figures_stand_beside_their_floors():
    lines = plain([Figure("a", 6.0, "us", "bare", 2.0, 5.0), Figure("b", 1.0, "ms")])
    assert lines[2:] == [
        "| a | 6.00 us | bare, 2.00 us | 3.0 | at most 5 us |",
        "| b | 1.00 ms |  |  |  |",
    ]


def test_figures_of_a_kind_stand_side_by_side():
    one, other = MODES
    table = side_by_side([*MODES], [*MODES], ", ")
    figures = [
        Figure("memory, 50 attached", 9.0, "MiB"),
        Figure(f"wait, {one}", 1.0, "ms", target=50),
        Figure(f"wait, {other}", 2.0, "ms"),
    ]
    assert table(figures) == [
        f"| what | {one} | {other} | target |",
        "|---|---|---|---|",
        "| memory, 50 attached | 9.0 MiB |  |  |",
        "| wait | 1.0 ms | 2.0 ms | at most 50 ms |",
    ]
    table = side_by_side([MEDIAN, LONGEST], ["m", "l"], ": ")
    figures = [Figure(f"read: {each}", 1.0, "ms") for each in (MEDIAN, LONGEST)]
    assert table(figures)[2:] == ["| read | 1.0 ms | 1.0 ms |  |"]


def test_turns_stand_beside_what_they_once_were():
    assert BEFORE.keys() <= CASES.keys()
    name = next(iter(BEFORE))
    assert turns([Figure(name, 7.4, "ms", target=20)])[2:] == [
        f"| {name} | {BEFORE[name]} ms | 7 ms | at most 20 ms |"
    ]
