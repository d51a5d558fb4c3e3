"""A network that is not there: a gateway and a name server that answer, and nothing behind them.

======================  ===================================================
10.0.2.2                gateway and DHCP server, answers to ping
10.0.2.3                name server: looks names up as this host does
10.0.2.15               what the guest gets
======================  ===================================================

For when no real one can be had: a guest comes up, has an address and can look names up. Whatever it
sends to anybody else is answered by ICMP: that is prohibited. There is no IPv6: no router
advertisement, no answer to a neighbour solicitation or an ICMPv6 echo; frames of it are taken, and
that is all. AAAA is looked up like A, since who asks may want to know.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import trio

from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo, Port
from netvsp.endpoints import dhcp, dns
from netvsp.endpoints.tasks import CLOSED
from netvsp.frames import internet as inet
from netvsp.frames.frame import (
    BROADCAST,
    ETHERNET_HEADER,
    ETHERTYPE_IPV4,
    PROTOCOL_UDP,
    Frame,
)
from vmbus.errors import GuestProtocolError

GATEWAY, RESOLVER, GUEST = (bytes((10, 0, 2, each)) for each in (2, 3, 15))
MAC = bytes.fromhex("020000000202")
"""Of both."""
MTU = 1500
MAX_REPLIES = 256
"""Frames for a guest that does not take them; it sends no more meanwhile."""
MAX_LOOKUPS = 16
"""Names that are being looked up, each in a thread; others get an error."""
TURN = 64
_LEASE = dhcp.Lease(
    GUEST, bytes((255, 255, 255, 0)), GATEWAY, GATEWAY, RESOLVER, seconds=86400, mtu=MTU
)
_OWN = {GATEWAY, RESOLVER}
_EVERYBODY = b"\xff" * 4


class Lookup(NamedTuple):
    """A name that somebody wants to know the addresses of."""

    query: dns.Query
    mac: bytes
    address: bytes
    port: int

    def reply(self, code: int, addresses: Sequence[bytes] = ()) -> bytes:
        """Return the frame with the answer."""
        udp = inet.Udp(dns.PORT, self.port, dns.answer(self.query, code, addresses))
        return _udp_frame(self.mac, RESOLVER, self.address, udp)


def answer_untrusted(frame: bytes) -> bytes | Lookup | None:
    """Return what the network says to a frame: another frame, or what has to be looked up first.

    Cannot block.

    Raises:
        GuestProtocolError: It is malformed.
    """
    if frame[12:14] == inet.ETHERTYPE_ARP:
        arp = inet.parse_arp_untrusted(frame)
        if arp.operation != inet.ARP_REQUEST or arp.target not in _OWN:
            return None
        sender = arp.sender_mac
        return inet.build_arp(
            inet.ARP_REPLY, MAC, arp.target, sender, arp.sender, target_mac=sender
        )
    if frame[12:14] != ETHERTYPE_IPV4:
        return None
    packet = inet.parse_ipv4_untrusted(frame)
    mac = frame[6:12]
    if packet.protocol == PROTOCOL_UDP:
        udp = inet.parse_udp_untrusted(packet)
        if udp.target_port == dhcp.SERVER_PORT and packet.target in {_EVERYBODY, GATEWAY}:
            return _lease(mac, udp)
        if udp.target_port == dns.PORT and packet.target == RESOLVER:
            query = dns.parse_query_untrusted(udp.payload)
            return Lookup(query, mac, packet.source, udp.source_port)
    if packet.target == _EVERYBODY or packet.target[0] >= 224:
        return None  # nobody listens
    if packet.protocol == inet.PROTOCOL_ICMP:
        if packet.payload[:1] != bytes((inet.ICMP_ECHO,)) or len(packet.payload) < 8:
            return None
        if packet.target in _OWN:
            message = inet.build_icmp(
                inet.ICMP_ECHO_REPLY, 0, packet.payload[4:8], packet.payload[8:]
            )
            return _ip_frame(mac, packet.target, packet.source, inet.PROTOCOL_ICMP, message)
    message = inet.build_icmp(
        inet.ICMP_UNREACHABLE,
        inet.ICMP_PROHIBITED,
        bytes(4),
        packet.header + packet.payload[:8],
    )
    return _ip_frame(mac, GATEWAY, packet.source, inet.PROTOCOL_ICMP, message)


def _lease(mac: bytes, udp: inet.Udp) -> bytes | None:
    answer = dhcp.answer(dhcp.parse_request_untrusted(udp.payload), _LEASE)
    if answer is None:
        return None
    message, everybody = answer
    reply = inet.Udp(dhcp.SERVER_PORT, dhcp.CLIENT_PORT, message)
    # A client without an address takes what comes to its own, or to everybody.
    target = _EVERYBODY if everybody else GUEST
    return _udp_frame(BROADCAST if everybody else mac, GATEWAY, target, reply)


def _udp_frame(mac: bytes, source: bytes, target: bytes, udp: inet.Udp) -> bytes:
    return _ip_frame(mac, source, target, PROTOCOL_UDP, inet.build_udp(source, target, udp))


def _ip_frame(mac: bytes, source: bytes, target: bytes, protocol: int, payload: bytes) -> bytes:
    return inet.build_ipv4(MAC, mac, source, target, protocol=protocol, payload=payload)


class ResponderEndpoint(Endpoint):
    """The network that is not there."""

    info = EndpointInfo(mtu=MTU)

    def __init__(self) -> None:
        self._replies: deque[Frame] = deque()
        self._lookups: deque[Lookup] = deque()
        self._arrived = trio.Event()
        self._room = trio.Event()
        self._closed = False
        self._looking_up = 0
        # Threads of its own: everybody else's work waits for none of them. One that was given up
        # counts until its look-up ends, so a guest that starts over and over has no more of them.
        self._threads = trio.CapacityLimiter(MAX_LOOKUPS)
        self._refused = 0

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        if self._closed:
            return len(frames)
        for number, frame in enumerate(frames):
            if len(self._replies) + len(self._lookups) >= MAX_REPLIES:
                if self._room.is_set():
                    self._room = trio.Event()
                return number
            if ETHERNET_HEADER <= len(frame) <= ETHERNET_HEADER + MTU:
                self._take(bytes(frame.tobytes()))
        return len(frames)

    def _take(self, data: bytes) -> None:
        try:
            answer = answer_untrusted(data)
        except GuestProtocolError:
            self._refused += 1
            return
        if isinstance(answer, Lookup):
            if answer.query.kind not in {dns.A, dns.AAAA}:
                answer = answer.reply(dns.NOT_IMPLEMENTED)
            elif not answer.query.name:
                answer = answer.reply(dns.NO_SUCH_NAME)
            else:
                self._lookups.append(answer)
                self._arrived.set()
                return
        if answer is not None:
            self._reply(answer)

    def _reply(self, data: bytes) -> None:
        self._replies.append(Frame(data))
        self._arrived.set()

    async def wait_writable(self, queue: int) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`."""
        del queue
        if self._closed or len(self._replies) + len(self._lookups) < MAX_REPLIES:
            await trio.lowlevel.checkpoint()
        else:
            await self._room.wait()

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        if self._closed:
            raise EndpointError(CLOSED)
        self._forget()
        async with trio.open_nursery() as nursery:
            while True:
                await self._arrived.wait()
                await trio.lowlevel.checkpoint()
                self._arrived = trio.Event()
                while self._lookups:
                    lookup = self._lookups.popleft()
                    if self._looking_up < MAX_LOOKUPS:
                        self._looking_up += 1
                        nursery.start_soon(self._look_up, lookup)
                    else:
                        self._reply(lookup.reply(dns.SERVER_FAILURE))
                await self._hand_over(port)

    async def _hand_over(self, port: Port) -> None:
        while self._replies:
            some = [self._replies[i] for i in range(min(len(self._replies), TURN))]
            taken = port.receive(some)
            for _ in range(taken):
                self._replies.popleft()
            if taken < len(some):
                await port.wait_room()
            else:
                await trio.lowlevel.checkpoint()
        self._room.set()

    async def _look_up(self, lookup: Lookup) -> None:
        """Ask the host's own resolver, in a thread: that may take as long as it likes."""
        family = socket.AF_INET if lookup.query.kind == dns.A else socket.AF_INET6
        try:
            # Of both families: "no such name" would be for both, and a resolver asks no further.
            found = await trio.to_thread.run_sync(
                socket.getaddrinfo,
                lookup.query.name.encode("ascii"),  # as it is: a str would be made IDNA
                None,
                socket.AF_UNSPEC,
                socket.SOCK_STREAM,
                abandon_on_cancel=True,
                limiter=self._threads,
            )
        except socket.gaierror as error:
            code = {socket.EAI_NONAME: dns.NO_SUCH_NAME, socket.EAI_NODATA: dns.OK}
            reply = lookup.reply(code.get(error.errno or 0, dns.SERVER_FAILURE))
        except (OSError, UnicodeError):
            reply = lookup.reply(dns.SERVER_FAILURE)
        else:
            texts = dict.fromkeys(
                str(each[4][0]).partition("%")[0] for each in found if each[0] == family
            )
            reply = lookup.reply(dns.OK, [socket.inet_pton(family, each) for each in texts])
        finally:
            self._looking_up -= 1
        if not self._closed:
            self._reply(reply)

    def _forget(self) -> None:
        self._replies.clear()
        self._lookups.clear()
        self._arrived = trio.Event()
        self._room.set()

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        return {
            "network": "built-in",
            "waiting": len(self._replies),
            "looking_up": self._looking_up,
            "refused": self._refused,
        }

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        self._closed = True
        self._forget()
        await trio.lowlevel.checkpoint()
