"""A conformance suite for endpoints: does one keep every promise of the contract?

:func:`check_endpoint` needs no test framework::

    async def test_my_endpoint():
        async def make() -> Endpoint:
            return MyEndpoint(...)

        await check_endpoint(make)

It raises ``AssertionError`` with the broken promise in words, and lets whatever else an endpoint
raises against the rules escape. What it sends is TCP and UDP between addresses that are kept for
documentation (RFC 5737, RFC 3849).
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import trio

from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo, Port
from netvsp.frames.frame import (
    DATA_VALID,
    ETHERNET_HEADER,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    HEADERS,
    MAX_FRAME,
    MIN_MTU,
    NEEDS_CHECKSUM,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    Frame,
    Offload,
)
from netvsp.testing.frames import GuestFrame, Packet
from netvsp.testing.port import ListeningPort
from vmbus.testing.scatter import shapes

MakeEndpoint = Callable[[], Awaitable[Endpoint]]
Provoke = Callable[[Endpoint], object]

PATIENCE = 60.0
"""Seconds for each check; it takes that long only if the endpoint hangs."""
FLOOD = 4096
"""Frames that are sent to an endpoint that says nothing of being full."""
_BLOCK = struct.Struct(">II")
_MAGIC = 0xF7A3E51D
"""What the frames of the suite are known by, if they come back."""
_KINDS = {GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP}


async def check_endpoint(
    make: MakeEndpoint, *, provoke: Provoke | None = None, patience: float = PATIENCE
) -> None:
    """Check an endpoint against :mod:`netvsp.endpoint`. A checkpoint; takes some seconds.

    What is checked: properties that make sense together; frames of many sizes, cut in many ways,
    with every offload that it says it takes, on every queue; that it keeps nothing of a guest's
    memory; that it takes more when it says so, whoever waits; lives, one after the other, and what
    of one is not to come in the next; what comes in, and that it waits for room; closing, under
    way, twice, and in a cancelled task.

    Args:
        make: Opens an endpoint; awaited once for each check, which closes it again. No two are open
            at the same time.
        provoke: Called with an endpoint whose ``run`` is under way: makes the network send frames
            to the adapter, some of them after it has returned perhaps. None: what is sent comes
            back, or nothing ever comes in.
        patience: Seconds until a check that does not end is called a hang.

    Raises:
        AssertionError: A promise is broken; the text says which.
    """
    for check in _CHECKS:
        endpoint = await make()
        suite = _Suite(endpoint, provoke)
        try:
            with trio.move_on_after(patience) as scope:
                await check(suite)
            suite.require(
                not scope.cancelled_caught,
                f"{suite.doing} does not return" if suite.doing else "it hangs",
            )
        finally:
            await endpoint.aclose()


class _StrictPort(ListeningPort):
    """A port that looks at what it is given."""

    def __init__(self, suite: _Suite, *, room: int | None = None) -> None:
        super().__init__(room=room)
        self._suite = suite
        # Kept, so that no other frame gets the number of one of them.
        self._refused: dict[int, Frame] = {}
        self._taken: dict[int, Frame] = {}

    def receive(self, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Port.receive`."""
        require = self._suite.require
        for frame in frames:
            _check_frame(self._suite, frame)
            require(
                id(frame) not in self._taken,
                "a frame was brought again that had been taken",
            )
            require(
                id(frame) not in self._refused,
                "a frame was brought again before there was room",
            )
        count = super().receive(frames)
        # Of a call that was taken in part only: a frame may well be sent again on purpose.
        partly = count < len(frames)
        self._taken = {id(frame): frame for frame in frames[:count]} if partly else {}
        self._refused = {id(frame): frame for frame in frames[count:]}
        for frame in self.frames[len(self.frames) - count :]:
            self._suite.check_content(frame)
        return count

    def make_room(self, count: int | None = None) -> None:
        """Take that many frames more."""
        self._refused.clear()
        super().make_room(count)


class _Suite:
    """One endpoint that is being checked."""

    def __init__(self, endpoint: Endpoint, provoke: Provoke | None) -> None:
        self.endpoint = endpoint
        self.provoke = provoke
        self.doing = ""
        """What is waited for."""
        self.serial = 0
        self._first_of_life = 0

    def require(self, condition: bool, text: str) -> None:
        """Raise AssertionError unless a promise is kept."""
        if not condition:
            raise AssertionError(f"{type(self.endpoint).__name__}: {text}")

    @asynccontextmanager
    async def life(self, port: Port) -> AsyncIterator[None]:
        """A life of the adapter: ``run`` is under way."""
        self._first_of_life = self.serial

        async def run() -> None:
            try:
                await self.endpoint.run(port)
            except EndpointError as error:
                raise AssertionError(
                    f"{type(self.endpoint).__name__}: run came to an end: {error}"
                ) from error
            raise AssertionError(f"{type(self.endpoint).__name__}: run returned")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            for _ in range(2):  # whoever comes first in a turn of the loop, it has begun
                await trio.lowlevel.cancel_shielded_checkpoint()
            yield
            nursery.cancel_scope.cancel()
            self.doing = "run, cancelled,"
        self.doing = ""

    def payload(self, length: int) -> bytes:
        """Return bytes that can be known again."""
        self.serial += 1
        block = _BLOCK.pack(_MAGIC, self.serial)
        return (block * (length // 8 + 1))[:length]

    def check_content(self, frame: Frame) -> None:
        """Look at a frame that may be one of ours that has come back."""
        data = frame.tobytes()
        at = data.find(_MAGIC.to_bytes(4, "big"))
        if at < 0 or at + 8 > len(data):
            return
        tail, block = data[at:], data[at : at + 8]
        self.require(
            tail == (block * (len(tail) // 8 + 1))[: len(tail)],
            "a frame came in with what was in the guest's memory when transmit had returned",
        )
        self.require(
            _BLOCK.unpack(block)[1] > self._first_of_life,
            "a frame came in that is of an earlier life",
        )

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """Have frames sent. Returns how many were taken."""
        taken = self.endpoint.transmit(queue, frames)
        self.require(type(taken) is int, f"transmit returned {taken!r}, not a number of frames")
        self.require(
            0 <= taken <= len(frames), f"transmit took {taken} frames of the {len(frames)} it got"
        )
        return taken

    def send(self, queue: int, made: Sequence[GuestFrame]) -> int:
        """Have frames sent; they are the guest's again. Returns how many were taken."""
        taken = self.transmit(queue, tuple(each.frame for each in made))
        for each in made:
            self.require(each.untouched, "transmit changed a frame, or the guest's memory")
            each.spoil()
        return taken

    async def send_all(self, queue: int, build: Callable[[], GuestFrame], count: int) -> None:
        """Have ``count`` frames sent, however long it takes."""
        while count:
            made = [build() for _ in range(min(count, 64))]
            count -= self.send(queue, made)
            if count:
                self.doing = "wait_writable"
                await self.endpoint.wait_writable(queue)
                self.doing = ""

    def plain(self, size: int, lengths: Sequence[int] | None = None) -> GuestFrame:
        """Return a frame of so many bytes, whatever it is."""
        if size < 42:
            data = Packet().build()[:size]
        else:
            data = Packet(payload=self.payload(size - 42)).build()
        return GuestFrame(data, None, lengths)

    def kinds(self, size: int) -> Iterator[tuple[bytes, Offload | None]]:
        """Yield frames of so many bytes, with each offload that the endpoint takes."""
        info = self.endpoint.info
        offloads = info.offloads
        longest = (info.mtu or MAX_FRAME - ETHERNET_HEADER) + ETHERNET_HEADER
        for protocol in (PROTOCOL_UDP, PROTOCOL_TCP):
            for pair in (("192.0.2.15", "192.0.2.2"), ("2001:db8::15", "2001:db8::2")):
                headers = (8 if protocol == PROTOCOL_UDP else 20) + 34 + 20 * (":" in pair[0])
                # An IPv4 packet with its header, and what follows an IPv6 header, is 65535 bytes.
                if not headers <= size <= MAX_FRAME:
                    continue
                packet = Packet(
                    protocol=protocol,
                    source=pair[0],
                    target=pair[1],
                    payload=self.payload(size - headers),
                )
                cuts = offloads.tcp_segments if protocol == PROTOCOL_TCP else offloads.udp_segments
                if size <= longest:
                    yield packet.build(), None
                    if offloads.checksum or cuts:
                        yield packet.build_partial()
                if cuts and size > headers + 1000:
                    yield packet.build_partial(1000)


def _check_frame(suite: _Suite, frame: Frame) -> None:
    require = suite.require
    require(isinstance(frame.head, bytes), "the head of a frame is no bytes object")
    size = len(frame)
    require(
        ETHERNET_HEADER <= size <= MAX_FRAME, f"a frame of {size} bytes came in; 14 to {MAX_FRAME}"
    )
    require(
        len(frame.head) >= min(size, HEADERS),
        f"{len(frame.head)} bytes of a frame of {size} in its head; {HEADERS} at least",
    )
    require(
        frame.tci is None or 0 <= frame.tci <= 0xFFFF, f"a frame with a tag of {frame.tci} came in"
    )
    offload = frame.offload
    if offload is None:
        return
    require(
        not offload.flags & ~(NEEDS_CHECKSUM | DATA_VALID)
        and offload.gso_type & ~GSO_ECN in _KINDS,
        f"a frame came in with {offload}, which means nothing",
    )
    if offload.flags & NEEDS_CHECKSUM:
        require(
            offload.csum_start + offload.csum_offset + 2 <= len(frame.head),
            f"a frame came in with {offload}, whose sum is not in its head",
        )
    if offload.gso_type:
        require(
            offload.gso_size > 0 and bool(offload.flags & NEEDS_CHECKSUM),
            f"a segment came in with {offload}, which cannot be cut",
        )


# -- checks ----------------------------------------------------------------------------------------


async def _check_info(suite: _Suite) -> None:
    info = suite.endpoint.info
    suite.require(isinstance(info, EndpointInfo), f"info is {info!r}, not an EndpointInfo")
    suite.require(1 <= info.queues <= 64, f"info.queues is {info.queues}; it can be 1 to 64")
    suite.require(info.mtu is None or info.mtu >= MIN_MTU, f"info.mtu is {info.mtu}")
    suite.require(info.speed > 0, f"info.speed is {info.speed}")
    suite.require(suite.endpoint.info == info, "info changes by itself")
    _check_snapshot(suite)
    async with suite.life(_StrictPort(suite)):
        suite.require(suite.endpoint.info == info, "info changes in a life")
        _check_snapshot(suite)


def _check_snapshot(suite: _Suite) -> None:
    snapshot = suite.endpoint.snapshot()
    suite.require(isinstance(snapshot, dict), "snapshot returned no dict")
    try:
        json.dumps(snapshot)
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"{type(suite.endpoint).__name__}: snapshot has more than JSON types: {error}"
        ) from error


async def _check_frames(suite: _Suite) -> None:
    async with suite.life(_StrictPort(suite)):
        suite.transmit(0, ())
        for queue in sorted({0, suite.endpoint.info.queues - 1}):
            for size in (14, 15, 33, 34, 41):
                await suite.send_all(queue, _builder(suite.plain(size).data, None, None), 1)
            for size in (42, 43, 59, 60, 64, 255, 256, 257, 1514, 4096, 9014, 65535, MAX_FRAME):
                for data, offload in suite.kinds(size):
                    build = _builder(data, offload, None)
                    await suite.send_all(queue, build, 1)
        for lengths in shapes(1514 - HEADERS):
            await suite.send_all(0, _builder(suite.plain(1514).data, None, lengths), 1)
        for data, offload in itertools.islice(suite.kinds(MAX_FRAME), 1):
            for lengths in shapes(MAX_FRAME - HEADERS):
                await suite.send_all(0, _builder(data, offload, lengths), 1)
        if suite.endpoint.info.offloads.vlan:
            tagged = suite.plain(64)
            tagged.frame.tci = 5
            await suite.send_all(0, lambda: tagged, 1)
        await trio.lowlevel.checkpoint()


def _builder(
    data: bytes, offload: Offload | None, lengths: Sequence[int] | None
) -> Callable[[], GuestFrame]:
    return lambda: GuestFrame(data, offload, lengths)


async def _check_pressure(suite: _Suite) -> None:
    """Whoever is told to wait may go on; several wait for the same queue."""
    endpoint = suite.endpoint
    queue = endpoint.info.queues - 1
    async with suite.life(_StrictPort(suite)):
        # Nobody else runs meanwhile: what can be full is full now.
        for _ in range(FLOOD // 64):
            if suite.send(queue, [suite.plain(1514) for _ in range(64)]) < 64:
                break
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(suite.send_all, queue, lambda: suite.plain(600), 100)
        suite.doing = "wait_writable"
        with trio.CancelScope() as scope:
            scope.cancel()
            await endpoint.wait_writable(queue)
        suite.require(scope.cancelled_caught, "wait_writable is no checkpoint")
        suite.doing = ""


async def _check_arrivals(suite: _Suite) -> None:
    """What comes in waits for room, or is dropped; it comes once."""
    port = _StrictPort(suite, room=0)
    async with suite.life(port):
        if suite.provoke is not None:
            suite.provoke(suite.endpoint)
        await suite.send_all(0, lambda: suite.plain(200), 20)
        for _ in range(8):
            await trio.lowlevel.checkpoint()
        for _ in range(20):
            await trio.lowlevel.checkpoint()
            port.make_room(1)
        port.make_room()
        if suite.provoke is not None:
            suite.provoke(suite.endpoint)
            suite.doing = "a frame that was provoked"
            while not port.frames:
                await port.changed()
            suite.doing = ""
        # None of them runs without end.
        await trio.lowlevel.checkpoint()


async def _check_lives(suite: _Suite) -> None:
    endpoint = suite.endpoint
    suite.send(0, [suite.plain(100)])
    for number in range(4):
        port = _StrictPort(suite, room=0 if number % 2 else None)
        async with suite.life(port):
            if suite.provoke is not None:
                suite.provoke(endpoint)
            # What stays is for a guest that is gone.
            suite.send(0, [suite.plain(100 + number) for _ in range(8)])
            if number > 1:
                await trio.lowlevel.checkpoint()
        suite.send(0, [suite.plain(100)])
    port = _StrictPort(suite)
    async with suite.life(port):
        for _ in range(4):
            await trio.lowlevel.checkpoint()
        if suite.provoke is not None:
            suite.provoke(endpoint)
            suite.doing = "a frame that was provoked in a later life"
            while not port.frames:
                await port.changed()
            suite.doing = ""


async def _check_closing(suite: _Suite) -> None:
    endpoint = suite.endpoint

    async def run() -> None:
        try:
            await endpoint.run(_StrictPort(suite, room=0))
        except EndpointError:  # closed under its feet: allowed
            return

    async def wait() -> None:
        await endpoint.wait_writable(0)

    async with trio.open_nursery() as outer:
        outer.start_soon(run)
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        for _ in range(FLOOD // 64):
            if suite.send(0, [suite.plain(1514) for _ in range(64)]) < 64:
                break
        suite.doing = "wait_writable, when it is closed,"
        async with trio.open_nursery() as waiting:
            for _ in range(2):
                waiting.start_soon(wait)
            await trio.lowlevel.checkpoint()
            await endpoint.aclose()
        suite.doing = "aclose, cancelled,"
        with trio.CancelScope() as scope:
            scope.cancel()
            await endpoint.aclose()
        suite.doing = "aclose, again,"
        await endpoint.aclose()
        suite.doing = "wait_writable after aclose"
        await endpoint.wait_writable(0)
        suite.doing = ""
        for _ in range(FLOOD // 64):
            suite.require(
                suite.send(0, [suite.plain(100) for _ in range(64)]) == 64,
                "transmit after aclose did not take all frames",
            )
        outer.cancel_scope.cancel()
    _check_snapshot(suite)
    with trio.move_on_after(0):
        await run()


_CHECKS: Sequence[Callable[[_Suite], Awaitable[None]]] = (
    _check_info,
    _check_frames,
    _check_pressure,
    _check_arrivals,
    _check_lives,
    _check_closing,
)
