"""docs/reference/spec-map.md says what the sources say."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

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


@pytest.fixture(scope="module")
def page(maker):
    return maker.render()


def test_the_page_is_up_to_date(maker, page):
    assert maker.PAGE.read_text() == page, "run: python docs/make_spec_map.py"


def test_every_message_has_code_and_a_test(page):
    rows = [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| \d", line)]
    assert [int(cells[0]) for cells in rows] == list(range(1, 30))
    for cells in rows:
        assert "](../../vmbus/engine/" in cells[3], f"no code handles {cells[1]}"
        shown = cells[4].count("](../../tests/")
        (count,) = re.findall(r"\((\d+)\) $", cells[4])
        assert 1 <= shown <= 3, f"no test names {cells[1]}, or too many are shown"
        assert shown == min(int(count), 3)


def test_guests_messages_are_taken_and_the_hosts_are_made(page):
    code = dict(re.findall(r"^\| \d+ \| (\w+) \| ... \| (.*?) \|", page, re.MULTILINE))
    assert "`ChannelRequests.on_open`" in code["OPENCHANNEL"]
    assert "`Lives.answer_open`" in code["OPENCHANNEL_RESULT"]
    assert "`Engine.__init__`" not in page
    assert "states.py" not in page


def function(maker, source):
    (found,) = maker.functions(Path("x.py"), source)
    return found


def test_what_takes_and_what_makes_a_message(maker):
    taking = function(maker, "def on_it(self, message: m.Unload | None): ...")
    making = function(maker, "def answer(self): post(Unload(relid=1))")
    naming = function(maker, "def look(self): return Unload.TYPE")
    for each, takes, makes in (
        (taking, True, False),
        (making, False, True),
        (naming, False, False),
    ):
        assert maker.takes(each, "Unload") is takes
        assert maker.makes(each, "Unload") is makes
        assert maker.mentions(each, "Unload")


def test_helpers_of_the_same_file_count(maker):
    names = {
        each.name: maker.names_in(each.node)
        for each in maker.functions(
            Path("x.py"),
            "def test_it(): first()\ndef first(): second()\ndef second(): Unload()\n"
            "def test_other(): Pause()",
        )
    }
    assert "Unload" in maker.named_with_helpers(names, "test_it")
    assert "Pause" not in maker.named_with_helpers(names, "test_it")


def test_the_most_specific_tests_are_of_as_many_files_as_there_are(maker):
    a, b = Path("a.py"), Path("b.py")
    tests = [
        maker.Test(1, False, a, "test_1"),
        maker.Test(1, False, a, "test_2"),
        maker.Test(2, False, a, "test_3"),
        maker.Test(5, True, b, "test_4"),
    ]
    assert [each.name for each in maker.most_specific(tests)] == ["test_1", "test_4", "test_2"]
    assert [each.name for each in maker.most_specific(tests[:2])] == ["test_1", "test_2"]


def test_a_link_leads_to_a_function_that_is_there(page):
    for name, target in re.findall(r"\[`([\w.]+)`\]\(\.\./\.\./([\w/.]+)\)", page):
        tree = ast.parse((ROOT / target).read_text())
        holder, _, method = name.rpartition(".")
        inside = next(
            (
                node.body
                for node in tree.body
                if isinstance(node, ast.ClassDef) and node.name == holder
            ),
            tree.body,
        )
        assert any(getattr(node, "name", "") == method for node in inside), name
