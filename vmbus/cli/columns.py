"""Tables that fit: columns that matter less are left out where there is no room for all.

Figures are never cut: half a number is a wrong one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

GAP = "  "
"""Between groups; within a group it is half of that."""


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    rank: int = 0
    """Those with the highest are left out first; 0: never."""
    group: str = ""
    """Stands above the titles of all columns of the group."""
    right: bool = True
    """Figures are aligned at their last digit."""
    text: bool = False
    """It may be cut, and takes what room there is."""
    least: int = 0
    """Characters that it always takes, so that figures do not move about."""


MIN_TEXT = 4
"""Characters that a text is not cut below."""


def fit(text: str, width: int) -> str:
    """Return text that takes at most ``width`` cells of a terminal."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 0 else ""


def layout(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int
) -> tuple[list[str], list[str]]:
    """Lay a table out.

    Args:
        columns: From left to right; those of a group are next to each other.
        rows: A cell for each column; nothing that steers a terminal.
        width: Of the terminal.

    Returns:
        The lines of the header, and those of the rows, none wider than the terminal.
    """
    cells = [list(row) for row in rows]
    shown = list(range(len(columns)))
    while True:
        picked = [columns[index] for index in shown]
        body = [[row[index] for index in shown] for row in cells]
        widths = _widths(picked, body, width)
        droppable = [index for index in shown if columns[index].rank]
        if _total(picked, widths) <= width or not droppable:
            break
        shown.remove(max(droppable, key=lambda index: columns[index].rank))
    head = [[column.title for column in picked]]
    lines = [fit(_join(picked, row, widths), width) for row in head + body]
    if any(column.group for column in picked):
        lines.insert(0, fit(_groups(picked, widths), width))
        return lines[:2], lines[2:]
    return lines[:1], lines[1:]


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    from rich.cells import cell_len

    titles = [column.title for column in columns]
    widths = [
        max(column.least, *map(cell_len, cells))
        for column, *cells in zip(columns, titles, *rows, strict=True)
    ]
    # A group's name needs room, too.
    start = 0
    for group, members in itertools.groupby(columns, key=lambda column: column.group):
        count = len(list(members))
        room = sum(widths[start : start + count]) + count - 1
        if group:
            widths[start + count - 1] += max(len(group) - room, 0)
        start += count
    # Texts make room for figures, as far as they can.
    excess = _total(columns, widths) - width
    for index, column in enumerate(columns):
        if column.text and excess > 0:
            least = min(widths[index], max(MIN_TEXT, len(column.title)))
            given = min(excess, widths[index] - least)
            widths[index] -= given
            excess -= given
    return widths


def _gaps(columns: Sequence[Column]) -> list[str]:
    """Return what stands before each column."""
    gaps = [""]
    for left, right in itertools.pairwise(columns):
        same = bool(left.group) and left.group == right.group
        gaps.append(GAP[:1] if same else GAP)
    return gaps


def _total(columns: Sequence[Column], widths: Sequence[int]) -> int:
    return sum(widths) + sum(map(len, _gaps(columns)))


def _join(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> str:
    from rich.cells import cell_len

    line = ""
    for column, gap, cell, width in zip(columns, _gaps(columns), row, widths, strict=True):
        text = fit(cell, width) if column.text else cell
        space = " " * (width - cell_len(text))
        line += gap + (space + text if column.right else text + space)
    return line.rstrip()


def _groups(columns: Sequence[Column], widths: Sequence[int]) -> str:
    line, position, last = "", 0, ""
    for column, gap, width in zip(columns, _gaps(columns), widths, strict=True):
        position += len(gap)
        if column.group and column.group != last:
            line = line.ljust(position) + column.group
        last = column.group
        position += width
    return line
