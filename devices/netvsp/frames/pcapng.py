"""Captures: pcapng as it is written here, and pcapng or pcap as others write it.

Source: draft-ietf-opsawg-pcapng. Every block has its length before and behind it, and is a multiple
of four bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from netvsp.frames.frame import Buffer

INBOUND, OUTBOUND = 1, 2
"""Directions, as the machine sees it whose interface it is: epb_flags, bits 0 and 1."""
LINKTYPE_ETHERNET = 1
MAX_BLOCK = 16 << 20
"""Bytes of a block that is read."""

_SECTION, _INTERFACE, _SIMPLE, _PACKET = 0x0A0D0D0A, 1, 3, 6
_MAGIC = 0x1A2B3C4D
_PCAP = {0xA1B2C3D4: 1_000_000, 0xA1B23C4D: 1_000_000_000}
"""Magic numbers of the old format, and their ticks in a second."""
_END, _NAME, _RESOLUTION, _FLAGS = 0, 2, 9, 2
_NANOSECONDS = 9
_ENHANCED = struct.Struct("<IIIII")


class CaptureError(ValueError):
    """A file is no capture, or is damaged."""


class Captured(NamedTuple):
    """One frame of a capture."""

    data: bytes
    time: float
    """Seconds since 1970."""
    direction: int
    """INBOUND, OUTBOUND, or 0: nobody knows."""


# -- writing ---------------------------------------------------------------------------------------


def _block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = (len(body) + 12).to_bytes(4, "little")
    return b"".join((kind.to_bytes(4, "little"), length, body, length))


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def build_header(name: str, snap: int) -> bytes:
    """Build what a file begins with: a section and its one interface. Cannot block.

    Args:
        name: Of the interface, for people.
        snap: Bytes of a frame that are kept at most; 0: all.
    """
    section = struct.pack("<IHHq", _MAGIC, 1, 0, -1)
    options = _option(_NAME, name.encode()) + _option(_RESOLUTION, bytes((_NANOSECONDS,)))
    interface = struct.pack("<HHI", LINKTYPE_ETHERNET, 0, snap) + options + _option(_END, b"")
    return _block(_SECTION, section) + _block(_INTERFACE, interface)


def build_packet(data: Buffer, length: int, nanoseconds: int, direction: int) -> bytes:
    """Build the block of one frame. Cannot block.

    Args:
        data: Its bytes, as many as are kept.
        length: Bytes that it had.
        nanoseconds: Since 1970.
        direction: INBOUND or OUTBOUND.
    """
    head = _ENHANCED.pack(0, nanoseconds >> 32, nanoseconds & 0xFFFFFFFF, len(data), length)
    options = _option(_FLAGS, direction.to_bytes(4, "little")) + _option(_END, b"")
    return _block(_PACKET, b"".join((head, data, bytes(-len(data) % 4), options)))


# -- reading ---------------------------------------------------------------------------------------

Read = Callable[[int], bytes]
"""Returns as many bytes as it is asked for, or fewer at the end."""


def read_capture(read: Read) -> Iterator[Captured]:
    """Yield the frames of a capture. Blocks as ``read`` does.

    Args:
        read: Such as a file's.

    Raises:
        CaptureError: It is none, is damaged, or is not of Ethernet.
    """
    start = read(4)
    if len(start) < 4:
        raise CaptureError("it is empty")
    if start == _SECTION.to_bytes(4, "big"):  # reads the same in either order
        yield from _read_pcapng(read)
        return
    for order in ("<", ">"):
        ticks = _PCAP.get(struct.unpack(order + "I", start)[0])
        if ticks:
            yield from _read_pcap(read, order, ticks)
            return
    raise CaptureError("it is neither pcapng nor pcap")


def _exactly(read: Read, count: int) -> bytes:
    data = read(count)
    if len(data) < count:
        raise CaptureError("it ends in the middle")
    return data


def _read_pcap(read: Read, order: str, ticks: int) -> Iterator[Captured]:
    header = _exactly(read, 20)
    if struct.unpack_from(order + "I", header, 16)[0] & 0xFFFF != LINKTYPE_ETHERNET:
        raise CaptureError("its frames are not of Ethernet")
    while head := read(16):
        if len(head) < 16:
            raise CaptureError("it ends in the middle")
        seconds, parts, size, _length = struct.unpack(order + "IIII", head)
        if size > MAX_BLOCK:
            raise CaptureError(f"a frame of {size} bytes")
        yield Captured(_exactly(read, size), seconds + parts / ticks, 0)


def _read_pcapng(read: Read) -> Iterator[Captured]:
    order = "<"
    kind = _SECTION
    interfaces: list[float] = []
    """Ticks in a second, of each."""
    while True:
        head = _exactly(read, 4)
        body = b""
        if kind == _SECTION:
            magic = _exactly(read, 4)
            order = "<" if magic == _MAGIC.to_bytes(4, "little") else ">"
            if struct.unpack(order + "I", magic)[0] != _MAGIC:
                raise CaptureError("a section of no known order")
            interfaces.clear()
            body = magic
        length = struct.unpack(order + "I", head)[0]
        if length % 4 or not 12 + len(body) <= length <= MAX_BLOCK:
            raise CaptureError(f"a block of {length} bytes")
        body += _exactly(read, length - 12 - len(body))
        if _exactly(read, 4) != head:
            raise CaptureError("a block with two lengths")
        if kind == _INTERFACE:
            interfaces.append(_ticks(order, body))
        elif kind == _PACKET:
            yield _packet(order, body, interfaces)
        elif kind == _SIMPLE:
            if len(body) < 4:
                raise CaptureError("a packet without its length")
            size = struct.unpack_from(order + "I", body)[0]
            yield Captured(body[4 : 4 + size], 0.0, 0)
        start = read(4)
        if not start:
            return
        if len(start) < 4:
            raise CaptureError("it ends in the middle")
        kind = struct.unpack(order + "I", start)[0]


def _options(order: str, data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(data):
        code, length = struct.unpack_from(order + "HH", data, position)
        if code == _END:
            break
        found.setdefault(code, data[position + 4 : position + 4 + length])
        position += 4 + length + -length % 4
    return found


def _ticks(order: str, body: bytes) -> float:
    if len(body) < 8:
        raise CaptureError("an interface without a type")
    if struct.unpack_from(order + "H", body)[0] != LINKTYPE_ETHERNET:
        raise CaptureError("its frames are not of Ethernet")
    resolution = (_options(order, body[8:]).get(_RESOLUTION) or b"\x06")[0]
    base = 2.0 if resolution & 0x80 else 10.0
    return float(base ** (resolution & 0x7F))


def _packet(order: str, body: bytes, interfaces: list[float]) -> Captured:
    if len(body) < _ENHANCED.size:
        raise CaptureError("a packet without its head")
    number, high, low, size, _length = struct.unpack_from(order + "IIIII", body)
    end = _ENHANCED.size + size
    if number >= len(interfaces) or end > len(body):
        raise CaptureError(f"a packet of {size} bytes, of interface {number}")
    flags = _options(order, body[end + -size % 4 :]).get(_FLAGS, b"")
    direction = struct.unpack(order + "I", flags)[0] & 3 if len(flags) == 4 else 0
    return Captured(body[_ENHANCED.size : end], (high << 32 | low) / interfaces[number], direction)
