"""DNS, as far as a host's own look-up can answer it: addresses of a name. Source: RFC 1035."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

PORT = 53
A, AAAA = 1, 28
OK, FORMAT_ERROR, SERVER_FAILURE, NO_SUCH_NAME, NOT_IMPLEMENTED = range(5)
MAX_ADDRESSES = 12
"""Of one answer: as many of IPv6 as go into 512 bytes with the longest name."""

_HEADER = struct.Struct(">HHHHHH")
_QUESTION = struct.Struct(">HH")
_RECORD = struct.Struct(">HHHIH")
_RESPONSE, _RECURSION = 0x8000, 0x0180
_OPCODE = 0x7800
_NAME_OF_QUESTION = 0xC00C
_TTL = 60
_MAX_NAME = 255
_LABEL = re.compile(rb"[A-Za-z0-9_-]{1,63}")


class Query(NamedTuple):
    """What is asked for."""

    number: int
    name: str
    kind: int
    """A or AAAA, or another type, which nobody here knows."""
    question: bytes
    """As it came."""


def parse_query_untrusted(data: bytes) -> Query:
    """Parse a query with one question. Raises GuestProtocolError."""
    if len(data) < _HEADER.size:
        raise GuestProtocolError(f"a DNS message of {len(data)} bytes", field="dns")
    number, flags, questions, _answers, _authorities, _more = _HEADER.unpack_from(data)
    if flags & (_RESPONSE | _OPCODE) or questions != 1:
        raise GuestProtocolError("a DNS message that is no query", field="dns.flags")
    labels: list[bytes] = []
    position = _HEADER.size
    while True:
        length = data[position] if position < len(data) else 64
        if length > 63 or position - _HEADER.size + length >= _MAX_NAME:
            raise GuestProtocolError("a DNS name without an end", field="dns.qname")
        position += 1
        if not length:
            break
        labels.append(data[position : position + length])
        position += length
    end = position + _QUESTION.size
    if end > len(data):
        raise GuestProtocolError("a DNS question without a type", field="dns.qtype")
    kind, network = _QUESTION.unpack_from(data, position)
    if network != 1:
        raise GuestProtocolError(f"a DNS question of class {network}", field="dns.qclass")
    if not all(_LABEL.fullmatch(label) for label in labels):
        labels = []  # no name of a host
    name = b".".join(labels).decode("ascii")
    return Query(number, name, kind, data[_HEADER.size : end])


def answer(query: Query, code: int, addresses: Sequence[bytes] = ()) -> bytes:
    """Build the answer to a query, of up to 512 bytes. Cannot block.

    Args:
        query: It.
        code: OK or why there is none.
        addresses: Of four bytes for A, of 16 for AAAA.
    """
    some = addresses[:MAX_ADDRESSES]
    head = _HEADER.pack(query.number, _RESPONSE | _RECURSION | code, 1, len(some), 0, 0)
    records = [
        _RECORD.pack(_NAME_OF_QUESTION, query.kind, 1, _TTL, len(each)) + each for each in some
    ]
    return head + query.question + b"".join(records)
