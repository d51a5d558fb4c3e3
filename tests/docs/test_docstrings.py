"""Docstrings become Markdown as they were meant."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

from tests.support.docstrings import (
    described_fields,
    first_section,
    inline,
    markdown,
    public_members,
    signature,
    summary,
)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("a ``b`` c", "a `b` c"),
        ("see :meth:`Disk.readv`", "see `Disk.readv`"),
        ("see :class:`~storvsp.disk.Disk`", "see `Disk`"),
        ("``a`` and ``b|c``", "`a` and `b|c`"),
    ],
)
def test_roles_and_literals_become_code(text, made):
    assert inline(text) == made


def test_titles_become_headings():
    assert markdown("One.\n\nTitle\n-----\nText.", 4) == "One.\n\n#### Title\n\nText."


def test_a_literal_block_becomes_a_fence():
    text = "As in::\n\n    a = 1\n\n    b = 2\n\nAfter."
    assert markdown(text) == "As in:\n\n```text\na = 1\n\nb = 2\n```\n\nAfter."
    assert markdown("::\n\n    x") == "```text\nx\n```"


def test_a_simple_table_becomes_one():
    text = "=====  =====\n``a``  first\n       more\nb      second\n=====  =====\nAfter."
    assert markdown(text) == "| | |\n|---|---|\n| `a` | first more |\n| b | second |\nAfter."


async def fetch(name: str, *rest: int, limit: int | None = None, fill: bytes = bytes(9)) -> str:
    """Fetch it.

    Over :func:`the` wire.

    Args:
        name: Of it.
    """
    return name


@contextlib.asynccontextmanager
async def opened(path: str) -> AsyncIterator[int]:
    """Open it."""
    yield len(path)


@dataclasses.dataclass
class Example:
    """An example."""

    size: int
    """How large: in
    bytes."""
    _hidden: int = 0
    """Nobody's."""

    def grow(self, by: int) -> None:
        """Make it larger."""

    @property
    def empty(self) -> bool:
        """Whether it is."""
        return not self.size


def test_what_is_said_before_the_arguments_is_the_first_section():
    assert first_section(fetch) == "Fetch it.\n\nOver `the` wire."
    assert summary(fetch) == "Fetch it."


def test_a_signature_is_as_it_is_written():
    assert signature("fetch", fetch) == (
        "async fetch(\n"
        "    name: str,\n"
        "    *rest: int,\n"
        "    limit: int | None = None,\n"
        "    fill: bytes = bytes(9),\n"
        ") -> str"
    )
    assert signature("fetch", fetch, 200).startswith("async fetch(name: str, *rest: int, limit")
    assert signature("grow", Example.grow) == "grow(by: int) -> None"
    assert signature("Example", Example) == "Example(size: int, _hidden: int = 0)"


def test_what_is_to_be_entered_says_so():
    assert signature("opened", opened) == "async with opened(path: str) -> AsyncIterator[int]"


def test_fields_and_members_are_those_that_are_public():
    assert list(described_fields(Example)) == [("size", "int", "How large: in bytes.")]
    assert list(public_members(Example)) == []  # nobody's but this project's packages
