"""Words for messages about names: which there are, and which one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def suggest(word: str, known: Collection[str]) -> str:
    """Return the end of a message about a word that is none of the known ones."""
    if not known:
        return "there are none"
    close = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {enumerate_words(sorted(known), 'and')}"


def enumerate_words(words: Iterable[str], conjunction: str) -> str:
    """Return ``a, b and c``; there has to be one word at least."""
    *head, last = words
    return f"{', '.join(head)} {conjunction} {last}" if head else last
