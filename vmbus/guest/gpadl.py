"""How drivers describe pages to the host: the messages of one GPADL, and its handle.

Sources: linux/drivers/hv/channel.c (``create_gpadl_header``), freebsd/sys/dev/hyperv/vmbus
(``vmbus_chan_gpadl_connect``), openbsd/sys/dev/pv/hyperv.c (``hv_handle_alloc``), MacHyperVSupport
(full header), mu_msvm (240 bytes always).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmbus.guest.personality import GpadlPadding, Personality
from vmbus.wire.gpa import PAGE_SIZE, build_range
from vmbus.wire.messages import (
    GPADL_BODY_DATA,
    GpadlBody,
    GpadlHeader,
    Message,
)

JUNK_PFN = struct.pack("<Q", 0x00DE_ADBE_EFDE_ADBE)
"""Far outside any RAM: a host that maps it has read too far."""
_HEADER_PFNS = 26
_BODY_DATA = GPADL_BODY_DATA - GPADL_BODY_DATA % 8


class Gpadl:
    """Pages the host may use, until :meth:`~vmbus.guest.channels.Channels.teardown_gpadl`."""

    def __init__(self, relid: int, handle: int, pfns: list[int]) -> None:
        self.relid = relid
        self.handle = handle
        self.pfns = pfns


class Handles:
    """GPADL handles in a personality's style."""

    def __init__(self, personality: Personality) -> None:
        self._first = self._next = personality.first_gpadl
        self._last = personality.gpadl_reuse
        self._used: set[int] = set()

    def take(self) -> int:
        """Return a handle that is not in use."""
        if self._last:
            handle = next(n for n in range(self._first, self._last + 1) if n not in self._used)
        else:
            handle = self._next
            self._next += 1
        self._used.add(handle)
        return handle

    def release(self, handle: int) -> None:
        """Give a handle back after TORNDOWN."""
        self._used.discard(handle)


def gpadl_messages(
    personality: Personality, relid: int, handle: int, pfns: Sequence[int], byte_count: int
) -> list[Message]:
    """Return the messages that describe one range of whole pages. Cannot block.

    Args:
        personality: Whose habits to follow.
        relid: Channel that the GPADL belongs to.
        handle: Its handle.
        pfns: Page frame numbers, up to 8190.
        byte_count: Bytes of the range, from the start of the first page on.
    """
    data = build_range(byte_count, 0, pfns)
    assert len(pfns) * PAGE_SIZE >= byte_count
    first = data[: 8 + 8 * _HEADER_PFNS]
    if personality.gpadl_padding is GpadlPadding.FULL_HEADER:
        first += JUNK_PFN * ((8 + 8 * _HEADER_PFNS - len(first)) // 8)
    messages: list[Message] = [
        GpadlHeader(relid=relid, gpadl=handle, range_buflen=len(data), range_count=1, data=first)
    ]
    position = 8 + 8 * _HEADER_PFNS
    if personality.gpadl_padding is GpadlPadding.SURPLUS_BODIES:
        return messages + _surplus_bodies(handle, data[position:])
    number = 0
    while position < len(data):
        number += personality.numbers_bodies
        part = data[position : position + _BODY_DATA]
        messages.append(GpadlBody(message_number=number, gpadl=handle, data=part))
        position += len(part)
    return messages


def _surplus_bodies(handle: int, data: bytes) -> list[Message]:
    """Return the bodies of OpenBSD and NetBSD: ``n / 28 + n % 28`` for n page numbers, not n / 28.

    A ring of 42 pages, of which 26 stand in the header, is followed by 16 bodies: one with the
    other 16 page numbers and 12 zeros, 14 with 28 zeros each, and one with nothing in it.
    """
    left = len(data) // 8
    most = _BODY_DATA // 8
    count = left // most + left % most
    bodies: list[Message] = []
    for number in range(count):
        part = data[number * _BODY_DATA : (number + 1) * _BODY_DATA]
        if number < count - 1:
            part = part.ljust(_BODY_DATA, b"\0")
        bodies.append(GpadlBody(message_number=0, gpadl=handle, data=part))
    return bodies
