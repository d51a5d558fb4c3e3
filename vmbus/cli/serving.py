"""Serving, as ``vmbus serve`` was told: sockets, one process or many, signals, exit codes.

Everything that can be wrong with the command line is found before the sockets exist: back-ends
are opened and closed once, so that a mistake ends the program and not the first guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.cli.notify import notify
from vmbus.cli.program import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PROTOCOL, Failure
from vmbus.errors import ConfigError, ProtocolError
from vmbus.wire.versions import Version

if TYPE_CHECKING:
    import trio

    from vmbus.attach.server import Admission, ServerLimits, SocketTransport
    from vmbus.attach.server.admission import Peer
    from vmbus.host import BusConfig
    from vmbus.server import DeviceSetup, GuestServer

_log = logging.getLogger("vmbus.cli")


class Socket(NamedTuple):
    """A place where VMMs come in."""

    name: str | None
    """Of the guest that comes by it; None: it is called otherwise."""
    path: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command line of ``vmbus serve``, understood."""

    setups: tuple[DeviceSetup, ...]
    max_version: Version
    max_vps: int
    max_guests: int
    poll: float | None
    """Seconds; None for what is worth while on this machine."""
    sockets: tuple[Socket, ...]
    control: str | None
    identity: str
    fd: int | None
    mode: str
    permissions: int
    allowed: tuple[str, ...] | None
    single_process: bool
    sandbox: bool
    once: bool
    trust_vmm: bool


class Entrance(NamedTuple):
    """A socket for VMMs."""

    sock: socket.socket
    name: str | None
    words: str
    """What to call it."""


class Entrances(NamedTuple):
    """All sockets of a server."""

    vmms: list[Entrance]
    operators: socket.socket | None


@contextlib.contextmanager
def entrances(settings: Settings) -> Iterator[Entrances]:
    """Open the sockets for the length of a ``with`` block.

    Raises:
        ConfigError: There is none, too many, or something else in its place.
        Failure: One cannot be made.
    """
    with contextlib.ExitStack() as stack:
        vmms, operators = _passed(settings, stack)
        for name, path in settings.sockets:
            sock = stack.enter_context(_made(path, settings.mode, settings.permissions))
            vmms.append(Entrance(sock, name, f"listening on {path}"))
        control = settings.control
        if control is None and settings.sockets:
            control = settings.sockets[0].path + CONTROL_SUFFIX
        if control is not None:
            operators = stack.enter_context(_made(control, "seqpacket", 0o600))
        yield Entrances(vmms, operators)


@contextlib.contextmanager
def _made(path: str, mode: str, permissions: int) -> Iterator[socket.socket]:
    from vmbus.attach.server import open_listener

    with contextlib.ExitStack() as stack:
        try:
            sock = stack.enter_context(open_listener(path, mode=mode, permissions=permissions))
        except OSError as error:
            raise Failure(f"cannot listen on {path}: {error.strerror}") from error
        yield sock


def _passed(
    settings: Settings, stack: contextlib.ExitStack
) -> tuple[list[Entrance], socket.socket | None]:
    """Adopt the sockets that somebody has passed to this process."""
    from vmbus.attach.protocol.sockets import from_fd
    from vmbus.attach.server import named_from_systemd

    if settings.sockets:
        return [], None
    operators: socket.socket | None = None
    if settings.fd is not None:
        found = [from_fd(settings.fd)]
    else:
        passed = named_from_systemd()
        controls = [sock for name, sock in passed if name == "control"]
        found = [sock for name, sock in passed if name != "control"]
        for sock in controls:
            stack.enter_context(sock)
        if len(controls) > 1:
            raise ConfigError(f"systemd passed {len(controls)} sockets called control; one is it")
        operators = controls[0] if controls else None
        if not found:
            raise ConfigError(
                "there is nowhere to listen; give --socket PATH or --fd N, or pass a socket "
                "from systemd"
            )
    vmms = []
    for sock in found:
        stack.enter_context(sock)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        words = "listening on" if listens else "serving"
        vmms.append(Entrance(sock, None, f"{words} descriptor {sock.fileno()}"))
    return vmms, operators


class _Server(Protocol):
    """What both ways of serving have in common."""

    @property
    def failed(self) -> bool: ...

    @property
    def faults(self) -> int: ...

    async def serve(
        self, listener: socket.socket, *, admission: Admission, exit_after_guest: bool
    ) -> None: ...

    async def query(self, kind: str) -> dict[str, Any]: ...

    async def command(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def is_own(self, peer: Peer) -> bool: ...


class _SingleProcess:
    """Serves all guests in this process, and keeps in mind how they fared."""

    def __init__(self, server: GuestServer, limits: ServerLimits, *, trust_vmm: bool) -> None:
        self._server = server
        self._limits = limits
        self._trust_vmm = trust_vmm
        self.failed = False
        self._faults = 0

    @property
    def faults(self) -> int:
        return self._faults + self._server.faults

    async def serve(
        self, listener: socket.socket, *, admission: Admission, exit_after_guest: bool
    ) -> None:
        from vmbus.attach.server import serve

        await serve(
            listener,
            self._handle,
            limits=self._limits,
            trust_vmm=self._trust_vmm,
            admission=admission,
            query=self._server.query_own,
            exit_after_guest=exit_after_guest,
        )

    async def _handle(self, transport: SocketTransport) -> None:
        try:
            await self._server.handle(transport)
        except ProtocolError:
            self._faults += 1
            raise
        except Exception:
            self.failed = True
            raise
        finally:
            self._faults += transport.dropped_messages

    async def query(self, kind: str) -> dict[str, Any]:
        return self._server.query(kind)

    async def command(self, request: dict[str, Any]) -> dict[str, Any]:
        return await self._server.command(request)

    def is_own(self, _: Peer) -> bool:
        return False


@contextlib.asynccontextmanager
async def _open_server(settings: Settings, config: BusConfig) -> AsyncIterator[_Server]:
    from vmbus.attach.server import ServerLimits
    from vmbus.server import GuestServer, Keepers
    from vmbus.supervisor import Plan, Supervisor

    limits = ServerLimits(max_vps=settings.max_vps, max_connections=settings.max_guests)
    if settings.single_process:
        async with Keepers.open(settings.setups) as keepers:
            server = GuestServer(settings.setups, config, keepers=keepers)
            yield _SingleProcess(server, limits, trust_vmm=settings.trust_vmm)
        return
    plan = Plan(
        setups=settings.setups,
        config=config,
        limits=limits,
        trust_vmm=settings.trust_vmm,
        sandbox=settings.sandbox,
        allowed=settings.allowed,
    )
    async with Supervisor.open(plan) as supervisor:
        yield supervisor


def confine(settings: Settings) -> None:
    """Refuse this process files that are not allowed, if it serves guests itself.

    Before it does anything else: the kernel's rules are for the thread that asks, and later ones.

    Raises:
        ConfigError: This kernel cannot, or a directory is not there.
    """
    if not settings.single_process or settings.allowed is None:
        return
    from vmbus.supervisor.files import named_files
    from vmbus.supervisor.sandbox import no_new_privileges, restrict_files

    no_new_privileges()
    paths = [path for _, path in settings.sockets] + [settings.control or ""]
    restrict_files(
        [*settings.allowed, *named_files(settings.setups, "guest")],
        sockets={os.path.dirname(path) or "." for path in paths},
    )


async def run(settings: Settings) -> int:
    """Serve until the end of it all; returns the exit code. Is a checkpoint.

    Raises:
        ConfigError: The settings cannot be honoured.
        Failure: A socket cannot be made.
        OSError: A socket is broken.
    """
    import trio

    from vmbus.attach.server import Names, Roll, serve_operators
    from vmbus.engine import EngineConfig
    from vmbus.host import BusConfig
    from vmbus.host.lookout import longest_worth_while
    from vmbus.server import GuestServer, raise_descriptor_limit
    from vmbus.server.devices import need_names

    confine(settings)
    longest = settings.poll
    if longest is None:
        longest = await longest_worth_while()
        _log.debug("looking for requests for up to %.0f us", longest * 1e6)
    config = BusConfig(engine=EngineConfig(max_version=settings.max_version), longest_look=longest)
    raise_descriptor_limit()
    roll = Roll()
    async with trio.open_nursery() as nursery:
        stop = _Stop(nursery.cancel_scope)
        await nursery.start(stop.run)
        with contextlib.ExitStack() as stack:
            stack.callback(stop.done)  # however it ends
            await check(GuestServer(settings.setups, config))
            with entrances(settings) as (vmms, operators):
                async with _open_server(settings, config) as server:
                    if operators is not None:
                        nursery.start_soon(
                            functools.partial(
                                serve_operators,
                                operators,
                                query=server.query,
                                command=server.command,
                                stranger=server.is_own,
                            )
                        )
                    async with trio.open_nursery() as serving:
                        for sock, name, words in vmms:
                            admission = Names(
                                roll,
                                identity=settings.identity,
                                given=name,
                                anonymous=not need_names(settings.setups),
                            )
                            serving.start_soon(
                                _until_done,
                                functools.partial(
                                    server.serve,
                                    sock,
                                    admission=admission,
                                    exit_after_guest=settings.once,
                                ),
                                serving.cancel_scope,
                            )
                            _log.info("%s", words)
                        notify("READY=1")
        nursery.cancel_scope.cancel()
    notify("STOPPING=1")
    if stop.signal is not None:
        return EXIT_INTERRUPTED if stop.signal == signal.SIGINT else 0
    if not settings.once and settings.fd is None:
        return 0
    return EXIT_FAILED if server.failed else EXIT_PROTOCOL if server.faults else 0


async def _until_done(serve: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    """Serve by one socket; if that is over, it is over for the others as well."""
    await serve()
    scope.cancel()


async def check(server: GuestServer) -> None:
    """Open every back-end once. Is a checkpoint. Raises ConfigError."""
    try:
        await server.check()
    except ConfigError:
        raise
    except ValueError as error:
        # What a device's own conversion of an option says.
        raise ConfigError(str(error)) from error


AGAIN = 1.0
"""Seconds after a signal in which another is the same one: a terminal that is closed, or a shell,
often sends two."""


class _Stop:
    """Ends the server at the first signal of these; a later one does what it always does."""

    def __init__(self, scope: trio.CancelScope) -> None:
        import trio

        self._scope = scope
        self._listening = trio.CancelScope(shield=True)
        self.signal: int | None = None

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        import trio

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        since = 0.0
        with self._listening, trio.open_signal_receiver(*numbers) as signals:
            task_status.started()
            async for number in signals:
                if self.signal is None:
                    self.signal, since = number, trio.current_time()
                    _log.info("stopping: %s", signal.Signals(number).name)
                    self._scope.cancel()
                elif trio.current_time() - since > AGAIN:
                    signal.signal(number, signal.SIG_DFL)
                    signal.raise_signal(number)

    def done(self) -> None:
        """Listen no more: all that there was to end has ended. Cannot block."""
        self._listening.cancel()
