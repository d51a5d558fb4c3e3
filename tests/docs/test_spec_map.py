"""docs/reference/spec-map.md says what the sources say."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support.house import ROOT

SCRIPT = ROOT / "docs/make_spec_map.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_spec_map", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(maker):
    assert maker.PAGE.read_text() == maker.render(), "run: python docs/make_spec_map.py"


def test_every_message_has_code_and_a_test(maker):
    for line in maker.render().splitlines()[7:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            assert cells[3], f"no code handles {cells[1]}"
            assert cells[4], f"no test names {cells[1]}"
