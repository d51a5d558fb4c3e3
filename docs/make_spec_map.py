"""Write docs/reference/spec-map.md: each control message, the code that handles it, its tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices")]

from vmbus.wire.messages import MESSAGES, Direction, Message  # noqa: E402  # needs the path above

PAGE = ROOT / "docs/reference/spec-map.md"
HEAD = """# Spec map

Each control message of VMBus: where the host handles it or makes it, and which tests name it.
Made by `docs/make_spec_map.py` from the table in `vmbus/wire/messages.py` and the sources; a test
compares this page with what the script would write.

| # | message | direction | code | tests |
|---|---|---|---|---|
"""


def words(folder: str, *, skip: str = "") -> dict[Path, set[str]]:
    """Return the words of each file below ``folder``."""
    return {
        path: set(re.findall(r"\w+", path.read_text()))
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not (skip and skip in path.parts)
    }


def mentions(name: str, files: dict[Path, set[str]]) -> list[Path]:
    """Return the files in which the class ``name`` is used."""
    return [path for path, used in files.items() if name in used]


def links(paths: list[Path]) -> str:
    """Return the files as links from the page."""
    return ", ".join(f"[{path.stem}](../../{path.relative_to(ROOT)})" for path in paths)


def render() -> str:
    """Return the page."""
    rows = []
    engine, tested = words("vmbus/engine"), words("tests", skip="bench")
    messages: dict[type[Message], Direction] = {row.message: row.direction for row in MESSAGES}
    for message, direction in sorted(messages.items(), key=lambda item: item[0].TYPE):
        code = mentions(message.__name__, engine)
        tests = mentions(message.__name__, tested)
        way = "g→h" if direction is Direction.GUEST_TO_HOST else "h→g"
        rows.append(f"| {message.TYPE} | {message.NAME} | {way} | {links(code)} | {links(tests)} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
