"""Arithmetic on scatter lists and ranges, shared by the back-ends."""

from __future__ import annotations

from collections.abc import Iterable

from storvsp.disk import Buffers, Extent, OutOfRangeError


def total_length(buffers: Buffers) -> int:
    """Bytes in all buffers together."""
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))


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


def cut(buffers: Buffers, start: int, length: int) -> list[memoryview]:
    """The part of a scatter list from byte ``start``, ``length`` bytes long, without a copy.

    Returns:
        Views of the same memory; shorter in total if the list ends before.
    """
    pieces: list[memoryview] = []
    for buffer in buffers:
        if length <= 0:
            break
        size = len(buffer)
        if start >= size:
            start -= size
            continue
        piece = buffer[start : start + length]
        start = 0
        length -= len(piece)
        pieces.append(piece)
    return pieces


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
