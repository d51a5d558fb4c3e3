"""pcapng as bytes: the blocks that a trace is made of, written and read.

A file is a row of blocks: type u32, length u32, body, the length once more. The first one says in
which byte order the numbers are. We write little-endian, and read both; what we have no use for is
skipped unseen. Source: draft-ietf-opsawg-pcapng, "PCAP Next Generation Capture File Format".

A file may come from anybody, and may end anywhere, because its writer was killed. Reading takes no
more memory than the largest block that is of use, :data:`MAX_BLOCK`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from vmbus.errors import TraceCutError, TraceError

SECTION = 0x0A0D0D0A
INTERFACE = 1
SIMPLE_PACKET = 3
PACKET = 6
"""An Enhanced Packet Block."""

BYTE_ORDER_MAGIC = 0x1A2B3C4D
UNKNOWN_LENGTH = 0xFFFFFFFFFFFFFFFF
"""A section whose length nobody knows yet."""
MAX_BLOCK = 16 << 20
"""Bytes of a block of the kinds above. Wireshark's limit for packets of most kinds is 256 KiB."""
MAX_COMMENT = 4096
"""Bytes of a comment that we write; longer ones are cut."""

# Options, by the block they are in.
END_OF_OPTIONS = 0
COMMENT = 1
SECTION_HARDWARE = 2
SECTION_OS = 3
SECTION_APPLICATION = 4
INTERFACE_NAME = 2
INTERFACE_DESCRIPTION = 3
INTERFACE_RESOLUTION = 9
INTERFACE_OFFSET = 14
PACKET_FLAGS = 2

INBOUND = 1
OUTBOUND = 2
_DIRECTION = 3
"""Of the flags of a packet."""

NANOSECONDS = 9
"""Resolution of times: 10 to the power of minus that, in seconds."""
_MICROSECONDS = 6

_OPTION = struct.Struct("<HH")
_HEAD = struct.Struct("<II")
_U32 = struct.Struct("<I")
_SECTION_BODY = struct.Struct("<IHHQ")
_INTERFACE_BODY = struct.Struct("<HHI")
_PACKET_HEAD = struct.Struct("<IIIIIII")
"""Block type and length, interface, time (high, low), bytes here, bytes there were."""
_FLAGS = struct.Struct("<HHI")
_PADDING = (b"", bytes(3), bytes(2), bytes(1))
"""What is missing to a multiple of 4, by the remainder."""


# -- writing -------------------------------------------------------------------------------------


def _pack_options(options: Iterable[tuple[int, bytes]]) -> bytes:
    packed = [
        _OPTION.pack(code, len(value)) + value + _PADDING[len(value) & 3] for code, value in options
    ]
    return b"".join([*packed, bytes(4)]) if packed else b""


def _pack_block(kind: int, body: bytes) -> bytes:
    length = _U32.pack(len(body) + 12)
    return b"".join((_U32.pack(kind), length, body, length))


def text_option(code: int, text: str) -> tuple[int, bytes]:
    """Return an option with text, cut to :data:`MAX_COMMENT` bytes of UTF-8. Cannot block."""
    data = text.encode("utf-8", "replace")
    if len(data) > MAX_COMMENT:
        data = data[:MAX_COMMENT].decode("utf-8", "ignore").encode()
    return code, data


def pack_section(options: Iterable[tuple[int, bytes]] = ()) -> bytes:
    """Return a Section Header Block, from which on interfaces count from 0. Cannot block."""
    body = _SECTION_BODY.pack(BYTE_ORDER_MAGIC, 1, 0, UNKNOWN_LENGTH)
    return _pack_block(SECTION, body + _pack_options(options))


def pack_interface(
    link_type: int, options: Iterable[tuple[int, bytes]] = (), *, snap_length: int = 0
) -> bytes:
    """Return an Interface Description Block, with times in nanoseconds. Cannot block.

    Args:
        link_type: What the packets of this interface are.
        options: Its name and so on.
        snap_length: Bytes of a packet at most; 0: no limit.
    """
    resolution = (INTERFACE_RESOLUTION, bytes([NANOSECONDS]))
    body = _INTERFACE_BODY.pack(link_type, 0, snap_length)
    return _pack_block(INTERFACE, body + _pack_options([*options, resolution]))


def pack_packet(
    interface: int,
    time_ns: int,
    data: bytes,
    *,
    length: int | None = None,
    flags: int = 0,
    comment: bytes = b"",
) -> bytes:
    """Return an Enhanced Packet Block. Cannot block.

    Args:
        interface: Its number in the section.
        time_ns: Nanoseconds since 1970.
        data: The packet.
        length: Bytes that it has, if not all are here.
        flags: :data:`INBOUND` or :data:`OUTBOUND`; 0: neither.
        comment: UTF-8, of :data:`MAX_COMMENT` bytes at most.
    """
    size = len(data)
    padding = _PADDING[size & 3]
    rest = padding
    if flags:
        rest += _FLAGS.pack(PACKET_FLAGS, 4, flags)
    if comment:
        rest += _OPTION.pack(COMMENT, len(comment)) + comment + _PADDING[len(comment) & 3]
    if len(rest) != len(padding):
        rest += b"\0\0\0\0"
    total = 32 + size + len(rest)
    head = _PACKET_HEAD.pack(
        PACKET, total, interface, time_ns >> 32, time_ns & 0xFFFFFFFF, size,
        size if length is None else length,
    )  # fmt: skip
    return b"".join((head, data, rest, _U32.pack(total)))


# -- reading -------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of a file."""

    position: int
    """Where it begins, in bytes from the beginning of the file."""
    kind: int
    order: str
    """``<`` or ``>``, for :mod:`struct`."""
    body: bytes


class Interface(NamedTuple):
    """Where packets were seen."""

    link_type: int
    name: str
    description: str
    ticks_per_second: int
    """Of the times of its packets."""
    offset: int
    """Seconds to be added to them."""


class CapturedPacket(NamedTuple):
    """A packet as it stands in a file."""

    interface: int
    ticks: int
    data: bytes
    length: int
    """Bytes that it had; more than there are here if it was cut."""
    flags: int
    comment: str

    @property
    def direction(self) -> int:
        """INBOUND, OUTBOUND or 0."""
        return self.flags & _DIRECTION


def blocks_untrusted(file: BinaryIO) -> Iterator[Block]:
    """Yield the blocks of a file in which packets may be, in order. Blocks as reading does.

    Args:
        file: Read from its beginning on, and never sought in.

    Raises:
        TraceCutError: The file ends within a block; all before it were yielded.
        TraceError: It is no such file, or is one no longer from a position on.
    """
    position = 0
    order = ""
    while head := _read(file, 8):
        if len(head) < 8:
            raise TraceCutError("the file ends within a block", position)
        kind = struct.unpack_from(f"{order or '<'}I", head)[0]
        start = b""
        if kind == SECTION:
            start = _read(file, 4)
            if len(start) < 4:
                raise TraceCutError("the file ends within a block", position)
            order = _byte_order_untrusted(start, position)
        elif not order:
            raise TraceError(f"no pcapng file{_what_else(head)}", position)
        (length,) = struct.unpack_from(f"{order}I", head, 4)
        if length < 12 + len(start) or length & 3:
            raise TraceError(f"a block of {length} bytes", position)
        if kind in _OF_USE:
            if length > MAX_BLOCK:
                raise TraceError(f"a block of {length} bytes; {MAX_BLOCK} are possible", position)
            body = start + _read(file, length - 12 - len(start))
            complete = len(body) == length - 12
        else:
            body = b""
            complete = _skip(file, length - 12)
        end = _read(file, 4) if complete else b""
        if len(end) < 4:
            raise TraceCutError("the file ends within a block", position)
        if struct.unpack(f"{order}I", end)[0] != length:
            raise TraceError(
                f"a block says {length} bytes in the beginning, and not so at its end", position
            )
        if kind in _OF_USE:
            yield Block(position, kind, order, body)
        position += length


_OF_USE = frozenset({SECTION, INTERFACE, PACKET, SIMPLE_PACKET})
_PIECE = 1 << 20


def _read(file: BinaryIO, size: int) -> bytes:
    """Read so many bytes, or all there are; memory is taken as they come."""
    data = file.read(min(size, _PIECE))
    if len(data) == size or not data:
        return data
    pieces = [data]
    left = size - len(data)
    while left and (data := file.read(min(left, _PIECE))):
        pieces.append(data)
        left -= len(data)
    return b"".join(pieces)


def _skip(file: BinaryIO, size: int) -> bool:
    """Read over so many bytes; return whether there were so many."""
    while size:
        data = file.read(min(size, _PIECE))
        if not data:
            return False
        size -= len(data)
    return True


def _byte_order_untrusted(magic: bytes, position: int) -> str:
    for order in "<>":
        if struct.unpack(f"{order}I", magic)[0] == BYTE_ORDER_MAGIC:
            return order
    raise TraceError(f"a section without a byte order: {magic.hex()}", position)


_FOREIGN = {
    bytes.fromhex("a1b2c3d4"): ", but one of the older pcap format",
    bytes.fromhex("d4c3b2a1"): ", but one of the older pcap format",
    bytes.fromhex("a1b23c4d"): ", but one of the older pcap format",
    bytes.fromhex("4d3cb2a1"): ", but one of the older pcap format",
}


def _what_else(head: bytes) -> str:
    if head[:2] == b"\x1f\x8b":
        return ", but a compressed one"
    return _FOREIGN.get(head[:4], "")


def _options_untrusted(block: Block, start: int, wanted: Collection[int]) -> dict[int, bytes]:
    """Return the first option of each wanted code. Those behind a broken one are not looked for."""
    body = block.body
    found: dict[int, bytes] = {}
    head = struct.Struct(f"{block.order}HH")
    while start + 4 <= len(body):
        code, length = head.unpack_from(body, start)
        if code == END_OF_OPTIONS or start + 4 + length > len(body):
            break
        if code in wanted and code not in found:
            found[code] = body[start + 4 : start + 4 + length]
        start += 4 + (length + 3 & ~3)
    return found


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")


def parse_section_untrusted(block: Block) -> dict[int, str]:
    """Return what a Section Header Block says: text by the number of the option. Cannot block.

    Raises:
        TraceError: It is too short, or of a format that came after version 1.
    """
    if len(block.body) < 16:
        raise TraceError("a section header of less than 16 bytes", block.position)
    (major,) = struct.unpack_from(f"{block.order}H", block.body, 4)
    if major != 1:
        raise TraceError(f"pcapng of version {major}; 1 is known", block.position)
    wanted = (COMMENT, SECTION_HARDWARE, SECTION_OS, SECTION_APPLICATION)
    options = _options_untrusted(block, 16, wanted)
    return {code: _text(value) for code, value in options.items()}


def parse_interface_untrusted(block: Block) -> Interface:
    """Parse an Interface Description Block. Cannot block.

    Raises:
        TraceError: It is too short.
    """
    body, order = block.body, block.order
    if len(body) < 8:
        raise TraceError("an interface description of less than 8 bytes", block.position)
    (link_type,) = struct.unpack_from(f"{order}H", body)
    wanted = (INTERFACE_NAME, INTERFACE_DESCRIPTION, INTERFACE_RESOLUTION, INTERFACE_OFFSET)
    options = _options_untrusted(block, 8, wanted)
    resolution = (options.get(INTERFACE_RESOLUTION) or bytes([_MICROSECONDS]))[0]
    power = resolution & 0x7F
    # 10 to the power of 127 is no time that anybody has measured, but a number it is.
    ticks = 1 << power if resolution & 0x80 else 10**power
    offset = options.get(INTERFACE_OFFSET, b"")
    return Interface(
        link_type,
        _text(options.get(INTERFACE_NAME, b"")),
        _text(options.get(INTERFACE_DESCRIPTION, b"")),
        ticks,
        struct.unpack(f"{order}q", offset)[0] if len(offset) == 8 else 0,
    )


def parse_packet_untrusted(block: Block) -> CapturedPacket:
    """Parse an Enhanced Packet Block. Cannot block.

    Raises:
        TraceError: It is too short for what it says.
    """
    body, order = block.body, block.order
    if len(body) < 20:
        raise TraceError("a packet block of less than 32 bytes", block.position)
    interface, high, low, here, there = struct.unpack_from(f"{order}IIIII", body)
    if here > len(body) - 20:
        raise TraceError(f"a packet of {here} bytes in a block of {len(body) + 12}", block.position)
    end = 20 + (here + 3 & ~3)
    flags, comment = 0, ""
    if end < len(body):
        options = _options_untrusted(block, end, (PACKET_FLAGS, COMMENT))
        if len(options.get(PACKET_FLAGS, b"")) == 4:
            (flags,) = struct.unpack(f"{order}I", options[PACKET_FLAGS])
        comment = _text(options.get(COMMENT, b""))
    return CapturedPacket(
        interface, high << 32 | low, body[20 : 20 + here], max(there, here), flags, comment
    )


def parse_simple_untrusted(block: Block) -> CapturedPacket:
    """Parse a Simple Packet Block, which has neither time nor direction. Cannot block.

    Raises:
        TraceError: It is too short.
    """
    if len(block.body) < 4:
        raise TraceError("a simple packet block of less than 16 bytes", block.position)
    (length,) = struct.unpack_from(f"{block.order}I", block.body)
    return CapturedPacket(0, 0, block.body[4 : 4 + length], length, 0, "")
