"""docs/explanation/layers.md shows the house as it is."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.support.house import ROOMS, ROOT, circle, room_graph

SCRIPT = ROOT / "docs/make_layers.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_layers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(maker):
    assert maker.PAGE.read_text() == maker.render(), "run: python docs/make_layers.py"


def test_every_room_has_a_row_in_the_order_of_the_house(maker):
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", maker.rooms(), re.MULTILINE)
    assert rows == list(ROOMS.items())


def test_a_short_cut_is_left_out_and_nothing_else(maker):
    graph = {"a": ["b", "c", "d"], "b": ["c"], "c": [], "d": []}
    assert maker.reduced(graph) == {"a": ["b", "d"], "b": ["c"], "c": [], "d": []}


def test_the_picture_leads_wherever_the_imports_lead(maker):
    graph = maker.arrows()
    few = maker.reduced(graph)
    assert not circle({name: set(others) for name, others in few.items()})
    for name in ROOMS:
        assert maker.reach(few, name) == maker.reach(graph, name), name


def test_the_version_number_is_the_only_arrow_left_out(maker):
    graph = maker.arrows()
    for name, others in room_graph().items():
        assert others - set(graph[name]) <= {"vmbus"}, name
