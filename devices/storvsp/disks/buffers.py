"""Arithmetic on ranges, shared by the back-ends."""

from __future__ import annotations

from collections.abc import Iterable

from storvsp.disk import Extent, OutOfRangeError


def check_range(offset: int, length: int, size: int) -> None:
    """Refuse a range that is not inside a disk of ``size`` bytes.

    Raises:
        OutOfRangeError: It is not.
    """
    if offset + length > size:
        raise OutOfRangeError(
            f"bytes {offset} to {offset + length} are not inside the disk of {size} bytes",
            offset=max(offset, size),
        )


def merge_extents(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours of the same state, drop empty extents."""
    merged: list[Extent] = []
    for extent in extents:
        if not extent.length:
            continue
        if merged and merged[-1].mapped == extent.mapped:
            last = merged.pop()
            extent = Extent(last.offset, last.length + extent.length, mapped=last.mapped)  # noqa: PLW2901
        merged.append(extent)
    return merged
