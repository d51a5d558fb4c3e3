"""The page of state diagrams is made from the tables, and up to date."""

from __future__ import annotations

import runpy

from tests.support.house import ROOT

DOCS = ROOT / "docs"


def test_the_page_of_states_is_what_the_tables_say() -> None:
    made = runpy.run_path(str(DOCS / "make_state_diagrams.py"))["make"]()
    page = (DOCS / "reference" / "states.md").read_text(encoding="utf-8")
    assert page == made, "run docs/make_state_diagrams.py"
