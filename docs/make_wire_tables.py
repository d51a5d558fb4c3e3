"""Write docs/reference/wire.md: control messages and vstor packets, byte by byte.

All that the page says about bytes comes from ``vmbus/wire/messages.py``,
``vmbus/wire/layouts.py`` and ``storvsp/wire.py``; what it says about meaning comes from the
docstrings there.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices")]

from storvsp import wire as vstor  # noqa: E402  # needs the path above
from vmbus import errors  # noqa: E402
from vmbus.wire import messages as m  # noqa: E402
from vmbus.wire.versions import Feature, Version  # noqa: E402

PAGE = ROOT / "docs/reference/wire.md"
HEAD = """# On the wire, byte by byte

The control messages of VMBus, and below them [the packets of vstor](#vstor), the protocol of the
SCSI controller. Made by `docs/make_wire_tables.py` from `vmbus/wire/messages.py`,
`vmbus/wire/layouts.py` and `storvsp/wire.py`; a test compares this page with what the script would
write.

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


def meanings(file: str) -> dict[str, dict[str, str]]:
    """Return what the docstrings in a file say: by class, by field ("" for the class)."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(file).read_text()).body:
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
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
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
    texts = meanings(m.__file__)
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
    return HEAD + "\n".join(overview) + "\n\n" + "\n".join(sections) + "\n" + render_vstor()


# -- vstor -----------------------------------------------------------------------------------------

VSTOR_HEAD = """## vstor

A vstor packet is the payload of a ring packet. It has {size} bytes: {header} of header, and a union
of {body} whose meaning depends on the operation. Up to version {short_version}, and from many
drivers until a version is agreed on, only the first {short} come; the rest then counts as zero. The
answer always has {size}. All integers are little-endian; offsets are in bytes from the beginning of
the packet. What the controller does with it is in [SCSI](../explanation/scsi.md).

"""


class Union(NamedTuple):
    """One meaning of a packet, or of the union in it."""

    title: str
    layout: struct.Struct
    names: Sequence[str]
    texts: str
    """Class in wire.py with the docstrings of the fields; empty if there is none."""
    base: int
    """Offset of the layout in the packet."""


UNIONS = (
    Union("Any packet", vstor.HEADER, vstor.Packet._fields[:3], "Packet", 0),
    Union("EXECUTE_SRB", vstor.REQUEST, vstor.Srb._fields, "Srb", 0),
    Union("Answer to EXECUTE_SRB", vstor.REPLY, vstor.SrbReply._fields, "SrbReply", 0),
    Union(
        "Union of QUERY_PROTOCOL_VERSION",
        vstor.PROTOCOL_VERSION,
        ("version", "revision"),
        "",
        vstor.HEADER_SIZE,
    ),
    Union(
        "Union that answers QUERY_PROPERTIES",
        vstor.PROPERTIES,
        vstor.Properties._fields,
        "Properties",
        vstor.HEADER_SIZE,
    ),
    Union(
        "Union of CREATE_SUB_CHANNELS",
        vstor.SUB_CHANNELS,
        ("sub_channel_count",),
        "",
        vstor.HEADER_SIZE,
    ),
    Union(
        "Union that answers FCHBA_DATA",
        vstor.FIBRE_CHANNEL,
        vstor.FibreChannelData._fields,
        "FibreChannelData",
        vstor.HEADER_SIZE,
    ),
)

GROUPS = (
    ("Operations", re.compile("|".join(vstor.OPERATION_NAMES.values()))),
    ("Versions", re.compile(r"VERSION_\w+")),
    ("Directions: data_in", re.compile(r"DATA_\w+")),
    ("SRB flags: srb_flags", re.compile(r"SRB_FLAG_\w+")),
    ("Sizes, in bytes", re.compile(r"\w+_SIZE|(SHORT_)?MAX_\w+")),
    ("SRB status: srb_status", re.compile(r"SRB_\w+")),
    ("Flags: flags", re.compile(r"FLAG_\w+|PROPERTY_\w+")),
    ("NTSTATUS: status", re.compile(r"STATUS_\w+")),
)
"""For the constants of wire.py, and the NTSTATUS codes of errors.py; each belongs to the first
group that it fits."""


def struct_fields(layout: struct.Struct, names: Sequence[str], base: int) -> Iterator[Field]:
    """Yield the fields of a struct, padding included, with offsets from ``base`` on."""
    kinds = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "s": "bytes", "x": ""}
    waiting = iter(names)
    offset = base
    for digits, code in re.findall(r"(\d*)([A-Za-z])", layout.format):
        count = int(digits or 1)
        whole = code in "sx"
        for _ in range(1 if whole else count):
            size = count if whole else struct.calcsize("<" + code)
            name = "(reserved)" if code == "x" else next(waiting)
            yield Field(offset, size, kinds[code], name)
            offset += size
    assert next(waiting, None) is None, layout.format


def constants() -> list[tuple[str, int, str]]:
    """Return (name, value, what the docstring says) of all numbers, in order."""
    found = []
    for module in (vstor, errors):
        body = ast.parse(Path(str(module.__file__)).read_text()).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                continue
            name = node.targets[0].id
            value = getattr(module, name)
            if name.startswith("_") or not isinstance(value, int):
                continue
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = plain(str(after.value.value))
            found.append((name, value, text))
    return found


def group_of(name: str) -> str:
    """Return the title of the table that a constant is in."""
    return next(title for title, pattern in GROUPS if pattern.fullmatch(name))


def written(title: str, value: int) -> str:
    """Write a value as people write that kind: what is counted in decimal, bits in hexadecimal."""
    counted = title.startswith(("Sizes", "Operations", "Directions"))
    return f"{value}" if counted else f"{value:#04x}"


def constant_tables() -> list[str]:
    """Return the constants, a table for each group."""
    lines = []
    known = constants()
    for title, _ in GROUPS:
        spoken = title == "Versions"
        lines += [
            f"### {title}",
            "",
            "| name | value |" + (" spoken |" if spoken else "") + " |",
            "|---|---|" + ("---|" if spoken else "") + "---|",
        ]
        for name, value, text in known:
            if group_of(name) == title:
                cells = [f"`{name}`", written(title, value)]
                if spoken:
                    cells.append("yes" if value in vstor.SUPPORTED_VERSIONS else "no")
                lines.append(f"| {' | '.join(cells)} | {text} |")
        lines.append("")
    return lines


def render_vstor() -> str:
    """Return the part of the page about vstor."""
    lines = []
    texts = meanings(vstor.__file__)
    for union in UNIONS:
        docs = texts.get(union.texts, {"": ""})
        lines += [f"### {union.title}", ""]
        if docs[""]:
            lines += [plain(docs[""]), ""]
        lines += ["| offset | size | type | field | |", "|---|---|---|---|---|"]
        lines += [
            f"| {offset} | {length} | {kind} | {name} | {docs.get(name, '')} |"
            for offset, length, kind, name in struct_fields(union.layout, union.names, union.base)
        ]
        lines.append("")
    head = VSTOR_HEAD.format(
        size=vstor.PACKET_SIZE,
        header=vstor.HEADER_SIZE,
        body=vstor.BODY_SIZE,
        short=vstor.SHORT_PACKET_SIZE,
        short_version=f"{vstor.VERSION_4_2 >> 8}.{vstor.VERSION_4_2 & 0xFF}",
    )
    return head + "\n".join([*lines, *constant_tables()]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
