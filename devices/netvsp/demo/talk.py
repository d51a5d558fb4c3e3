"""One of two stations: answers for its address, pings the other, and streams to it both ways.

A stream is UDP datagrams, each with a number and a digest of what is in it. The receiver says after
every few how many have come, and the sender is never more than a window ahead of that: a switch
does not drop anything then, and what is missing at the end is a mistake of somebody's.
"""

from __future__ import annotations

import random
import struct
import time
from collections import deque
from hashlib import blake2b
from typing import NamedTuple

import trio

from netvsp.demo.packets import (
    ECHO_REPLY,
    ECHO_REQUEST,
    REPLY,
    REQUEST,
    Arp,
    Datagram,
    Echo,
    Station,
    build_arp,
    build_echo,
    build_udp,
    parse,
)
from netvsp.guest import GuestFrame, NetvscAdapter
from netvsp.wire import ndis, ppi
from vmbus.errors import VMBusError

PAYLOAD = 1400
"""Bytes of a datagram's data."""
WINDOW = 128
"""Datagrams that the receiver has not counted yet, at most."""
COUNTED_EVERY = 16
LEAST = 256
"""Datagrams of a stream, however little time there is."""
SENDERS = 16
"""Tasks that send at once, each from a port of its own, so that all channels have something to do.
"""
AGAIN = 0.1
"""Seconds until a question is asked again, or a window is taken for lost."""
PATIENCE = 15.0
"""Seconds until the other one is given up."""

_DATA, _END, _COUNT, _OVER = range(4)
_HEADER = struct.Struct(">BI8s")
"""Kind, number, digest of the data."""
_PORT = 4000
_CHECKS = (ndis.CSUM_TX, ndis.CSUM_BOTH)


class Pings(NamedTuple):
    """What came of pinging."""

    sent: int
    answered: int
    best: float
    """Seconds of the quickest answer."""
    mean: float


class Stream(NamedTuple):
    """What came of a stream, as one of its ends sees it."""

    frames: int
    bytes: int
    """Of their data."""
    seconds: float
    lost: int
    """That were sent and have not come."""
    damaged: int
    """That have come otherwise than they were sent."""


class Talker:
    """A station; see the module text.

    Args:
        adapter: Up. Its frames are taken here.
        number: 1 or 2; the address is 10.0.0.1 or 10.0.0.2.
    """

    def __init__(self, adapter: NetvscAdapter, number: int) -> None:
        self.leaves_sums = adapter.sender.offloads.udp_ipv4 in _CHECKS
        """Whether the adapter fills in the sums of UDP."""
        self.me = Station(adapter.address, _address(number))
        self.peer: Station | None = None
        self._peer_address = _address(3 - number)
        self._adapter = adapter
        self._news = trio.lowlevel.ParkingLot()
        self._replies: deque[bytes] = deque()
        self._reply = trio.Event()
        self._echoes: dict[int, float] = {}
        self._noise = random.Random().randbytes(PAYLOAD * 64)  # noqa: S311 - hides nothing
        # Sending.
        self._next = 0
        self._counted = 0
        self._over: tuple[int, int] | None = None
        # Receiving.
        self._seen: set[int] = set()
        self._damaged = 0
        self._begun = self._ended = 0.0
        self._announced: int | None = None

    async def run(self) -> None:
        """Take frames and answer them, for ever. A checkpoint.

        Raises:
            trio.BrokenResourceError: The host has taken the adapter away.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer)
            while True:
                self._take(await self._adapter.receive())

    # -- questions -------------------------------------------------------------------------------

    async def meet(self) -> int:
        """Find out who has the other address; return how often that was asked. A checkpoint.

        Raises:
            VMBusError: Nobody answers.
        """
        question = build_arp(REQUEST, self.me, Station(bytes(6), self._peer_address))
        asked = 0
        with trio.move_on_after(PATIENCE):
            while self.peer is None:
                asked += 1
                await self._adapter.send(question)
                await self._wait()
            return asked
        raise VMBusError(f"nobody answers for {text_of(self._peer_address)}")

    async def ping(self, count: int) -> Pings:
        """Ping the other one, one ping after the other. A checkpoint."""
        assert self.peer is not None
        times = []
        for number in range(1, count + 1):
            start = time.perf_counter()
            await self._adapter.send(
                build_echo(ECHO_REQUEST, self.me, self.peer, number, bytes(range(56)))
            )
            with trio.move_on_after(PATIENCE):
                while number not in self._echoes:
                    await self._wait()
                times.append(self._echoes[number] - start)
        mean = sum(times) / len(times) if times else 0.0
        return Pings(count, len(times), min(times, default=0.0), mean)

    # -- streams ---------------------------------------------------------------------------------

    async def send(self, seconds: float) -> Stream:
        """Stream to the other one for so long. A checkpoint.

        Raises:
            VMBusError: It does not say what has come.
        """
        start = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(SENDERS):
                nursery.start_soon(self._send_some, _PORT + 1 + number, start + seconds)
        took = time.perf_counter() - start
        end = _HEADER.pack(_END, self._next, bytes(8))
        with trio.move_on_after(PATIENCE):
            while self._over is None:
                await self._datagram(_PORT, end)
                await self._wait()
            came, damaged = self._over
            return Stream(self._next, self._next * PAYLOAD, took, self._next - came, damaged)
        raise VMBusError("the other station does not say what has come of the stream")

    async def _send_some(self, port: int, until: float) -> None:
        while self._next < LEAST or time.perf_counter() < until:
            with trio.move_on_after(AGAIN) as late:
                while self._next - self._counted >= WINDOW:
                    await self._news.park()
            if late.cancelled_caught:
                self._counted = self._next  # they, or the word of them, are lost
            number = self._next
            self._next += 1
            at = number % 64 * PAYLOAD
            data = number.to_bytes(4, "big") + self._noise[at + 4 : at + PAYLOAD]
            await self._datagram(port, _HEADER.pack(_DATA, number, _digest(data)) + data)

    async def receive(self) -> Stream:
        """Take the other one's stream, to its end. A checkpoint.

        Raises:
            VMBusError: None comes, or it does not end.
        """
        while self._announced is None:
            before = len(self._seen)
            with trio.move_on_after(PATIENCE):
                while self._announced is None and len(self._seen) == before:
                    await self._news.park()
                continue
            raise VMBusError("the stream of the other station does not come to its end")
        while self._replies:  # whoever leaves before the last word is sent leaves the other waiting
            await self._news.park()
        came = len(self._seen)
        took = self._ended - self._begun
        return Stream(came, came * PAYLOAD, took, self._announced - came, self._damaged)

    async def _datagram(self, port: int, data: bytes) -> None:
        assert self.peer is not None
        frame = build_udp(self.me, self.peer, (port, _PORT), data, sums=not self.leaves_sums)
        await self._adapter.send(frame, checksum=self.leaves_sums)

    async def _wait(self) -> None:
        """Wait for something new, but not for long. A checkpoint."""
        with trio.move_on_after(AGAIN):
            await self._news.park()

    # -- what comes ------------------------------------------------------------------------------

    async def _answer(self) -> None:
        while True:
            while self._replies:
                await self._adapter.send(self._replies[0])
                self._replies.popleft()
                self._news.unpark_all()
            self._reply = trio.Event()
            await self._reply.wait()

    def _say(self, frame: bytes) -> None:
        self._replies.append(frame)
        self._reply.set()

    def _take(self, frame: GuestFrame) -> None:
        match parse(frame.data):
            case Arp(operation, sender, target) if target.address == self.me.address:
                if sender.address == self._peer_address:
                    self.peer = sender
                if operation == REQUEST:
                    self._say(build_arp(REPLY, self.me, sender))
            case Echo(kind, sender, number, data):
                if kind == ECHO_REQUEST:
                    self._say(build_echo(ECHO_REPLY, self.me, sender, number, data))
                elif kind == ECHO_REPLY:
                    self._echoes[number] = time.perf_counter()
            case Datagram(sender, port, data, sum_right) if (
                port == _PORT and len(data) >= _HEADER.size
            ):
                right = sum_right or bool((frame.checksum or 0) & ppi.RX_UDP_SUCCEEDED)
                self._take_datagram(sender, data, right=right)
        self._news.unpark_all()

    def _take_datagram(self, sender: Station, data: bytes, *, right: bool) -> None:
        kind, number, digest = _HEADER.unpack_from(data)
        content = data[_HEADER.size :]
        if kind == _DATA:
            if not self._seen:
                self._begun = time.perf_counter()
            if not right or digest != _digest(content):
                self._damaged += 1
            self._seen.add(number)
            self._ended = time.perf_counter()
            if not len(self._seen) % COUNTED_EVERY:
                self._tell(sender, _COUNT, len(self._seen))
        elif kind == _END:
            self._announced = number
            self._tell(sender, _OVER, len(self._seen))
        elif kind == _COUNT:
            self._counted = max(self._counted, number)
        elif kind == _OVER:
            self._over = number, int.from_bytes(content, "big")

    def _tell(self, sender: Station, kind: int, number: int) -> None:
        data = _HEADER.pack(kind, number, bytes(8)) + self._damaged.to_bytes(4, "big")
        self._say(build_udp(self.me, sender, (_PORT, _PORT), data))


def text_of(address: bytes) -> str:
    """Write an address of IPv4, or of hardware. Cannot block."""
    if len(address) == 4:
        return ".".join(map(str, address))
    return address.hex(":")


def _address(number: int) -> bytes:
    return bytes([10, 0, 0, number])


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()
