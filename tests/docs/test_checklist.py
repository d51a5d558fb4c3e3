"""docs/reference/checklist.md: forty rows, and tests for each that is ours."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest

from tests.support.house import ROOT

SCRIPT = ROOT / "docs/make_checklist.py"


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_checklist", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.collect = cache(module.collect)  # the page and what is said of it are of one moment
    return module


def test_the_page_is_up_to_date(maker):
    assert maker.PAGE.read_text() == maker.render(), "run: python docs/make_checklist.py"


def test_there_are_forty_rows(maker):
    assert list(maker.ROWS) == list(range(1, 41))


def test_every_row_that_is_ours_has_a_test_and_no_other_claims_one(maker):
    tests = maker.collect()
    for number, row in maker.ROWS.items():
        if row.outside:
            assert row.outside in {"VMM", "services"}
        else:
            assert tests[number], f"nothing shows row {number}: {row.duty}"


@pytest.mark.parametrize(
    ("name", "source", "rows"),
    [
        ("test_row_7_it", "", {7}),
        ("test_row_7_and_33_it", "", {7, 33}),
        ("test_it", "# Checklist row 24", {24}),
        ("test_it", "# Linux; checklist rows 9 and 29:", {9, 29}),
        ("test_it", '"""checklist rows 1 to 3, 21 and 25 to 26."""', {1, 2, 3, 21, 25, 26}),
        ("test_it", "# checklist\n    # row 5", {5}),
        ("test_rows", "row 4", set()),
    ],
)
def test_rows_are_found_in_names_and_comments(maker, name, source, rows):
    assert maker.rows_of(name, source) == rows
