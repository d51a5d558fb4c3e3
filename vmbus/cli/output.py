"""How commands write: tables, sizes and JSON; colour on a terminal only.

Text that a guest or a VMM chose goes through :func:`safe` on its way to a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from vmbus.cli.wrapping import lay_out

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"ok": "green", "limited": "yellow", "missing": "red", "broken": "red"}
"""Words that stand out in tables."""


DUMB = {"dumb", "unknown"}
"""Values of TERM for terminals that can do nothing but take lines."""


def on_terminal(stream: TextIO | None = None) -> bool:
    """Whether a person is looking, at a terminal that can do more than take lines.

    Args:
        stream: What is looked at; standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    return stream.isatty() and os.environ.get("TERM", "").lower() not in DUMB


def styled(stream: TextIO | None = None) -> bool:
    """Whether colours and the like are wanted there (https://no-color.org)."""
    return on_terminal(stream) and not os.environ.get("NO_COLOR")


def bold(text: str, *, warn: bool = False) -> str:
    """Make a line stand out on a terminal; one that warns even more."""
    return click.style(text, bold=True, fg="yellow" if warn else None) if styled() else text


def safe(text: object) -> str:
    """Return text that cannot steer a terminal: what is not printable becomes ``?``."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def size_text(size: float | None) -> str:
    """Write bytes for people: ``512 B``, ``1.5 GiB``; ``-`` for None."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if size < 1000 else f"{size:.0f} TiB"


def print_json(value: object) -> None:
    """Print one JSON document on one line, at once."""
    click.echo(json.dumps(value, ensure_ascii=False))
    sys.stdout.flush()


def tell_warnings(result: Mapping[str, Any]) -> None:
    """Print on standard error what should be known of something that was done as asked."""
    for text in result.get("warnings", ()):
        click.echo(f"warning: {safe(text)}", err=True)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: as wide as the terminal, or as aligned columns of any width into a pipe."""
    lines = [tuple(map(safe, row)) for row in rows]
    if on_terminal():
        for line in lay_out(headers, lines, console().width, _painter(headers)):
            click.echo(line)
        return
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    for each in (tuple(headers), *lines):
        cells = (cell.ljust(width) for cell, width in zip(each, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _painter(headers: Sequence[str]) -> Callable[[str, str], str]:
    """Return what gives pieces of cells their style."""
    wanted = styled()

    def paint(cell: str, piece: str) -> str:
        if not wanted or not (cell in headers or cell in STYLES):
            return piece
        return click.style(piece, bold=cell in headers or None, fg=STYLES.get(cell))

    return paint


def console() -> Console:
    """Return rich's console for standard output."""
    from rich.console import Console

    # Without a colour system there are no styles at all.
    return Console(highlight=False, markup=False, color_system="auto" if styled() else None)
