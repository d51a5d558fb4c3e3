"""An emitter of ACPI machine language: as much of it as a machine without moving parts needs.

Each function returns the bytes of one term; terms are put together by concatenation. Source:
ACPI 6.4, chapters 20 (encoding) and 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct

from vmbus.errors import ConfigError

_NAME_OP = 0x08
_BYTE_PREFIX = 0x0A
_WORD_PREFIX = 0x0B
_DWORD_PREFIX = 0x0C
_STRING_PREFIX = 0x0D
_QWORD_PREFIX = 0x0E
_SCOPE_OP = 0x10
_BUFFER_OP = 0x11
_PACKAGE_OP = 0x12
_DUAL_NAME_PREFIX = 0x2E
_MULTI_NAME_PREFIX = 0x2F
_DEVICE_OP = b"\x5b\x82"

_LEAD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_FOLLOWING = _LEAD | frozenset("0123456789")

_SHORT_IRQ = 0x23
_SHORT_IO = 0x47
_END_TAG = b"\x79\x00"
_QWORD_ADDRESS = 0x8A
_IRQ_EDGE = 0x01
_DECODE_16 = 0x01
_MEMORY_RANGE = 0
_FIXED_WINDOW = 0x0C
"""General flags: minimum and maximum are fixed, positively decoded, the device hands it on."""
_READ_WRITE = 0x01


def _segment(name: str) -> bytes:
    """Return a name of up to four characters, padded with underscores."""
    if not 1 <= len(name) <= 4 or name[0] not in _LEAD or not set(name) <= _FOLLOWING:
        raise ConfigError(f"{name!r} is not an ACPI name")
    return name.ljust(4, "_").encode()


def path(name: str) -> bytes:
    r"""Return a path: optional root ``\``, then segments with dots between."""
    root = b"\\" if name.startswith("\\") else b""
    segments = [_segment(each) for each in name.removeprefix("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + bytes([_DUAL_NAME_PREFIX]) + b"".join(segments)
    return root + bytes([_MULTI_NAME_PREFIX, len(segments)]) + b"".join(segments)


def integer(value: int) -> bytes:
    """Return an integer of 0 to 2**64 - 1 in its shortest form."""
    if value in (0, 1):
        return bytes([value])
    for prefix, kind in (
        (_BYTE_PREFIX, "<B"),
        (_WORD_PREFIX, "<H"),
        (_DWORD_PREFIX, "<I"),
        (_QWORD_PREFIX, "<Q"),
    ):
        if 0 <= value < 1 << 8 * struct.calcsize(kind):
            return bytes([prefix]) + struct.pack(kind, value)
    raise ConfigError(f"{value} does not fit an ACPI integer")


def string(text: str) -> bytes:
    """Return a string of ASCII characters other than NUL."""
    if not text.isascii() or "\0" in text:
        raise ConfigError(f"{text!r} is not an ACPI string")
    return bytes([_STRING_PREFIX]) + text.encode() + b"\0"


def with_length(body: bytes) -> bytes:
    """Put PkgLength before ``body``: the length of itself and of the body, in 1 to 4 bytes."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            # Four bits in the first byte, then whole bytes.
            return bytes([extra << 6 | total & 15]) + (total >> 4).to_bytes(extra, "little") + body
    raise ConfigError("an ACPI package cannot be longer than 2**28 bytes")


def name(where: str, value: bytes) -> bytes:
    """Give the object ``value`` a name."""
    return bytes([_NAME_OP]) + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    """Put terms into an existing place of the name space."""
    return bytes([_SCOPE_OP]) + with_length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Declare a device."""
    return _DEVICE_OP + with_length(path(where) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    """Return a list of up to 255 objects."""
    if len(elements) > 255:
        raise ConfigError("an ACPI package holds 255 elements at most")
    return bytes([_PACKAGE_OP]) + with_length(bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Return a byte buffer."""
    return bytes([_BUFFER_OP]) + with_length(integer(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """Return an identifier of three letters and four hex digits in its compressed form.

    Five bits per letter, four per digit, the most significant byte first (ACPI 6.4, 19.3.4).
    """
    letters, digits = text[:3], text[3:]
    if len(text) != 7 or not set(letters) <= _LEAD - {"_"}:
        raise ConfigError(f"{text!r} is not an EISA identifier")
    try:
        product = int(digits, 16)
    except ValueError:
        raise ConfigError(f"{text!r} is not an EISA identifier") from None
    vendor = 0
    for letter in letters:
        vendor = vendor << 5 | ord(letter) - ord("A") + 1
    return bytes([_DWORD_PREFIX]) + struct.pack(">HH", vendor, product)


# -- resources -------------------------------------------------------------------------------------


def irq(number: int) -> bytes:
    """Return one interrupt line, 0 to 15: edge triggered, active high, exclusive."""
    if not 0 <= number < 16:
        raise ConfigError(f"IRQ {number} does not exist")
    return struct.pack("<BHB", _SHORT_IRQ, 1 << number, _IRQ_EDGE)


def io_ports(first: int, count: int) -> bytes:
    """Return a fixed run of I/O ports."""
    try:
        return struct.pack("<BBHHBB", _SHORT_IO, _DECODE_16, first, first, 1, count)
    except struct.error:
        raise ConfigError(f"I/O ports {first:#x}+{count} cannot be described") from None


def memory_window(gpa: int, size: int) -> bytes:
    """Return a window of addresses (bytes), uncached, that the device hands on to its children."""
    try:
        return struct.pack(
            "<BHBBBQQQQQ",
            _QWORD_ADDRESS,
            43,  # bytes that follow
            _MEMORY_RANGE,
            _FIXED_WINDOW,
            _READ_WRITE,
            0,  # granularity
            gpa,
            gpa + size - 1,
            0,  # translation
            size,
        )
    except struct.error:
        raise ConfigError(f"memory window {gpa:#x}+{size:#x} cannot be described") from None


def resources(*descriptors: bytes) -> bytes:
    """Return a resource template. Its checksum is 0, which means none."""
    return buffer(b"".join(descriptors) + _END_TAG)
