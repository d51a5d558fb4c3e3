"""A user-mode network by `passt <https://passt.top>`_: a process beside us, at a stream of frames.

It needs no privilege, and makes ordinary sockets of what the guest sends: the guest reaches what
this host reaches, by the host's own addresses.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import trio

from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo, Offloads, Port
from netvsp.endpoints.stream import FrameStream
from netvsp.endpoints.tasks import CLOSED, run_together
from netvsp.frames.frame import (
    BROADCAST,
    ETHERNET_HEADER,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    Frame,
)
from netvsp.frames.internet import ARP_REQUEST, IPV6_HEADER, MIN_FRAME, build_arp
from vmbus.errors import ConfigError

PROGRAM = "passt"
MAX_MTU = 65520
_RESOLVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
"""The second has the real ones where the first names a resolver of this host only."""
_PROBE = bytes.fromhex("0200005e0001")
"""Who asks whether it is there."""
_ASKED = bytes((169, 254, 77, 77))
"""What it asks for: passt answers for every address but the guest's."""
START = 2.0
"""Seconds after which a passt that has not ended is taken for one that works."""
_SOCKET_BUFFER = 1 << 20
_MESSAGES = 8192
"""Bytes of what it says that are looked at."""
_LONGEST_REASON = 200
"""Characters of what it said last."""


class Forward(NamedTuple):
    """A port of the host's that leads to one of the guest's."""

    address: str
    host: int
    guest: int

    def __str__(self) -> str:
        return f"{self.address}/{self.host}:{self.guest}"


def find_passt() -> str | None:
    """Return the path of the program, if it is installed."""
    return shutil.which(PROGRAM)


def resolvers() -> list[str]:
    """Return the addresses of the host's name servers that a guest can use."""
    for name in _RESOLVERS:
        found = [address for address in _name_servers(name) if not address.is_loopback]
        if found:
            return [str(address) for address in found]
    return []


def _name_servers(name: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        text = Path(name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            with contextlib.suppress(ValueError):
                yield ipaddress.ip_address(words[1].partition("%")[0])


class Passt:
    """A running passt, and our end of its stream.

    Args:
        sock: The stream; owned.
        messages: A pipe with what it says; owned.
        pid: Its process.
        process: The same, if it is this one's child; ended with it.
    """

    def __init__(
        self, sock: socket.socket, messages: int, pid: int, process: trio.Process | None = None
    ) -> None:
        self.stream = FrameStream(sock, PROGRAM)
        self.pid = pid
        self._process = process
        self._messages = messages

    async def reason(self) -> str:
        """Return how it has ended, as far as that is known here, and what it said last.

        Its last line need not have to do with its end: a signal leaves none. Is a checkpoint.
        """
        said = self.last_line()
        code = None
        if self._process is not None:
            with trio.move_on_after(START):  # its stream may have ended before it
                await self._process.wait()
            code = self._process.returncode
        await trio.lowlevel.checkpoint()
        words = f"it said last: {said}" if said else "it says nothing"
        return words if code is None else f"{_end_of(code)}; {words}"

    def last_line(self) -> str:
        """Return the last line that it has said since the last call. Cannot block."""
        said = b""
        with contextlib.suppress(OSError):
            said = os.read(self._messages, _MESSAGES)
        lines = said.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        # It is for a log, or somebody's terminal.
        return "".join(each if each.isprintable() else "?" for each in last[:_LONGEST_REASON])

    async def aclose(self) -> None:
        """End it: it does not outlive its stream. Is a checkpoint; waits even if cancelled."""
        self.stream.close()
        if self._process is not None:
            await end(self._process)
        os.close(self._messages)
        await trio.lowlevel.checkpoint()


def _end_of(code: int) -> str:
    """Return in words what ``returncode`` says."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time one
        return f"killed by signal {-code}"


class Starter(Protocol):
    """Starts a passt, here or elsewhere."""

    async def start(self) -> Passt:
        """Start one, when the one before has ended. A checkpoint. Raises OSError, EndpointError."""

    def close(self) -> None:
        """Start none any more. Cannot block."""


async def spawn(program: str, arguments: Sequence[str]) -> tuple[trio.Process, socket.socket, int]:
    """Start a passt. Is a checkpoint.

    Returns:
        The process, our end of its stream, and a pipe with what it says; all the caller's.

    Raises:
        OSError: It cannot be started.
    """
    ours, theirs = socket.socketpair()
    messages, output = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # it never waits for who reads them
    try:
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        process = await trio.lowlevel.open_process(
            [program, *arguments, "--fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # what ends us by the keyboard does not end it first
        )
    except BaseException:
        ours.close()
        os.close(messages)
        raise
    finally:
        theirs.close()
        os.close(output)
    return process, ours, messages


async def end(process: trio.Process) -> None:
    """End a passt that was started here. Is a checkpoint; waits even if cancelled."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    with trio.CancelScope(shield=True):
        await process.wait()


class Forwards(NamedTuple):
    """What is forwarded."""

    tcp: Sequence[Forward] = ()
    udp: Sequence[Forward] = ()


class LocalStarter:
    """Starts a passt as this process's child.

    Args:
        program: Path of passt.
        forwards: Ports to forward.
    """

    def __init__(self, program: str, forwards: Forwards) -> None:
        self._program = program
        self._arguments = ["--foreground", "--quiet", "--no-map-gw"]
        for address in resolvers():
            self._arguments += ["--dns", address]
        for option, ports in (("--tcp-ports", forwards.tcp), ("--udp-ports", forwards.udp)):
            for each in ports or ("none",):
                self._arguments += [option, str(each)]

    async def spawn(self) -> tuple[trio.Process, socket.socket, int]:
        """See :func:`spawn`."""
        return await spawn(self._program, self._arguments)

    async def start(self) -> Passt:
        """See :meth:`Starter.start`."""
        process, sock, messages = await self.spawn()
        return Passt(sock, messages, process.pid, process)

    def close(self) -> None:
        """See :meth:`Starter.close`."""


class PasstEndpoint(Endpoint):
    """A network behind a passt of its own; made by :meth:`open`.

    Every life of the adapter has another passt: connections of a guest that is gone end with it.
    """

    info = EndpointInfo(
        # It looks at no sum of what it gets, and takes TCP segments of any length.
        offloads=Offloads(checksum=True, tcp_segments=True),
        mtu=MAX_MTU,
    )

    def __init__(self, starter: Starter, running: Passt) -> None:
        self._starter = starter
        self._running: Passt | None = running
        self._fresh = True
        self._closed = False

    @classmethod
    async def open(cls, starter: Starter) -> PasstEndpoint:
        """Start it, and wait until it answers. Is a checkpoint.

        Args:
            starter: Starts it; owned, also if this raises.

        Raises:
            ConfigError: It cannot be started, or has ended, and why.
        """
        try:
            running = await starter.start()
        except (OSError, EndpointError) as error:
            starter.close()
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"passt cannot be started: {why}") from error
        try:
            await _answered(running)
        except BaseException as error:
            starter.close()
            try:
                if isinstance(error, EndpointError):
                    reason = await running.reason()
                    raise ConfigError(f"passt has ended: {reason}") from error
                raise
            finally:
                await running.aclose()
        return cls(starter, running)

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        if self._running is None:
            return len(frames)
        return self._running.stream.send([_unpadded(frame) for frame in frames])

    async def wait_writable(self, queue: int) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`."""
        del queue
        if self._running is None:
            await trio.lowlevel.checkpoint()
        else:
            await self._running.stream.wait_writable()

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        await self._renew()
        assert self._running is not None
        self._fresh = False
        try:
            await self._running.stream.receive(port)
        except EndpointError as error:
            if self._closed:
                raise
            raise EndpointError(f"{error}: {await self._running.reason()}") from error

    async def _renew(self) -> None:
        """See to it that there is a passt that has had no guest yet."""
        if self._closed:
            raise EndpointError(CLOSED)
        if self._fresh:
            return
        old, self._running = self._running, None
        if old is not None:
            await old.aclose()
        try:
            new = await self._starter.start()
        except OSError as error:
            raise EndpointError(f"passt cannot be started: {error}") from error
        if self._closed:
            await new.aclose()
            raise EndpointError(CLOSED)
        self._running = new

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        running = self._running
        return {
            "network": PROGRAM,
            "pid": running.pid if running else None,
            "dropped": running.stream.dropped if running else 0,
        }

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        self._closed = True
        self._starter.close()
        running, self._running = self._running, None
        if running is not None:
            await running.aclose()
        await trio.lowlevel.checkpoint()


def _unpadded(frame: Frame) -> Frame:
    """Return a frame without what fills it up to the least length of Ethernet.

    passt drops an IPv4 packet that does not end with its frame (passt: tap.c, tap4_handler), an
    acknowledgement for example.
    """
    head = frame.head
    if frame.rest or len(head) > MIN_FRAME:
        return frame
    if head[12:14] == ETHERTYPE_IPV4:
        length = ETHERNET_HEADER + int.from_bytes(head[16:18], "big")
    elif head[12:14] == ETHERTYPE_IPV6:
        length = ETHERNET_HEADER + IPV6_HEADER + int.from_bytes(head[18:20], "big")
    else:
        return frame
    return Frame(head[:length], (), frame.offload) if length < len(head) else frame


class _Answer:
    """A port that waits for one frame."""

    def __init__(self) -> None:
        self.came = trio.Event()

    @property
    def mac(self) -> bytes:
        return _PROBE

    def receive(self, frames: Sequence[Frame]) -> int:
        self.came.set()
        return len(frames)

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    def lost(self, count: int) -> None:
        """There is nobody to tell."""

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        """There is nobody to tell."""


async def _answered(running: Passt) -> None:
    """Wait until passt answers a question about an address, or has ended."""
    answer = _Answer()
    ask = build_arp(ARP_REQUEST, _PROBE, bytes(4), bytes(6), _ASKED, target_mac=BROADCAST)
    running.stream.send([Frame(ask)])
    with trio.move_on_after(START):  # a host without IPv4 does not answer
        await run_together(lambda: running.stream.receive(answer), answer.came.wait)
