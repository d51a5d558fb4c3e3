"""A switch with its keeper, and adapters of guests at the other ends of its lines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import trio

from netvsp.endpoint import Endpoint
from netvsp.endpoints.switch import connect, open_keeper
from netvsp.frames.frame import Frame
from netvsp.shared.hub import Hub
from netvsp.shared.keeper import SwitchKeeper
from tests.support.patience import PATIENCE, until
from tests.support.switch import station
from vmbus.plugins.sharing import Line, make_line


class Adapter:
    """What an endpoint brings its frames to.

    Attributes:
        frames: What it has brought.
        room: How many frames there is room for.
        missed: How many frames it was said to have lost.
    """

    def __init__(self, endpoint: Endpoint, mac: bytes) -> None:
        self.endpoint = endpoint
        self.mac = mac
        self.frames: list[Frame] = []
        self.room = 1 << 30
        self.missed = 0
        self.news = trio.Event()
        self.emptied = trio.Event()

    def receive(self, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Port.receive`."""
        taken = min(len(frames), self.room)
        self.room -= taken
        self.frames += frames[:taken]
        self.news.set()
        return taken

    async def wait_room(self) -> None:
        """See :meth:`netvsp.endpoint.Port.wait_room`."""
        self.emptied = trio.Event()
        await self.emptied.wait()

    def make_room(self, frames: int) -> None:
        """Let in so many more."""
        self.room += frames
        self.emptied.set()

    def lost(self, count: int) -> None:
        """See :meth:`netvsp.endpoint.Port.lost`."""
        self.missed += count

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        """See :meth:`netvsp.endpoint.Port.link_changed`."""
        del speed
        raise AssertionError(f"a switch does not take the link {'up' if up else 'down'}")

    async def until(self, *wanted: bytes) -> None:
        """Wait for frames; forget them, and all that came before the last."""
        left = list(wanted)
        with trio.fail_after(PATIENCE):
            while True:
                while self.frames and left:
                    if self.frames.pop(0).tobytes() == left[0]:
                        del left[0]
                if not left:
                    return
                self.news = trio.Event()
                await self.news.wait()

    async def send(self, *frames: Frame) -> None:
        """Send frames, as an adapter does."""
        left = list(frames)
        with trio.fail_after(PATIENCE):
            while left:
                done = self.endpoint.transmit(0, left)
                del left[:done]
                if left:
                    await self.endpoint.wait_writable(0)


class Kept:
    """A keeper at work."""

    def __init__(self, keeper: SwitchKeeper, nursery: trio.Nursery, name: str) -> None:
        self.keeper = keeper
        self.name = name
        self.endpoints: list[Endpoint] = []
        self._nursery = nursery

    @property
    def hub(self) -> Hub:
        """The switch."""
        return self.keeper.hub

    def line(self, guest: str, options: str = "") -> Line:
        """Return a guest's end of a new line."""
        ours, theirs = make_line(0)
        spec = f"switch:{options}{self.name}"
        self._nursery.start_soon(self.keeper.serve, ours, guest, spec)
        return theirs

    async def adapter(self, nursery: trio.Nursery, number: int, options: str = "") -> Adapter:
        """Return an adapter at a new port, when the switch knows that it is there."""
        endpoint = connect(self.line(f"guest{number}", options))
        self.endpoints.append(endpoint)
        adapter = Adapter(endpoint, station(number))
        nursery.start_soon(endpoint.run, adapter)
        await until(lambda: adapter.mac in self.hub.switch.own_stations())
        return adapter


@contextlib.asynccontextmanager
async def kept(options: str = "", name: str = "lan") -> AsyncIterator[Kept]:
    """Keep a switch for the length of the block."""
    keeper = await open_keeper([f"switch:{options}{name}"])
    async with trio.open_nursery() as nursery:
        made = Kept(keeper, nursery, name)
        yield made
        nursery.cancel_scope.cancel()
    for endpoint in made.endpoints:
        await endpoint.aclose()
    await keeper.aclose()
