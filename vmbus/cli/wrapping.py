"""Tables that show everything: cells are wrapped between words where there is no room for all.

A word, such as a path or a specification, is what people copy: it is cut only where it does not fit
into a line by itself. For tables whose columns may be left out see :mod:`vmbus.cli.columns`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

GAP = 2
"""Cells between two columns."""
INDENT = 4
"""Cells before what stands below its row."""
_BREAK = re.compile(r"(?<![0-9]) ")
"""A number stays with its unit."""


def _plain(_cell: str, text: str) -> str:
    return text


def lay_out(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    paint: Callable[[str, str], str] = _plain,
) -> list[str]:
    """Lay a table out.

    Where the columns do not fit, even with their cells wrapped, the last one stands below the
    others; where that does not help, each row is a list of its cells, with the headers as names.

    Args:
        headers: Of the columns, from left to right.
        rows: A cell for each column; nothing that steers a terminal.
        width: Of the terminal, in cells; at least 1.
        paint: Called with a cell and a piece of it; returns the piece with its style.

    Returns:
        Lines, none wider than the terminal.
    """
    for below in (0, 1) if len(headers) > 1 else (0,):
        count = len(headers) - below
        table = [tuple(headers), *rows]
        widths = _widths([row[:count] for row in table], width)
        if widths is not None:
            lines: list[str] = []
            for row in table:
                lines += _row(row[:count], widths, paint)
                for cell in row[count:]:
                    lines += _indented(cell, width, INDENT, paint)
            return lines
    return list(_lists(headers, rows, width, paint))


def wrap(text: str, width: int) -> list[str]:
    """Return text in lines of at most ``width`` cells; a word is cut if it does not fit alone."""
    from rich.cells import cell_len, chop_cells

    lines = [""]
    for word in _BREAK.split(text):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(longer) <= width:
            lines[-1] = longer
            continue
        if not lines[-1]:
            lines.pop()
        lines += chop_cells(word, width) if cell_len(word) > width else [word]
    return lines


def _longest(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, _BREAK.split(text)))


def _widths(table: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Return how wide the columns are to be; None if a word would have to be cut."""
    from rich.cells import cell_len

    columns = list(zip(*table, strict=True))
    widths = [max(map(_longest, column)) for column in columns]
    room = width - sum(widths) - GAP * (len(widths) - 1)
    if room < 0:
        return None
    wishes = [max(map(cell_len, column)) - has for column, has in zip(columns, widths, strict=True)]
    # Short cells first, so that it is the long ones that are wrapped.
    order = sorted(range(len(widths)), key=wishes.__getitem__)
    for left, index in zip(range(len(order), 0, -1), order, strict=True):
        given = min(wishes[index], room // left)
        widths[index] += given
        room -= given
    return widths


def _row(
    row: Sequence[str], widths: Sequence[int], paint: Callable[[str, str], str]
) -> Iterator[str]:
    from rich.cells import cell_len

    wrapped = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    for pieces in itertools.zip_longest(*wrapped, fillvalue=""):
        line, space = "", 0
        for cell, piece, width in zip(row, pieces, widths, strict=True):
            if piece:
                line += " " * space + paint(cell, piece)
                space = 0
            space += width - cell_len(piece) + GAP
        yield line


def _indented(
    cell: str, width: int, indent: int, paint: Callable[[str, str], str]
) -> Iterator[str]:
    """Yield a cell below something, unless its words need the room of the indentation."""
    indent = indent if _longest(cell) <= width - indent else 0
    for piece in wrap(cell, width - indent):
        yield " " * indent + paint(cell, piece)


def _lists(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    paint: Callable[[str, str], str],
) -> Iterator[str]:
    names = max(map(len, headers)) + GAP
    for number, row in enumerate(rows):
        if number:
            yield ""
        for header, cell in zip(headers, row, strict=True):
            if _longest(cell) <= width - names:
                first, *others = wrap(cell, width - names)
                yield paint(header, header) + " " * (names - len(header)) + paint(cell, first)
                for piece in others:
                    yield " " * names + paint(cell, piece)
            else:
                for piece in wrap(header, width):
                    yield paint(header, piece)
                yield from _indented(cell, width, GAP, paint)
