"""Docstrings as Markdown, and what is public of a module: for the pages that are made from code."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from functools import cache

ROLE = re.compile(r":(?:\w+):`(~?)([^`]*)`")
SECTION = re.compile(r"^(?:Args|Returns|Raises|Yields|Attributes):$", re.MULTILINE)
UNDERLINE = re.compile(r"^([-=~])\1{2,}$")
TABLE = re.compile(r"^=+( +=+)+$")


def markdown(text: str, level: int = 3) -> str:
    """Turn a docstring, after :func:`inspect.cleandoc`, into Markdown.

    Knows what ours have: roles, literals, underlined titles, simple tables and literal blocks.

    Args:
        text: The docstring.
        level: Of the headings that underlined titles become.
    """
    lines: list[str] = []
    rest = iter(text.splitlines())
    fenced = False
    for line in rest:
        if fenced and line and not line.startswith("    "):
            lines[-1:] = ["```", ""]
            fenced = False
        if fenced:
            lines.append(line[4:])
        elif TABLE.match(line):
            lines += _table(line, rest)
        elif UNDERLINE.match(line) and lines and lines[-1]:
            lines[-1] = f"{'#' * level} {lines[-1]}"
            lines.append("")
        elif line.rstrip().endswith("::"):
            sentence = inline(line.rstrip()[:-1]).rstrip()
            lines += [*([sentence, ""] if sentence != ":" else []), "```text"]
            next(rest, None)
            fenced = True
        else:
            lines.append(inline(line))
    if fenced:
        lines.append("```")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def inline(text: str) -> str:
    """Turn roles and literals in running text into Markdown."""
    text = ROLE.sub(
        lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", text
    )
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _table(border: str, rest: Iterator[str]) -> list[str]:
    """Turn a simple table without a head into one of Markdown."""
    starts = [found.start() for found in re.finditer(r"=+", border)]
    rows: list[list[str]] = []
    for line in rest:
        if TABLE.match(line):
            break
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    head = "|" + " |" * len(starts)
    body = [f"| {' | '.join(inline(cell) for cell in row)} |" for row in rows]
    return [head, "|" + "---|" * len(starts), *body]


def first_section(thing: object) -> str:
    """Return what a docstring says before its arguments, in Markdown; empty if there is none."""
    text = inspect.getdoc(thing) or ""
    found = SECTION.search(text)
    return markdown(text[: found.start()] if found else text, 5)


def summary(thing: object) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join(first_section(thing).partition("\n\n")[0].split())


def signature(name: str, thing: object, width: int = 90) -> str:
    """Return how something is called, with its types, as in ``open(path: str) -> int``.

    Args:
        name: What it is called there.
        thing: A function, method or class.
        width: Characters of a line; what is longer has a line for each parameter.
    """
    call = inspect.signature(thing)  # type: ignore[arg-type]
    parameters = []
    star = False
    for number, each in enumerate(call.parameters.values()):
        if number == 0 and each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not star:
            parameters.append("*")
        star |= each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        mark = "*" * (each.kind is each.VAR_POSITIONAL) + "**" * (each.kind is each.VAR_KEYWORD)
        text = f"{mark}{each.name}{_annotation(': ', each.annotation)}"
        if each.default is not each.empty:
            text += f" = {_default(each.default)}"
        parameters.append(text)
    word = _kind(thing)
    returned = "" if inspect.isclass(thing) else _annotation(" -> ", call.return_annotation)
    line = f"{word}{name}({', '.join(parameters)}){returned}"
    if len(line) <= width or not parameters:
        return line
    inner = "".join(f"    {each},\n" for each in parameters)
    return f"{word}{name}(\n{inner}){returned}"


def _kind(thing: object) -> str:
    """Return the words before a call of a function."""
    inside = inspect.unwrap(thing)  # type: ignore[arg-type]
    if inside is not thing and inspect.isasyncgenfunction(inside):
        return "async with "
    if inside is not thing and inspect.isgeneratorfunction(inside):
        return "with "
    return "async " if inspect.iscoroutinefunction(thing) else ""


def _annotation(before: str, annotation: object) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return before + text


def _default(value: object) -> str:
    if isinstance(value, bytes) and len(value) > 8 and not any(value):
        return f"bytes({len(value)})"
    text = repr(value)
    return "..." if " at 0x" in text or text.startswith("<") else text


@cache
def _class_body(cls: type) -> list[ast.stmt]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node.body


def described_fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of each public annotated attribute with a string below it."""
    body = _class_body(cls)
    for node, after in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and not node.target.id.startswith("_")
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            meaning = inline(" ".join(after.value.value.split()))
            yield node.target.id, ast.unparse(node.annotation), meaning


def public_members(cls: type) -> Iterator[tuple[str, object]]:
    """Yield the public methods and properties of a class, inherited ones of ours included."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith(("vmbus", "storvsp")):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            if isinstance(value, staticmethod | classmethod):
                yield name, value.__func__
            elif inspect.isfunction(value) or isinstance(value, property):
                yield name, value


def public_names(module: str) -> list[tuple[str, object]]:
    """Return what a module says is public, in its order."""
    found = importlib.import_module(module)
    return [(name, getattr(found, name)) for name in found.__all__]
