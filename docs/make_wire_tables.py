"""Write docs/reference/wire.md: every control message as a table of offset, size and field.

All that the page says about bytes comes from ``vmbus/wire/messages.py`` and
``vmbus/wire/layouts.py``; what it says about meaning comes from the docstrings there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from vmbus.wire import messages as m  # noqa: E402  # needs the path above
from vmbus.wire.versions import Feature, Version  # noqa: E402

PAGE = ROOT / "docs/reference/wire.md"
HEAD = """# Control messages, byte by byte

Made by `docs/make_wire_tables.py` from the tables in `vmbus/wire/messages.py` and
`vmbus/wire/layouts.py`; a test compares this page with what the script would write.

A control message is the payload of a SynIC message of type 1, at most 240 bytes; all integers are
little-endian. It begins with its number, u32, and four bytes of padding, which may hold anything.
GUIDs are 16 bytes of which the first three fields are little-endian. Offsets and sizes are in
bytes, offsets from the beginning of the header. "Size" is exact in what is sent and a minimum in
what is received: some guests post 240 bytes whatever is in them. A message with several layouts
has one table each, the newest first; the first one that the connection allows is in force.

| # | message | direction | bytes | versions |
|---|---|---|---|---|
"""


class Field(NamedTuple):
    """One row of a layout."""

    offset: int
    size: int
    kind: str
    name: str


def fields(spec: m.MessageSpec) -> Iterator[Field]:
    """Yield the fields of a layout, header and reserved bytes included."""
    yield Field(0, 4, "u32", "number")
    yield Field(4, 4, "", "(reserved)")
    offset = m.HEADER_SIZE
    for sub in spec.layout.subcons:
        size = sub.sizeof()
        # A GUID, 120 bytes of data, and integers: there is nothing else in these layouts.
        kind = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "GUID"}.get(size, "bytes")
        yield Field(offset, size, kind if sub.name else "", sub.name or "(reserved)")
        offset += size
    if spec.trailing:
        yield Field(offset, 0, "bytes", "data")
    if spec.message is m.InitiateContact:
        yield Field(offset, 16, "GUID", "client_id")


def meanings() -> dict[str, dict[str, str]]:
    """Return what the docstrings in messages.py say: by class, by field ("" for the class)."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(m.__file__).read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found[node.name] = {"": ast.get_docstring(node) or ""}
        for field, doc in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                texts[field.target.id] = plain(str(doc.value.value))
    return found


def plain(text: str) -> str:
    """Turn docstring markup into Markdown."""
    text = " ".join(text.split()).replace("``", "`")
    for role in (":data:", ":meth:", ":attr:", ":class:"):
        text = text.replace(role, "")
    return text


def versions(spec: m.MessageSpec) -> str:
    """Say when a layout is part of the protocol."""
    if spec.min_version is None:
        return "all, and without a connection"
    text = "all" if spec.min_version is Version.V0_13 else f"from {spec.min_version}"
    names = [str(each.name) for each in Feature if each in spec.features]
    return text + (f", with {' or '.join(names)}" if names else "")


def size(spec: m.MessageSpec) -> str:
    """Say how long a layout is."""
    if spec.trailing:
        return f"{spec.size} + data"
    return (
        f"{spec.size} or {m.CLIENT_ID_END}" if spec.message is m.InitiateContact else f"{spec.size}"
    )


def anchor(spec: m.MessageSpec) -> str:
    """Return the link to a message's section."""
    return f"{spec.message.TYPE}-{spec.message.NAME.lower()}"


def render() -> str:
    """Return the page."""
    overview = []
    sections: list[str] = []
    texts = meanings()
    previous = None
    for spec in m.MESSAGES:
        message = spec.message
        title = f"{message.TYPE} {message.NAME}"
        way = "guest to host" if spec.direction is m.Direction.GUEST_TO_HOST else "host to guest"
        overview.append(
            f"| {message.TYPE} | [{message.NAME}](#{anchor(spec)}) | {way} | {size(spec)} "
            f"| {versions(spec)} |"
        )
        docs = texts[message.__name__]
        if message is not previous:
            sections.append(f"## {title}\n\n`{message.__name__}`, {way}. {plain(docs[''])}\n")
        previous = message
        rows = [
            f"| {offset} | {length or '…'} | {kind} | {name} | {docs.get(name, '')} |"
            for offset, length, kind, name in fields(spec)
        ]
        sections.append(
            f"{size(spec)} bytes; versions: {versions(spec)}.\n\n"
            "| offset | size | type | field | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return HEAD + "\n".join(overview) + "\n\n" + "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(render())
