"""``pcap:[write=FILE,read=FILE]SPEC``: another endpoint, with its frames written to a file.

``pcap:[write=guest.pcapng]tap:vnet0`` writes all frames of both directions, for Wireshark: what the
guest sends is outbound there, what it gets is inbound. They are as they cross: segments that are
left whole are whole, and sums that are left to do are still to be done, which Wireshark may call
wrong. ``snap=BYTES`` keeps the beginning of each only. The file is made new, is no other capture's
and no pipe, and is written beside
the traffic: frames that come faster than the disk takes them are left out, and counted; a disk
that is full ends the capture, with a warning, and not the guest.

``pcap:[read=old.pcapng]null:`` brings the frames of a capture to the guest, when it comes up, as
fast as it takes them; with ``timed`` at the distances that they had. It reads pcapng and pcap.
Frames that are marked as outbound are left out. Guests take what is sent to their own address, to a
group or to everybody.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, BinaryIO

import trio

from netvsp.endpoint import Endpoint, EndpointError, Port
from netvsp.endpoints.files import open_to_read, open_to_write
from netvsp.endpoints.specs import open_endpoint
from netvsp.endpoints.tasks import run_together
from netvsp.endpoints.wrapper import EndpointWrapper, PortWrapper
from netvsp.frames import pcapng
from netvsp.frames.frame import ETHERNET_HEADER, MAX_FRAME, Frame
from netvsp.spec import EndpointSpec
from vmbus.plugins.options import Option
from vmbus.workers import abandon, shared_pool, work_for

MAX_WAITING = 16 << 20
"""Bytes that wait to be written; what is more is left out."""
PATIENCE = 5.0
"""Seconds for a disk to take what is left; then it is given up."""
TURN = 64
"""Frames that are read from a file at a time."""
TURN_SIZE = 1 << 20
"""Bytes of them, but for the last one."""

OPTIONS = (
    Option("write", "a file for all frames", "FILE", "none"),
    Option("snap", "bytes of each frame that are written", "SIZE", "all"),
    Option("read", "a file whose frames are brought in", "FILE", "none"),
    Option("timed", "bring them in at the distances that they had"),
)

_log = logging.getLogger("vmbus.netvsp")


class Capture:
    """A file that frames are written to.

    Args:
        path: Where; made new.
        snap: Bytes of each frame that are kept; 0: all.

    Attributes:
        written: Frames that are in the file.
        left_out: Frames that are not.
        failure: Why there will be no more, if there will not.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: str, snap: int = 0) -> None:
        self.path = path
        self.written = 0
        self.left_out = 0
        self.failure = ""
        self._snap = snap
        self._file: BinaryIO | None = open_to_write(path)
        self._waiting: deque[bytes] = deque([pcapng.build_header("guest", snap)])
        self._size = 0
        self._frames = 0
        """Frames among what waits."""
        self._arrived = trio.Event()
        self._arrived.set()
        self._closing = False
        self._over = trio.Event()
        self._pool = shared_pool()
        # Not in the lives of an adapter: a guest that leaves does not wait for a disk.
        trio.lowlevel.spawn_system_task(self._run)

    def add(self, frame: Frame, direction: int) -> None:
        """Have a frame written; its bytes are copied. Cannot block."""
        if self._closing:
            return
        frame = frame.tagged()
        length = len(frame)
        if self.failure or self._size + length > MAX_WAITING:
            self.left_out += 1
            return
        data = frame.head if not frame.rest or 0 < self._snap <= len(frame.head) else b""
        data = data or frame.tobytes()
        if self._snap:
            data = data[: self._snap]
        block = pcapng.build_packet(data, length, time.time_ns(), direction)
        self._waiting.append(block)
        self._size += len(block)
        self._frames += 1
        self._arrived.set()

    async def _run(self) -> None:
        work_for(self)
        try:
            while self._waiting or not self._closing:
                await self._arrived.wait()
                self._arrived = trio.Event()
                if self._closing:
                    self._arrived.set()
                if self._waiting:
                    await self._write()
        finally:
            self._over.set()

    async def _write(self) -> None:
        blocks, count = tuple(self._waiting), self._frames
        self._waiting.clear()
        self._size = self._frames = 0
        if self.failure:
            self.left_out += count
            return
        assert self._file is not None
        error: OSError | None
        try:
            left, error = await self._pool.run(_write_all, self._file, blocks)
        except OSError as caught:  # no thread, or it is not back
            left, error = len(blocks), caught
        lost = min(left, count)
        self.written += count - lost
        self.left_out += lost
        if error is not None:
            self.failure = error.strerror or str(error)
            _log.warning("%s: %s; the capture has ended", self.path, self.failure)

    async def aclose(self) -> None:
        """Write what is left and close the file. Idempotent; waits a while, even if cancelled."""
        self._closing = True
        self._arrived.set()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(PATIENCE):
                await self._over.wait()
            if not self._over.is_set():
                abandon(self)
                await self._over.wait()
            file, self._file = self._file, None
            if file is not None:
                await self._pool.aclose()
                self._pool.when_back(file.close)
            await trio.lowlevel.checkpoint()


def _write_all(file: BinaryIO, blocks: Sequence[bytes]) -> tuple[int, OSError | None]:
    """Write blocks. Blocks.

    Returns:
        How many are not in the file, nor is a part of one; and why.
    """
    data = memoryview(b"".join(blocks))
    done = 0
    start = file.tell()
    try:
        while done < len(data):
            done += file.write(data[done:])
    except OSError as error:
        ends = [end for end in itertools.accumulate(map(len, blocks)) if end <= done]
        with contextlib.suppress(OSError):  # a device has no end
            file.truncate(start + (ends[-1] if ends else 0))
        return len(blocks) - len(ends), error
    return 0, None


class _CapturingPort(PortWrapper):
    """Writes what the guest takes."""

    def __init__(self, outer: Port, capture: Capture) -> None:
        super().__init__(outer)
        self._capture = capture

    def receive(self, frames: Sequence[Frame]) -> int:
        taken = super().receive(frames)
        for frame in frames[:taken]:
            self._capture.add(frame, pcapng.INBOUND)
        return taken


class PcapEndpoint(EndpointWrapper):
    """Another endpoint, with a capture of its frames, frames out of a capture, or both.

    Args:
        inner: The endpoint inside, owned from now on.
        capture: Where frames are written; owned.
        read: A file whose frames are brought in.
        timed: Bring them in at the distances that they had.
    """

    def __init__(
        self,
        inner: Endpoint,
        *,
        capture: Capture | None = None,
        read: str = "",
        timed: bool = False,
    ) -> None:
        super().__init__(inner)
        self._capture = capture
        self._read = read
        self._timed = timed
        self._brought = 0

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        taken = self.inner.transmit(queue, frames)
        if self._capture is not None:
            for frame in frames[:taken]:
                self._capture.add(frame, pcapng.OUTBOUND)
        return taken

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        capture = self._capture
        if capture is not None:
            port = _CapturingPort(port, capture)
        tasks: list[Callable[[], Awaitable[None]]] = [functools.partial(self.inner.run, port)]
        if self._read:
            tasks.append(functools.partial(self._bring, port))
        await run_together(*tasks)

    async def _bring(self, port: Port) -> None:
        pool = shared_pool()
        try:
            try:
                file = await pool.run(open_to_read, self._read)
            except OSError as error:
                raise EndpointError(f"{self._read}: {error.strerror}") from error
            try:
                frames = pcapng.read_capture(file.read)
                begin, first = trio.current_time(), None
                while some := await pool.run(_next, frames):
                    for each in some:
                        if self._timed:
                            first = each.time if first is None else first
                            await trio.sleep_until(begin + each.time - first)
                        await self._hand_over(port, each)
            except (OSError, pcapng.CaptureError) as error:
                raise EndpointError(f"{self._read}: {error}") from error
            finally:
                pool.when_back(file.close)
        finally:
            await pool.aclose()
        await trio.sleep_forever()

    async def _hand_over(self, port: Port, captured: pcapng.Captured) -> None:
        size = len(captured.data)
        if captured.direction != pcapng.OUTBOUND and ETHERNET_HEADER <= size <= MAX_FRAME:
            frame = Frame(captured.data)
            while not port.receive([frame]):
                await port.wait_room()
            self._brought += 1
        await trio.lowlevel.checkpoint()

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        found: dict[str, Any] = {"inner": self.inner.snapshot()}
        if self._capture is not None:
            found["write"] = {
                "file": self._capture.path,
                "written": self._capture.written,
                "left_out": self._capture.left_out,
                "failure": self._capture.failure,
            }
        if self._read:
            found["read"] = {"file": self._read, "brought": self._brought}
        return found

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        try:
            await self.inner.aclose()
        finally:
            if self._capture is not None:
                await self._capture.aclose()


def _next(frames: Iterator[pcapng.Captured]) -> list[pcapng.Captured]:
    """Read some frames. Blocks."""
    some = []
    size = 0
    for each in itertools.islice(frames, TURN):
        some.append(each)
        size += len(each.data)
        if size > TURN_SIZE:
            break
    return some


def _check(path: str) -> BinaryIO:
    """Open a capture and look at its first frame. Blocks; raises OSError and CaptureError."""
    file = open_to_read(path)
    try:
        next(pcapng.read_capture(file.read), None)
    except BaseException:
        file.close()
        raise
    return file


async def open_spec(spec: EndpointSpec) -> PcapEndpoint:
    """Open ``pcap:[write=FILE,snap=SIZE,read=FILE,timed]SPEC``."""
    options = spec.reader()
    write = options.text("write")
    snap = options.size("snap")
    read = options.text("read")
    timed = options.flag("timed")
    options.finish()
    if not (write or read):
        raise spec.error("needs write=FILE or read=FILE")
    if (snap is not None and not write) or (timed and not read):
        raise spec.error("snap is for write=FILE, and timed for read=FILE")
    with contextlib.ExitStack() as stack:
        if read:
            try:
                # Held until the other one is open, which must not be the same.
                stack.enter_context(_check(read))
            except OSError as error:
                raise spec.error(f"{read}: {error.strerror}") from error
            except pcapng.CaptureError as error:
                raise spec.error(f"{read}: {error}") from error
        inner = await open_endpoint(spec.inner())
        try:
            capture = Capture(write, snap or 0) if write else None
        except OSError as error:
            await inner.aclose()
            raise spec.error(f"{write}: {error.strerror}") from error
    return PcapEndpoint(inner, capture=capture, read=read or "", timed=timed)
