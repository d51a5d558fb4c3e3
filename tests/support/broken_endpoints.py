"""Endpoints that break the contract, each in one way."""

import dataclasses

import trio

from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo, Offloads
from netvsp.endpoints.loopback import LoopbackEndpoint
from netvsp.frames.frame import Frame, Offload

EVERYTHING = LoopbackEndpoint.info


def bad_info(**changes):
    return type(
        "BadInfo", (LoopbackEndpoint,), {"info": dataclasses.replace(EVERYTHING, **changes)}
    )


class NoInfo(LoopbackEndpoint):
    info = "none"  # type: ignore[assignment]


class RestlessInfo(LoopbackEndpoint):
    @property
    def info(self):  # type: ignore[override]
        self.queues = getattr(self, "queues", 0) + 1
        return EndpointInfo(queues=self.queues)


class SnapshotOfBytes(LoopbackEndpoint):
    def snapshot(self):
        return {"mac": b"123456"}


class SnapshotOfNothing(LoopbackEndpoint):
    def snapshot(self):
        return None


class SaysNothing(LoopbackEndpoint):
    def transmit(self, queue, frames):
        super().transmit(queue, frames)


class SaysTrue(LoopbackEndpoint):
    def transmit(self, queue, frames):
        return super().transmit(queue, frames) == len(frames) > 0


class TakesTooMany(LoopbackEndpoint):
    def transmit(self, queue, frames):
        return super().transmit(queue, frames) + 1


class Scribbles(LoopbackEndpoint):
    def transmit(self, queue, frames):
        taken = super().transmit(queue, frames)
        for frame in frames[:taken]:
            for piece in frame.rest:
                piece[:] = bytes(len(piece))
        return taken


class Truncates(LoopbackEndpoint):
    def transmit(self, queue, frames):
        taken = super().transmit(queue, frames)
        for frame in frames[:taken]:
            frame.rest = ()
        return taken


class Keeps(LoopbackEndpoint):
    """Hands back what it was given, not a copy."""

    def transmit(self, queue, frames):
        self._frames.extend(frames)
        self._arrived.set()
        return len(frames)


class KeepsBytes(LoopbackEndpoint):
    """Looks at the memory that it was given when it is the guest's again."""

    def transmit(self, queue, frames):
        for frame in frames:
            pieces = [memoryview(piece.obj) for piece in frame.rest]
            self._frames.append(Frame(frame.head, pieces[:1], frame.offload))
        self._arrived.set()
        return len(frames)


class Chokes(LoopbackEndpoint):
    def transmit(self, queue, frames):
        if any(len(frame) > 9000 for frame in frames):
            raise ValueError("too long")
        return super().transmit(queue, frames)


class OneWaiter(LoopbackEndpoint):
    waiting = False

    async def wait_writable(self, queue):
        if self.waiting:
            raise trio.BusyResourceError("another task waits")
        self.waiting = True
        try:
            await super().wait_writable(queue)
        finally:
            self.waiting = False


class WakesNobody(LoopbackEndpoint):
    async def wait_writable(self, queue):
        await trio.sleep_forever()


class WaitsForNothing(LoopbackEndpoint):
    """Its wait is no checkpoint."""

    async def wait_writable(self, queue):
        if len(self._frames) >= 1024:
            await self._room.wait()


class Insists(LoopbackEndpoint):
    """Does not wait for room."""

    async def run(self, port):
        self._forget()
        while True:
            await self._arrived.wait()
            await trio.lowlevel.checkpoint()
            some = list(self._frames)[:64]
            for _ in range(port.receive(some)):
                self._frames.popleft()
            self._room.set()
            if not self._frames:
                self._arrived = trio.Event()


class Repeats(LoopbackEndpoint):
    """Brings all again if some were not taken."""

    async def run(self, port):
        self._forget()
        while True:
            await self._arrived.wait()
            await trio.lowlevel.checkpoint()
            some = list(self._frames)[:8]
            while port.receive(some) < len(some):
                await port.wait_room()
            for _ in some:
                self._frames.popleft()
            self._room.set()
            if not self._frames:
                self._arrived = trio.Event()


class Remembers(LoopbackEndpoint):
    """Brings to one life what was meant for another."""

    def _forget(self):
        self._room.set()


class Ends(LoopbackEndpoint):
    async def run(self, port):
        await trio.lowlevel.checkpoint()


class Fails(LoopbackEndpoint):
    async def run(self, port):
        await trio.lowlevel.checkpoint()
        raise EndpointError("the cable is cut")


class OneLife(LoopbackEndpoint):
    lives = 0

    async def run(self, port):
        self.lives += 1
        if self.lives > 1:
            raise EndpointError("no more lives")
        await super().run(port)


class Brings(Endpoint):
    """Brings one frame of its own."""

    frame = Frame(bytes(60))

    def transmit(self, queue, frames):
        return len(frames)

    async def run(self, port):
        await trio.lowlevel.checkpoint()
        port.receive([self.frame])
        await trio.sleep_forever()


def brings(*args):
    return type("Brings", (Brings,), {"frame": Frame(*args)})


class Hears(Brings):
    """Deaf: nothing that is provoked comes in."""

    async def run(self, port):
        await trio.sleep_forever()


class TakesNothingWhenClosed(LoopbackEndpoint):
    closed = False

    def transmit(self, queue, frames):
        return 0 if self.closed else super().transmit(queue, frames)

    async def aclose(self):
        await super().aclose()
        self.closed = True


class ForgetsThoseWhoWait(LoopbackEndpoint):
    async def aclose(self):
        self._closed = True
        await trio.lowlevel.checkpoint()


class ClosesOnce(LoopbackEndpoint):
    async def aclose(self):
        if self._closed:
            raise EndpointError("is closed")
        await super().aclose()


class ClosesSlowly(LoopbackEndpoint):
    async def aclose(self):
        await super().aclose()
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()


class Plain(LoopbackEndpoint):
    """Keeps the contract, with nothing of what is optional."""

    info = EndpointInfo(offloads=Offloads(), queues=1, mtu=1500)


NEEDS_A_SUM = Offload(1, 0, 0, 0, 34, 16)
