"""Tables that fit."""

import pytest

from vmbus.cli.columns import Column, fit, layout

COLUMNS = (
    Column("name", right=False),
    Column("in", group="rates", rank=2),
    Column("out", group="rates", rank=1),
    Column("what", rank=3, right=False, text=True),
)
ROWS = (("a", "123456", "7", "something long"), ("bb", "1", "89", "x"))


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, ["      rates", "name      in out  what",
              "a     123456   7  something long", "bb         1  89  x"]),
        (25, ["      rates", "name      in out  what", "a     123456   7  someth…",
              "bb         1  89  x"]),
        (21, ["      rates", "name      in out", "a     123456   7", "bb         1  89"]),
        (15, ["      rates", "name    out", "a         7", "bb       89"]),
        (8, ["name", "a", "bb"]),
        (3, ["na…", "a", "bb"]),
    ],
)  # fmt: skip
def test_columns_that_matter_less_go_first(width, lines):
    head, body = layout(COLUMNS, ROWS, width)
    assert [*head, *body] == lines


def test_a_column_may_have_a_least_width():
    head, body = layout((Column("n", least=4), Column("m")), [("1", "2")], 80)
    assert (head, body) == (["   n  m"], ["   1  2"])


def test_a_table_may_have_no_rows():
    assert layout(COLUMNS[:1], [], 80) == (["name"], [])


@pytest.mark.parametrize(
    ("text", "width", "cut"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("漢字", 3, "漢…"), ("ab", 1, "…"), ("ab", 0, "")],
)
def test_text_is_cut_to_what_fits(text, width, cut):
    assert fit(text, width) == cut
