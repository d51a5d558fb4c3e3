"""Fixed little-endian layouts of ``vmbus-user`` payloads: one declaration, packed, parsed, listed.

A :class:`Layout` is the table of a message in the specification (``docs/reference/vmbus-user.md``)
as Python data: names and sizes in wire order, without padding. The tests hold the two together.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Self, cast

from vmbus.errors import LocalProtocolError, PeerProtocolError

_CODES = {2: "H", 4: "I", 8: "Q", 16: "16s"}


class Field(NamedTuple):
    """One field: its place is the sum of the sizes before it."""

    name: str
    """As in the specification; ``reserved`` is sent as 0 and must be 0."""
    size: int
    """2, 4 or 8 for an unsigned integer, 16 for bytes that are not interpreted."""


class Layout:
    """A run of fields without padding."""

    __slots__ = ("_names", "_reserved", "_struct", "fields", "size")

    def __init__(self, *fields: Field) -> None:
        self.fields = fields
        self._struct = struct.Struct("<" + "".join(_CODES[field.size] for field in fields))
        self.size = self._struct.size
        self._reserved = tuple(i for i, field in enumerate(fields) if field.name == "reserved")
        self._names = tuple(field.name for field in fields if field.name != "reserved")

    def pack(self, source: object) -> bytes:
        """Read the fields off ``source``'s attributes.

        Raises:
            LocalProtocolError: A value does not fit its field.
        """
        values = [
            0 if field.name == "reserved" else getattr(source, field.name) for field in self.fields
        ]
        try:
            return self._struct.pack(*values)
        except struct.error as error:
            raise LocalProtocolError(f"{type(source).__name__}: {error}") from error

    def unpack_untrusted(self, owner: str, data: bytes, *, exact: bool = True) -> list[object]:
        """Parse the fields at the start of ``data``; ``reserved`` ones are checked and left out.

        Args:
            owner: Name of the message, for the error's text.
            data: The payload; at least :attr:`size` bytes, exactly that many with ``exact``.
            exact: Whether anything after the fields is an error.

        Raises:
            PeerProtocolError: EMSGSIZE for a wrong length, EINVAL for a reserved field not 0.
        """
        if len(data) < self.size or (exact and len(data) != self.size):
            bound = "exactly" if exact else "at least"
            raise PeerProtocolError(
                f"{owner}: length is {len(data)}, must be {bound} {self.size}",
                errno=errno.EMSGSIZE,
            )
        values = list(self._struct.unpack_from(data))
        for index in reversed(self._reserved):
            if values.pop(index):
                raise PeerProtocolError(f"{owner}: reserved must be 0", errno=errno.EINVAL)
        return values


def require(condition: object, text: str, code: int = errno.EINVAL) -> None:
    """Raise PeerProtocolError with ``text`` unless ``condition`` holds."""
    if not condition:
        raise PeerProtocolError(text, errno=code)


class Payload:
    """Base of the payloads that are nothing but a layout; subclasses are frozen dataclasses."""

    __slots__ = ()
    NAME: ClassVar[str]
    LAYOUT: ClassVar[Layout]

    def check(self) -> None:
        """Raise PeerProtocolError if a field's value breaks a rule; most have none of their own."""

    def encode(self) -> bytes:
        """Return the payload. Raises LocalProtocolError for values that do not fit."""
        return self.LAYOUT.pack(self)

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse a payload of exactly the layout's size. Raises PeerProtocolError."""
        make = cast("Callable[..., Self]", cls)
        message = make(*cls.LAYOUT.unpack_untrusted(cls.NAME, data))
        message.check()
        return message


def encode_text(text: str, limit: int) -> bytes:
    """Return ``text`` as UTF-8 of at most ``limit`` bytes, cut at a character boundary."""
    data = text.encode("utf-8", "replace")
    if len(data) > limit:
        data = data[:limit].decode("utf-8", "ignore").encode()
    return data


def printable(text: str) -> str:
    """Return ``text`` with control characters made spaces, as decode_text_untrusted wants it."""
    return "".join(char if ord(char) >= 0x20 and ord(char) != 0x7F else " " for char in text)


def decode_text_untrusted(owner: str, data: bytes, low: int, high: int) -> str:
    """Parse UTF-8 text of ``low`` to ``high`` bytes without control characters.

    The text may be logged and shown on terminals, hence the ban (C0, DEL; newlines included).
    """
    require(
        low <= len(data) <= high,
        f"{owner}: text is {len(data)} bytes, must be {low} to {high}",
        errno.EMSGSIZE,
    )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise PeerProtocolError(f"{owner}: text is not UTF-8", errno=errno.EINVAL) from None
    require(text == printable(text), f"{owner}: text must not hold control characters")
    return text


def sizes(fields: Sequence[Field]) -> list[tuple[int, int, str]]:
    """Return (offset, size, name) of every field: the rows of the specification's tables."""
    rows = []
    offset = 0
    for field in fields:
        rows.append((offset, field.size, field.name))
        offset += field.size
    return rows
