"""``tap:[queues=N]NAME``: a TAP interface of the host, for a bridge or a router.

``tap:vnet0``, ``tap:[queues=4]vnet0``. An interface that was made for the user
(``ip tuntap add dev vnet0 mode tap user $USER``) needs no privilege. One that does not exist is
made, which takes CAP_NET_ADMIN; it is up at once, and is gone when the adapter is.

Sums that are not filled in and segments of up to 64 KiB cross it whole, both ways, by a
``virtio_net_hdr`` before each frame: what they need is done by the network behind it, if anybody
does it at all. A segment is one system call, out of the guest's memory.

The guest's link is up while the interface is (``ip link set vnet0 up``) and has a carrier. If the
interface is deleted, the link is down for good. Its MTU is the longest that a guest can set.

With ``queues=N`` a guest's channels have descriptors of their own; an existing interface has to be
made for that, with ``multi_queue``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import trio

from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo, Port
from netvsp.endpoints import tun
from netvsp.endpoints.tasks import CLOSED, run_together
from netvsp.frames.frame import HEADERS, MAX_FRAME, VIRTIO_HEADER, VLAN_TAG, Buffer, Frame
from netvsp.frames.offload import PLAIN, pack_virtio, unpack_virtio
from netvsp.spec import EndpointSpec
from vmbus.errors import ConfigError
from vmbus.plugins.options import Option
from vmbus.plugins.remarks import remark

TURN = 64
"""Frames that are read before others have their turn."""
LARGE = 16
"""Of those, frames of more than :data:`SMALL` bytes."""
SMALL = 4096
"""Frames up to here are copied as they are read; longer ones wait in their buffer."""
IOV_MAX = 1024
"""Pieces that one writev takes: linux/include/uapi/linux/uio.h, UIO_MAXIOV."""

_HEADER = VIRTIO_HEADER.size
_LONGEST = _HEADER + MAX_FRAME + VLAN_TAG
_GONE = {errno.EBADFD, errno.ENODEV, errno.ENXIO}

OPTIONS = (Option("queues", "queues of the interface, for as many channels", "N", "1"),)


_log = logging.getLogger("vmbus.netvsp")


class TapEndpoint(Endpoint):
    """A TAP interface.

    Args:
        tap: It, owned from now on.

    Raises:
        OSError: Its state cannot be watched.
    """

    def __init__(self, tap: tun.Tap) -> None:
        self.name = tap.name
        self.info = EndpointInfo(offloads=tap.offloads, queues=len(tap.queues), mtu=tap.mtu)
        self._links = tun.watch_links()
        self._queues = list(tap.queues)
        self._turns = [trio.Lock() for _ in tap.queues]
        self._waits: dict[int, trio.CancelScope] = {}
        """Who waits for the kernel, by queue."""
        self._over = ""
        """Why there is nothing any more, if there is not."""
        self._up: bool | None = None
        self._lost: int | None = None
        """Frames that the kernel had dropped when it was last asked."""
        self._dropped: Counter[str] = Counter()

    # -- from the guest ----------------------------------------------------------------------------

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        if self._over:
            return len(frames)
        fd = self._queues[queue]
        writev = os.writev
        for number, frame in enumerate(frames):
            offload, rest = frame.offload, frame.rest
            header = PLAIN if offload is None else pack_virtio(offload)
            pieces: tuple[Buffer, ...] = (header, frame.head, *rest)
            if len(pieces) > IOV_MAX:
                pieces = (header, frame.tobytes())
            try:
                writev(fd, pieces)
            except BlockingIOError:
                return number
            except OSError as error:
                # The interface is down (EIO), or the guest has asked for what does not fit to its
                # frame (EINVAL): that frame is lost, as on a wire.
                self._dropped[errno.errorcode.get(error.errno or 0, str(error.errno))] += 1
        return len(frames)

    async def wait_writable(self, queue: int) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`."""
        async with self._turns[queue]:
            if self._over or not self._up:
                return  # what is sent is dropped
            with trio.CancelScope() as scope, contextlib.suppress(trio.ClosedResourceError):
                self._waits[queue] = scope
                try:
                    await trio.lowlevel.wait_writable(self._queues[queue])
                finally:
                    del self._waits[queue]

    # -- to the guest ------------------------------------------------------------------------------

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        self._up = None
        self._look(port)
        for queue in range(len(self._queues)):
            await self._drain(queue)
        self._lost = tun.dropped(self.name)
        await run_together(
            functools.partial(self._watch, port),
            *[functools.partial(self._read, queue, port) for queue in range(len(self._queues))],
        )

    async def _drain(self, queue: int) -> None:
        """Forget what was meant for a guest that is gone."""
        try:
            left = tun.queue_length(self.name)
        except OSError:  # renamed, or in another namespace
            left = 0
        buffer = bytearray(_HEADER)
        while left > 0:
            await trio.lowlevel.checkpoint()
            for _ in range(TURN):
                try:
                    os.readv(self._open_queue(queue), [buffer])
                except BlockingIOError:
                    return
                except OSError as error:
                    raise self._ended(error) from error
            left -= TURN

    async def _read(self, queue: int, port: Port) -> None:
        buffers = [memoryview(bytearray(_LONGEST + 1)) for _ in range(LARGE)]
        while True:
            await trio.lowlevel.wait_readable(self._open_queue(queue))
            frames = self._some(self._open_queue(queue), buffers)
            while frames:
                taken = port.receive(frames)
                del frames[:taken]
                if frames:
                    # Not read meanwhile: the kernel keeps some, and drops what is too much.
                    await port.wait_room()
                    self._tell_lost(port)

    def _some(self, fd: int, buffers: Sequence[memoryview]) -> list[Frame]:
        """Read as many frames as one turn is for; their bytes may be in the buffers."""
        frames: list[Frame] = []
        large = 0
        buffer = buffers[0]
        into = [buffer]
        readv = os.readv
        for _ in range(TURN):
            try:
                count = readv(fd, into)
            except BlockingIOError:
                break
            except OSError as error:
                raise self._ended(error) from error
            if not _HEADER < count <= _LONGEST:
                self._dropped["too long"] += 1
                continue
            # Most have none: neither flags nor a kind of segment.
            offload = unpack_virtio(buffer) if buffer[0] or buffer[1] else None
            if count <= SMALL:
                frames.append(Frame(bytes(buffer[_HEADER:count]), (), offload))
                continue
            end = _HEADER + HEADERS
            frames.append(Frame(bytes(buffer[_HEADER:end]), (buffer[end:count],), offload))
            large += 1
            if large == len(buffers):
                break
            buffer = buffers[large]
            into = [buffer]
        return frames

    def _tell_lost(self, port: Port) -> None:
        """Tell the guest of frames that the kernel has dropped since it was last asked."""
        before, self._lost = self._lost, tun.dropped(self.name)
        if before is not None and self._lost is not None and self._lost > before:
            port.lost(self._lost - before)

    def _open_queue(self, queue: int) -> int:
        """Return a queue's descriptor. Raises EndpointError if there is none any more."""
        if self._over:
            raise EndpointError(self._over)
        return self._queues[queue]

    # -- the interface -----------------------------------------------------------------------------

    async def _watch(self, port: Port) -> None:
        while True:
            self._open_queue(0)
            await trio.lowlevel.wait_readable(self._links)
            for _ in range(TURN):
                try:
                    self._links.recv(1)
                except BlockingIOError:
                    break
                except OSError:  # ENOBUFS: there was more than it could keep
                    continue
            self._look(port)

    def _look(self, port: Port) -> None:
        """Tell the guest about its link, if that has changed."""
        name = tun.name_of(self._open_queue(0))
        if name is None:
            raise self._ended(OSError(errno.EBADFD, ""))
        self.name = name
        up = tun.is_up(name)
        if up is not None and up != self._up:
            self._up = up
            if not up:
                # The kernel calls no queue writable until it is up.
                for scope in self._waits.values():
                    scope.cancel()
            port.link_changed(up=up)

    def _ended(self, error: OSError) -> EndpointError:
        """Take note that the interface is gone."""
        self._over = f"the interface {self.name} was deleted"
        if error.errno not in _GONE:
            self._over = f"the interface {self.name}: {error.strerror}"
        return EndpointError(self._over)

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        return {"interface": self.name, "up": self._up, "dropped": dict(self._dropped)}

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        if self._queues:
            self._over = CLOSED
            tun.release(self._queues[0])
            for fd in self._queues:
                trio.lowlevel.notify_closing(fd)
                os.close(fd)
            self._queues.clear()
            trio.lowlevel.notify_closing(self._links)
            self._links.close()
        await trio.lowlevel.checkpoint()


async def open_spec(spec: EndpointSpec) -> TapEndpoint:
    """Open ``tap:[queues=N]NAME``."""
    options = spec.reader()
    count = options.integer("queues")
    options.finish()
    if count is not None and not 1 <= count <= tun.MAX_QUEUES:
        raise spec.error(f"queues={count}; 1 to {tun.MAX_QUEUES} are possible")
    await trio.lowlevel.checkpoint()
    try:
        tap = tun.open_tap(spec.target, count or 1)
    except ConfigError as error:
        raise spec.error(str(error)) from error
    try:
        endpoint = TapEndpoint(tap)
    except BaseException:
        for fd in tap.queues:
            os.close(fd)
        raise
    if not tun.is_set_up(tap.name):
        advice = f"the guest's link is down until: ip link set {tap.name} up"
        remark(_log, f"{spec}: the interface is down; {advice}")
    return endpoint
