"""Names of a test's parameters that are the same in every process."""

from __future__ import annotations


def plain(value: object) -> str:
    """Return a name without an address: that of a function is its own."""
    return str(getattr(value, "__name__", None) or str(value)[:40])
