"""Tables that show everything, without a word cut that fits into a line."""

import pytest

from vmbus.cli.wrapping import lay_out, wrap

HEADERS = ("guest", "size", "state", "source")
PATH = "raw:/var/lib/vm1.img"
ROWS = (
    ("vm1", "64 MiB", "stopped: No space left on device", PATH),
    ("vm22", "1.5 GiB", "-", "ram:1G"),
)


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, ["guest  size     state                             source",
              "vm1    64 MiB   stopped: No space left on device  raw:/var/lib/vm1.img",
              "vm22   1.5 GiB  -                                 ram:1G"]),
        (60, ["guest  size     state                   source",
              "vm1    64 MiB   stopped: No space left  raw:/var/lib/vm1.img",
              "                on device",
              "vm22   1.5 GiB  -                       ram:1G"]),
        (40, ["guest  size     state", "    source",
              "vm1    64 MiB   stopped: No space left",
              "                on device", f"    {PATH}",
              "vm22   1.5 GiB  -", "    ram:1G"]),
        (23, ["guest   vm1", "size    64 MiB", "state   stopped: No", "        space left on",
              "        device", "source", f"  {PATH}", "",
              "guest   vm22", "size    1.5 GiB", "state   -", "source  ram:1G"]),
        (14, ["guest   vm1", "size    64 MiB", "state", "  stopped: No", "  space left",
              "  on device", "source", PATH[:14], PATH[14:], "",
              "guest   vm22", "size", "  1.5 GiB", "state   -", "source  ram:1G"]),
    ],
)  # fmt: skip
def test_a_table_fits_any_width(width, lines):
    assert lay_out(HEADERS, ROWS, width) == lines


@pytest.mark.parametrize("width", range(1, 90))
def test_nothing_is_lost_and_no_line_is_too_wide(width):
    lines = lay_out(HEADERS, ROWS, width)
    assert max(map(len, lines)) <= width
    shown = "".join("".join(lines).split())
    for cell in ("vm22", "1.5GiB", "ram:1G"):
        assert cell in shown
    if width >= len(PATH):
        assert any(PATH in line for line in lines)


def test_pieces_have_the_style_of_their_cell():
    def paint(cell, piece):
        return piece.upper() if cell == "not ok" else piece

    assert lay_out(("a", "b"), [("not ok", "x")], 6, paint) == ["a    b", "NOT  x", "OK"]


def test_a_table_may_have_no_rows_or_one_column():
    assert lay_out(("a", "b"), [], 80) == ["a  b"]
    assert lay_out(("state",), [("broken",)], 3) == ["sta", "te", "bro", "ken"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("a b c", 3, ["a b", "c"]),
        ("one 64 MiB", 6, ["one", "64 MiB"]),
        ("abcdef g", 4, ["abcd", "ef g"]),
        ("漢字漢字", 4, ["漢字", "漢字"]),
        ("", 4, [""]),
    ],
)
def test_text_is_wrapped_between_words(text, width, lines):
    assert wrap(text, width) == lines
