"""DHCP for one client: it always gets the same address. Sources: RFC 2131, RFC 2132."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

SERVER_PORT, CLIENT_PORT = 67, 68
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

_HEADER = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE = bytes((99, 130, 83, 99))
_BROADCAST = 0x8000
_PAD, _END = 0, 255
_MASK, _ROUTER, _DNS, _MTU, _ASKED, _LEASE, _KIND, _SERVER = 1, 3, 6, 26, 50, 51, 53, 54
_MIN_MESSAGE = 300
"""Bytes: what old clients take for the shortest message (RFC 1542, 2.1)."""


class Request(NamedTuple):
    """What a client asks for."""

    kind: int
    transaction: int
    flags: int
    client: bytes
    """The address it has, or zeros."""
    hardware: bytes
    """16 bytes."""
    asked: bytes
    """The address it wants, or nothing."""
    server: bytes
    """The server it means, or nothing."""


class Lease(NamedTuple):
    """What the client gets: addresses of four bytes."""

    address: bytes
    mask: bytes
    server: bytes
    router: bytes
    resolver: bytes
    seconds: int
    mtu: int


def parse_request_untrusted(data: bytes) -> Request:
    """Parse a client's message. Raises GuestProtocolError."""
    if len(data) < _HEADER.size:
        raise GuestProtocolError(f"a DHCP message of {len(data)} bytes", field="dhcp")
    fields = _HEADER.unpack_from(data)
    operation, kind, size, _hops, transaction, _seconds, flags, client = fields[:8]
    if operation != 1 or kind != 1 or size != 6 or fields[14] != _COOKIE:
        raise GuestProtocolError("a BOOTP message that is no request of DHCP", field="dhcp.op")
    options = _options_untrusted(data[_HEADER.size :])
    if len(options.get(_KIND, b"")) != 1:
        raise GuestProtocolError("a DHCP message without a type", field="dhcp.options")
    asked, server = options.get(_ASKED, b""), options.get(_SERVER, b"")
    if len(asked) not in {0, 4} or len(server) not in {0, 4}:
        raise GuestProtocolError("a DHCP message with half an address", field="dhcp.options")
    return Request(options[_KIND][0], transaction, flags, client, fields[11], asked, server)


def _options_untrusted(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data) and data[position] != _END:
        if data[position] == _PAD:
            position += 1
            continue
        length = data[position + 1] if position + 1 < len(data) else 0
        end = position + 2 + length
        if end > len(data):
            raise GuestProtocolError("a DHCP option without an end", field="dhcp.options")
        found.setdefault(data[position], data[position + 2 : end])
        position = end
    return found


def answer(request: Request, lease: Lease) -> tuple[bytes, bool] | None:
    """Return the server's message, and whether everybody is to get it; None: there is none.

    Cannot block.
    """
    wanted = request.asked or request.client
    match request.kind:
        case 1:
            kind, given = OFFER, lease.address
        case 3 if request.server not in {b"", lease.server}:
            return None  # of another server
        case 3 if wanted == lease.address:
            kind, given = ACK, lease.address
        case 3:
            kind, given = NAK, bytes(4)
        case 8:
            kind, given = ACK, bytes(4)
        case _:
            return None
    options = bytes((_KIND, 1, kind)) + _option(_SERVER, lease.server)
    if kind != NAK:
        options += _option(_MASK, lease.mask) + _option(_ROUTER, lease.router)
        options += _option(_DNS, lease.resolver) + _option(_MTU, lease.mtu.to_bytes(2, "big"))
        if request.kind != INFORM:
            options += _option(_LEASE, lease.seconds.to_bytes(4, "big"))
    client = request.client if request.kind == INFORM else bytes(4)
    message = _HEADER.pack(
        2, 1, 6, 0, request.transaction, 0, request.flags, client, given, lease.server, bytes(4),
        request.hardware, b"", b"", _COOKIE,
    )  # fmt: skip
    everybody = kind == NAK or bool(request.flags & _BROADCAST)
    return (message + options + bytes((_END,))).ljust(_MIN_MESSAGE, b"\0"), everybody


def _option(number: int, value: bytes) -> bytes:
    return bytes((number, len(value))) + value
