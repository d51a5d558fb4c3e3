"""Frames over a stream socket: four bytes of length in network order, and the frame.

That is what passt, QEMU (``-netdev stream``), libkrun and gvproxy speak.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from netvsp.endpoint import EndpointError, Port
from netvsp.endpoints.tasks import run_together
from netvsp.frames.frame import ETHERNET_HEADER, MAX_FRAME, VLAN_TAG, Buffer, Frame

TURN = 64
"""Frames that are handed on before others have their turn."""
CHUNK = 256 << 10
"""Bytes that are read at once."""
IOV_MAX = 1024
_LENGTH = 4
_LONGEST = MAX_FRAME + VLAN_TAG


class FrameStream:
    """One end of a stream of frames.

    Args:
        sock: A connected stream socket, owned from now on.
        peer: What is at the other end, for people.

    Attributes:
        over: Whether there will be no frames any more.
        dropped: Frames from the peer that could not be any.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer
        self._rest = memoryview(b"")
        """What is left of a frame that the socket has taken a part of."""
        self._left = trio.Event()
        """Set when there is something left."""
        self._data = bytearray()
        """What has come in of a frame that is not all there."""
        self._turn = trio.Lock()
        self.over = False
        self.dropped = 0

    # -- to the peer -------------------------------------------------------------------------------

    def send(self, frames: Sequence[Frame]) -> int:
        """Send frames; see :meth:`netvsp.endpoint.Endpoint.transmit`. Cannot block."""
        for number, frame in enumerate(frames):
            if self.over:
                break
            if not self._flush():
                return number
            pieces: list[Buffer] = [len(frame).to_bytes(_LENGTH, "big"), frame.head, *frame.rest]
            if len(pieces) > IOV_MAX:
                pieces = [pieces[0], frame.tobytes()]
            sent = self._write(pieces)
            if sent < _LENGTH + len(frame) and sent:
                # The caller's memory is not ours when we return.
                self._rest = memoryview(b"".join(pieces))[sent:]
                self._left.set()
            elif not sent and not self.over:
                return number
        return len(frames)

    def _flush(self) -> bool:
        """Whether nothing is left of an earlier frame."""
        if self._rest:
            self._rest = self._rest[self._write([self._rest]) :]
        return not self._rest

    def _write(self, pieces: Sequence[Buffer]) -> int:
        try:
            return self._sock.sendmsg(pieces)
        except BlockingIOError:
            return 0
        except OSError:  # the reader is told, too, and says so
            self.over = True
            self._rest = memoryview(b"")
            return 0

    async def wait_writable(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`. Is a checkpoint."""
        async with self._turn:
            while not self.over:
                try:
                    await trio.lowlevel.wait_writable(self._sock)
                except trio.ClosedResourceError:
                    return
                if self._flush():
                    return

    # -- from the peer -----------------------------------------------------------------------------

    async def receive(self, port: Port) -> None:
        """Hand frames to an adapter, for one of its lives. Is a checkpoint.

        Meanwhile, what is left of a frame follows as soon as there is room. Another frame may never
        come, and the peer may do nothing until it has all of this one (passt: tap.c,
        tap_handler_passt).

        Raises:
            EndpointError: The peer is gone, or speaks of something else, or the stream was closed.
        """
        await run_together(lambda: self._read(port), self._send_rests)

    async def _send_rests(self) -> None:
        while True:
            await self._left.wait()
            await self.wait_writable()
            if self.over or not self._rest:
                self._left = trio.Event()

    async def _read(self, port: Port) -> None:
        data = self._data
        while True:
            if self.over:
                raise EndpointError(f"{self._peer} is gone")
            await trio.lowlevel.wait_readable(self._sock)
            try:
                chunk = self._sock.recv(CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                chunk = b""
            if not chunk:
                self.over = True
                raise EndpointError(f"{self._peer} is gone")
            data += chunk
            used = 0
            try:
                while True:
                    before = used
                    frames, used = self._cut(data, used)
                    if used == before:
                        break
                    while frames:
                        taken = port.receive(frames)
                        del frames[:taken]
                        if frames:
                            await port.wait_room()
                    await trio.lowlevel.checkpoint()
            finally:
                del data[:used]

    def _cut(self, data: bytearray, position: int) -> tuple[list[Frame], int]:
        """Return some of the frames from a place on, each with bytes of its own; and their end."""
        frames: list[Frame] = []
        for _ in range(TURN):
            if len(data) - position < _LENGTH:
                break
            length = int.from_bytes(data[position : position + _LENGTH], "big")
            if length > _LONGEST:
                self.over = True
                raise EndpointError(f"{self._peer} sends a frame of {length} bytes")
            end = position + _LENGTH + length
            if end > len(data):
                break
            if length >= ETHERNET_HEADER:
                frames.append(Frame(bytes(data[position + _LENGTH : end])))
            else:
                self.dropped += 1
            position = end
        return frames, position

    def close(self) -> None:
        """Close the socket; who waits for it goes on. Idempotent."""
        self.over = True
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
