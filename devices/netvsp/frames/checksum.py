"""The Internet checksum, without a loop over words.

The ones' complement sum of 16-bit words is what remains of the whole, taken as one large number,
when it is divided by 65535: 65536 leaves 1, so every word counts the same wherever it stands. That
Python does in C. And as the sum of swapped words is the swapped sum (RFC 1071, section 2 B), the
order of bytes does not matter either, as long as it is the same at both ends.
"""

from __future__ import annotations

from collections.abc import Iterable

from netvsp.frames.frame import Buffer

_CHUNK = 2048
"""Bytes that are taken as one number; an even count, so that all words count the same."""

_SHORT = 512
"""Bytes of which a sum is made in one piece."""


def ones_sum(data: Buffer) -> int:
    """Return the ones' complement sum of 16-bit words in network order, 0 to 65535. Cannot block.

    Args:
        data: Any number of bytes; an odd last one is followed by a zero.
    """
    if len(data) & 1:
        data = bytes(data) + b"\0"
    size = len(data)
    if size <= _SHORT:
        number = int.from_bytes(data, "big")
    elif size <= _CHUNK:
        # What nearly all frames are: in four parts, without a loop.
        part = size >> 3 << 1
        number = (
            int.from_bytes(data[:part], "big")
            + int.from_bytes(data[part : 2 * part], "big")
            + int.from_bytes(data[2 * part : 3 * part], "big")
            + int.from_bytes(data[3 * part :], "big")
        )
    else:
        # Added first, divided then: dividing takes longer than everything else.
        number = sum(
            [
                int.from_bytes(data[start : start + _CHUNK], "big")
                for start in range(0, size, _CHUNK)
            ]
        )
    # 0 stays 0, but 65535 and its multiples are minus zero, not zero.
    return number % 65535 or (65535 if number else 0)


def fold(total: int) -> int:
    """Return the ones' complement sum of sums. Cannot block."""
    return total % 65535 or (65535 if total else 0)


def sum_pieces(pieces: Iterable[Buffer], total: int = 0) -> int:
    """Return the sum of bytes that lie in pieces, added to another sum. Cannot block."""
    odd = False
    for piece in pieces:
        part = ones_sum(piece)
        if odd:
            part = (part & 0xFF) << 8 | part >> 8
        total += part
        odd ^= bool(len(piece) & 1)
    return fold(total)


def checksum(total: int) -> int:
    """Return what stands in a header for a sum: its complement. Cannot block."""
    return ~fold(total) & 0xFFFF


def pseudo_header_sum(addresses: Buffer, protocol: int, length: int) -> int:
    """Return the sum of a pseudo header. Cannot block.

    Args:
        addresses: Source and destination address as they lie in the header, of IPv4 or IPv6.
        protocol: IP protocol number.
        length: Bytes of the header that the sum is for, and what follows it.
    """
    return fold(ones_sum(addresses) + protocol + (length >> 16) + (length & 0xFFFF))
