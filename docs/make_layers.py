"""Write the rooms of the house into docs/explanation/layers.md: a table and a picture.

Which rooms there are, and in which order, is said in ``tests/support/house.py``; who imports whom
is read from the sources. What stands around the two markers in the page is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices")]

from tests.support.house import (  # noqa: E402  # needs the path above
    ROOMS,
    imports,
    modules,
    ours,
    room,
    room_graph,
)

PAGE = ROOT / "docs/explanation/layers.md"
BEGIN = "<!-- rooms: made by docs/make_layers.py, do not edit -->\n"
END = "<!-- end of rooms -->\n"
PUBLIC_NAMES = "vmbus"
"""Everybody may take the version number from there, so an arrow to it says nothing."""


def arrows() -> dict[str, list[str]]:
    """Return which rooms each room imports, in the order of the house."""
    order = list(ROOMS)
    return {
        name: sorted(others - {PUBLIC_NAMES}, key=order.index)
        for name, others in room_graph().items()
    }


def third_party(name: str) -> list[str]:
    """Return the packages that a room imports and that are neither ours nor Python's."""
    found = {
        other.partition(".")[0]
        for module in modules()
        if room(module) == name
        for other in imports(module)
        if not ours(other)
    }
    return sorted(found - set(sys.stdlib_module_names))


def reach(graph: Mapping[str, list[str]], start: str) -> set[str]:
    """Return all that can be got to from a room, without the room itself."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def reduced(graph: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Leave out each arrow that is a short cut for a way over other rooms."""
    return {
        name: [
            other
            for other in others
            if not any(other in reach(graph, between) for between in others if between != other)
        ]
        for name, others in graph.items()
    }


def picture(graph: Mapping[str, list[str]]) -> list[str]:
    """Draw the arrows as a Mermaid flowchart; rooms without any are left out."""
    drawn = {name for name, others in graph.items() if others}
    drawn |= {other for others in graph.values() for other in others}
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {node(name)}["{name}"]' for name in reversed(ROOMS) if name in drawn]
    lines += [
        f"    {node(name)} --> {node(other)}"
        for name in reversed(ROOMS)
        for other in reversed(graph[name])
    ]
    return [*lines, "```"]


def node(name: str) -> str:
    """Return a name that Mermaid takes: dots mean something there."""
    return name.replace(".", "_")


def table(graph: Mapping[str, list[str]]) -> list[str]:
    """List the rooms from the ground up."""
    lines = ["| room | what is in it | imports | packages |", "|---|---|---|---|"]
    for name, sentence in ROOMS.items():
        below = ", ".join(f"`{other}`" for other in graph[name])
        outside = ", ".join(f"`{other}`" for other in third_party(name))
        lines.append(f"| `{name}` | {sentence} | {below} | {outside} |")
    return lines


def rooms() -> str:
    """Return what stands between the markers."""
    graph = arrows()
    lines = [
        *table(graph),
        "",
        "The same as a picture, without the arrows that a way over other rooms makes needless:",
        "",
        *picture(reduced(graph)),
    ]
    return "\n".join(lines) + "\n"


def render() -> str:
    """Return the whole page."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{PAGE}: the markers are missing")
    return f"{before}{BEGIN}\n{rooms()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(render())
