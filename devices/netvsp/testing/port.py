"""An adapter's side of an endpoint, without an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from netvsp.frames.frame import Frame

MAC = bytes.fromhex("00155d010203")


class ListeningPort:
    """Keeps what an endpoint brings; a :class:`netvsp.endpoint.Port`.

    Args:
        mac: The adapter's address, six bytes.
        room: Frames that it takes; None: any number. :meth:`make_room` gives more.

    Attributes:
        frames: What has come in, each with bytes of its own.
        up: What the endpoint has said last about the link; None: nothing.
        speed: The same, in bits per second.
        lost_frames: How many the endpoint says that it had to drop.
        calls: How often ``receive`` was called.
    """

    def __init__(self, mac: bytes = MAC, *, room: int | None = None) -> None:
        self._mac = mac
        self._room = room
        self.frames: list[Frame] = []
        self.up: bool | None = None
        self.speed: int | None = None
        self.calls = 0
        self.lost_frames = 0
        self._more = trio.Event()
        self._changed = trio.Event()

    @property
    def mac(self) -> bytes:
        """See :class:`netvsp.endpoint.Port`."""
        return self._mac

    def receive(self, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Port.receive`."""
        self.calls += 1
        count = len(frames) if self._room is None else min(len(frames), self._room)
        # As the adapter does: what has been taken is a copy.
        self.frames += [
            Frame(bytes(each.tobytes()), (), each.offload, each.tci, each.flow)
            for each in frames[:count]
        ]
        if self._room is not None:
            self._room -= count
        if count < len(frames) and self._more.is_set():
            self._more = trio.Event()  # those who wait already have the old one
        self._tell()
        return count

    async def wait_room(self) -> None:
        """See :meth:`netvsp.endpoint.Port.wait_room`. Is a checkpoint."""
        await self._more.wait()

    def lost(self, count: int) -> None:
        """See :meth:`netvsp.endpoint.Port.lost`."""
        self.lost_frames += count
        self._tell()

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        """See :meth:`netvsp.endpoint.Port.link_changed`."""
        self.up = up
        self.speed = self.speed if speed is None else speed
        self._tell()

    def make_room(self, count: int | None = None) -> None:
        """Take that many frames more; None: any number. Cannot block."""
        self._room = None if count is None or self._room is None else self._room + count
        self._more.set()

    async def changed(self) -> None:
        """Wait until something more has come in. Is a checkpoint."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
