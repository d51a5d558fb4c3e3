"""Frames between a port of a switch and a line, both ways.

One message of a line is one turn: then all other lines have theirs. What the other end does not
read waits at the port, in its queue, which is bounded; what it sends while there is no room it
keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from netvsp.shared.line import FrameLine
from netvsp.shared.messages import (
    MAX_DATA,
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_STATIONS,
    Kind,
    broken,
    frames_untrusted,
    kind_untrusted,
    pack_stations,
)
from netvsp.switch.port import PortConfig
from netvsp.switch.switch import Switch

Obey = Callable[[Kind, int, memoryview], bool]
"""Acts on a message that is not FRAMES: kind, count, all of it; whether it may be there at all."""


class Carrier:
    """Connects a line with a new port.

    Args:
        switch: Which one.
        line: The line; closed by whoever has made it.
        name: Of the port.
        config: Of the port.
        obey: What to do with other messages.

    Raises:
        ConfigError: The switch has no port left.
    """

    def __init__(
        self, switch: Switch, line: FrameLine, name: str, config: PortConfig, obey: Obey
    ) -> None:
        self._switch = switch
        self._line = line
        self._obey = obey
        self._wake = trio.Event()
        self._posts: list[bytes] = []
        self._changes: dict[bytes, bool] = {}
        """Stations of which the other end has to be told, and whether they are there."""
        self._told: set[bytes] = set()
        """Those that it believes to be there."""
        self.port = switch.add_port(name, config, self._ready)

    def _ready(self) -> None:
        self._wake.set()

    def post(self, message: bytes) -> None:
        """Send a message, before the frames that wait, unless one waits still. Cannot block."""
        if not self._posts:
            self._posts.append(message)
            self._wake.set()

    def tell_station(self, address: bytes, there: bool) -> None:
        """Tell the other end of a station that has come or gone. Cannot block."""
        if there == (address in self._told):
            # It has not heard of the change that this one undoes. So what waits here is bounded,
            # however often a guest's address changes while the other end does not read.
            self._changes.pop(address, None)
        else:
            self._changes[address] = there
            self._wake.set()

    async def run(self) -> None:
        """Carry until the line ends; the port is gone then. Is a checkpoint.

        Raises:
            PeerProtocolError: Somebody at the other end breaks the rules.
            OSError: It is gone.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._switch.remove_port(self.port)

    async def _read(self) -> None:
        line, switch, port = self._line, self._switch, self.port
        joint = port.config.joint
        while True:
            data = await line.receive()
            if not data:
                return
            if len(data) > MAX_MESSAGE:
                raise broken("a message that is too long")
            kind, count = kind_untrusted(data)
            if kind is not Kind.FRAMES:
                if not self._obey(kind, count, data):
                    raise broken(f"{kind.name} from whom it is not expected")
                await trio.lowlevel.checkpoint()
                continue
            frames = frames_untrusted(data, count, joint=joint)
            while True:
                done = switch.receive(port, frames)
                await trio.lowlevel.checkpoint()
                if done >= len(frames):
                    break
                del frames[:done]

    async def _write(self) -> None:
        line, port = self._line, self.port
        frames = port.take(0, 0)
        while True:
            room = self._write_posts()
            if room and not frames:
                frames = port.take(MAX_FRAMES, MAX_DATA)
            if room and frames:
                done = line.send_frames(frames)
                del frames[:done]
                room = bool(done)
            if not room:
                await line.wait_writable()
            elif frames or port.queue.count:
                await trio.lowlevel.checkpoint()
            else:
                await self._wake.wait()
                self._wake = trio.Event()

    def _write_posts(self) -> bool:
        """Send what is not frames; whether there was room for it."""
        while self._changes:
            there = next(iter(self._changes.values()))
            some = [each for each, how in self._changes.items() if how == there][:MAX_STATIONS]
            if not self._line.send(pack_stations(Kind.ADD if there else Kind.REMOVE, some)):
                return False
            for each in some:
                del self._changes[each]
            if there:
                self._told.update(some)
            else:
                self._told.difference_update(some)
        while self._posts:
            if not self._line.send(self._posts[0]):
                return False
            del self._posts[0]
        return True
