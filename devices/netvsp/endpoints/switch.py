"""``switch:[vlan=5]lan``: the adapter is connected to a learning switch, with other guests'.

Guests that are served in the switch's process have a :class:`SwitchEndpoint`, those of other
processes a :class:`SwitchLineEndpoint` at the end of a line to it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import trio

from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo, Offloads, Port
from netvsp.frames.frame import Frame
from netvsp.shared.hub import Hub, get_hub
from netvsp.shared.keeper import SwitchKeeper
from netvsp.shared.line import FrameLine, make_buffer
from netvsp.shared.messages import (
    MAX_MESSAGE,
    Kind,
    broken,
    frames_untrusted,
    info_untrusted,
    kind_untrusted,
    lost_untrusted,
    pack_station,
)
from netvsp.shared.options import PORT_OPTIONS, SCHEME, find_switch, parse_options
from netvsp.switch.port import QUEUE_FULL, PortConfig
from vmbus.errors import ConfigError, PeerProtocolError
from vmbus.plugins.sharing import Line, Share
from vmbus.plugins.specs import Spec

OPTIONS = PORT_OPTIONS
BATCH = 64
"""Frames that are handed to an adapter in one call."""
BATCH_SIZE = 256 << 10
"""Their bytes."""

_SOCKET_MESSAGES = 512
"""More than a socket's buffer has."""

_INFO = EndpointInfo(
    offloads=Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True), queues=64
)


_lines: contextvars.ContextVar[list[Line] | None] = contextvars.ContextVar("lines", default=None)


@contextlib.contextmanager
def connecting(line: Line | None) -> Iterator[None]:
    """Connect the switch that is opened within a ``with`` block by a line. Owns the line.

    Args:
        line: To the switch, wherever it is in a specification; None: it is in this process.
    """
    lines = [] if line is None else [line]
    token = _lines.set(lines)
    try:
        yield
    finally:
        _lines.reset(token)
        for each in lines:  # nobody has wanted it
            each.close()


async def open_spec(spec: Spec) -> SwitchEndpoint | SwitchLineEndpoint:
    """Open ``switch:[vlan=N,trunk=VLANS,isolated,uplink,addresses=N,join=DIRECTORY]NAME``.

    Connects with a switch of this process, of which the first of its name makes it, or by a line
    with one of another: :func:`connecting`. Is a checkpoint.

    Raises:
        ConfigError: The specification cannot be honoured.
    """
    options = parse_options(spec)
    await trio.lowlevel.checkpoint()
    lines = _lines.get()
    if lines:
        return connect(lines.pop())
    hub = get_hub(options.name, options.join)
    try:
        return SwitchEndpoint(hub, str(spec), options.port)
    except ConfigError:
        await hub.release()
        raise


def shared(specs: Sequence[str]) -> dict[str, Share]:
    """Return those specifications that name switches, and how they are shared. Cannot block.

    See :meth:`vmbus.plugins.sharing.SharingPlugin.shared`.

    Raises:
        ConfigError: One cannot be understood.
    """
    found: dict[str, Share] = {}
    for text in specs:
        spec = find_switch(text)
        if spec is not None:
            name = parse_options(spec).name
            found[text] = Share(keeper=f"{SCHEME}:{name}", within_process=False)
    return found


async def open_keeper(specs: Sequence[str]) -> SwitchKeeper:
    """Make the switch that some specifications name. Is a checkpoint.

    Raises:
        ConfigError: They disagree, or one cannot be understood.
    """
    found = [parse_options(spec) for text in specs if (spec := find_switch(text)) is not None]
    name = found[0].name
    joins = sorted({each.join for each in found if each.join})
    if len(joins) > 1:
        raise ConfigError(f"switch {name}: join is one directory, not {' and '.join(joins)}")
    hub = get_hub(name, *joins)
    await trio.lowlevel.checkpoint()
    return SwitchKeeper(hub)


def connect(line: Line) -> SwitchLineEndpoint:
    """Connect with a switch of another process. Owns the line. Cannot block."""
    return SwitchLineEndpoint(FrameLine(line.sock, make_buffer()))


class SwitchEndpoint(Endpoint):
    """A port of a switch in this process. Must be made inside a trio run.

    Args:
        hub: The switch; given back at the end.
        name: What people call the port.
        config: What it is for.

    Raises:
        ConfigError: The switch has no port left.
    """

    info = _INFO

    def __init__(self, hub: Hub, name: str, config: PortConfig) -> None:
        self._hub = hub
        self._wake = trio.Event()
        self._closed = False
        self._adapter: Port | None = None
        self._told: bytes | None = None
        self._lost = 0
        self._port = hub.switch.add_port(name, config, self._ready)

    def _ready(self) -> None:
        self._wake.set()

    def _introduce(self, address: bytes | None) -> None:
        if address != self._told:
            self._told = address
            self._hub.set_station(self._port, address)

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        if self._adapter is not None:
            self._introduce(self._adapter.mac)
        return self._hub.switch.receive(self._port, frames)

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        self._adapter = port
        self._introduce(port.mac)
        ours = self._port
        self._lost = ours.dropped[QUEUE_FULL]
        try:
            while True:
                frames = ours.take(BATCH, BATCH_SIZE)
                lost = ours.dropped[QUEUE_FULL]
                if lost != self._lost:
                    port.lost(lost - self._lost)
                    self._lost = lost
                while frames:
                    taken = port.receive(frames)
                    del frames[:taken]
                    if frames:
                        await port.wait_room()
                if ours.queue.count:
                    await trio.lowlevel.checkpoint()
                else:
                    await self._wake.wait()
                    self._wake = trio.Event()
        finally:
            self._adapter = None
            self._introduce(None)

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        switch = self._hub.switch
        return {
            "switch": self._hub.name,
            "ports": len(switch.ports),
            "addresses": len(switch.table),
            "moves": switch.table.moves,
            "port": self._port.describe(),
        }

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        if not self._closed:
            self._closed = True
            self._hub.switch.remove_port(self._port)
            await self._hub.release()
        await trio.lowlevel.checkpoint()


class SwitchLineEndpoint(Endpoint):
    """A port of a switch in another process.

    Args:
        line: To it; owned.
    """

    info = _INFO

    def __init__(self, line: FrameLine) -> None:
        self._line = line
        self._adapter: Port | None = None
        self._told: bytes | None = None
        self._known: dict[str, Any] = {}
        self._lost = 0
        self._dropped = 0

    def _introduce(self, address: bytes | None) -> bool:
        """Say who is here, if it has not been said; whether there was room for it."""
        if address != self._told:
            if not self._line.send(pack_station(address)):
                return False
            self._told = address
        return True

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        line = self._line
        done = 0
        try:
            if self._adapter is not None and not self._introduce(self._adapter.mac):
                return 0
            while done < len(frames):
                count = line.send_frames(frames[done : done + BATCH] if done else frames)
                if not count:
                    break
                done += count
        except OSError:
            # The switch is gone; the task that reads from it takes the link down.
            self._dropped += len(frames) - done
            return len(frames)
        return done

    async def wait_writable(self, queue: int) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`."""
        del queue
        await self._line.wait_writable()

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        self._adapter = port
        try:
            self._skip()
            while not self._introduce(port.mac):
                await self._line.wait_writable()
            await self._bring(port)
        except PeerProtocolError as error:
            raise EndpointError(str(error)) from error
        except OSError as error:
            raise EndpointError(_GONE) from error
        finally:
            self._adapter = None
            with contextlib.suppress(OSError):
                self._introduce(None)

    def _skip(self) -> None:
        """Drop frames of an earlier life, of which the socket has a few."""
        for _ in range(_SOCKET_MESSAGES):
            data = self._line.receive_nowait()
            if not data:
                return
            self._take_untrusted(data)

    async def _bring(self, port: Port) -> None:
        line = self._line
        while True:
            data = await line.receive()
            if not data:
                raise EndpointError(_GONE)
            frames = self._take_untrusted(data)
            while frames:
                taken = port.receive(frames)
                del frames[:taken]
                if frames:
                    await port.wait_room()
            await trio.lowlevel.checkpoint()

    def _take_untrusted(self, data: memoryview) -> list[Frame]:
        """Act on a message; return its frames, if it has some."""
        if len(data) > MAX_MESSAGE:
            raise broken("a message that is too long")
        kind, count = kind_untrusted(data)
        if kind is Kind.FRAMES:
            return frames_untrusted(data, count)
        if kind is not Kind.INFO:
            raise broken(f"{kind.name} from a switch")
        self._known = info_untrusted(data)
        lost = lost_untrusted(self._known)
        if self._adapter is not None and lost > self._lost:
            self._adapter.lost(lost - self._lost)
        self._lost = lost
        return []

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        return {**self._known, "dropped": self._dropped, "lost": self._line.lost}

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        self._line.close()
        await trio.lowlevel.checkpoint()


_GONE = "the process that keeps the switch has ended"
