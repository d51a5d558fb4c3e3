"""Stand-ins for guest memory, the scatter lists that lie in it, and data to put there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_GUARD = 16
_GUARD_BYTE = 0xA5


class GuestPages:
    """Separate buffers with guard bytes between them.

    Args:
        lengths: Bytes of each buffer; 0 is allowed.
        fill: Value of every byte to begin with.
    """

    def __init__(self, lengths: Sequence[int], fill: int = 0) -> None:
        self._lengths = lengths
        guard = bytes((_GUARD_BYTE,)) * _GUARD
        self._bytes = bytearray(guard)
        starts = []
        for length in lengths:
            starts.append(len(self._bytes))
            self._bytes += bytes((fill,)) * length + guard
        view = memoryview(self._bytes)
        self.buffers = [
            view[start : start + length] for start, length in zip(starts, lengths, strict=True)
        ]

    @classmethod
    def holding(cls, data: bytes, lengths: Sequence[int]) -> GuestPages:
        """Make buffers of these lengths that hold ``data``."""
        memory = cls(lengths)
        start = 0
        for buffer in memory.buffers:
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)
        return memory

    def contents(self) -> bytes:
        """All buffers, joined."""
        return b"".join(self.buffers)

    def guards_are_whole(self) -> bool:
        """Whether nothing was written beside the buffers."""
        position = 0
        for length in (*self._lengths, 0):
            if self._bytes[position : position + _GUARD] != bytes((_GUARD_BYTE,)) * _GUARD:
                return False
            position += _GUARD + length
        return True


def shapes(length: int) -> Iterator[list[int]]:
    """Ways to cut ``length`` bytes into buffers."""
    yield [length]
    first_page = min(512, length)  # a guest's buffer begins inside a page
    yield [first_page, *_cut(length - first_page, [4096])]
    yield _cut(length, [1, 511, 4093, 7, 100])
    yield [0, *_cut(length, [4096, 0]), 0]
    if length > 2048:
        yield _cut(length, [length // 2048 + 1])  # more buffers than one preadv takes


def _cut(length: int, pattern: Sequence[int]) -> list[int]:
    lengths: list[int] = []
    while length:
        piece = min(length, pattern[len(lengths) % len(pattern)])
        lengths.append(piece)
        length -= piece
    return lengths


def pattern(length: int, seed: int) -> bytes:
    """Bytes without long runs of zeros, which a back-end may treat differently."""
    return random.Random(seed).randbytes(length)  # noqa: S311 - data, not secrets
