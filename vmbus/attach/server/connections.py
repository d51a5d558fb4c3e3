"""The server: accepts VMMs and operators and gives each guest its own task."""

from __future__ import annotations

import errno
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable

import trio

from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import (
    ALL_FEATURES,
    MAX_FDS,
    MAX_PAYLOAD,
    Feature,
    GoodbyeReason,
    Role,
)
from vmbus.attach.protocol.messages import MessageSpec, Number, State
from vmbus.attach.protocol.to_server import Goodbye, Hello, HelloReply, choose_version
from vmbus.attach.server.link import Link, ServerLimits
from vmbus.attach.server.management import CommandCallback, Management, QueryCallback
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import PeerProtocolError

logger = logging.getLogger(__name__)

Handler = Callable[[SocketTransport], Awaitable[None]]
"""Serves one partition; returns once :meth:`SocketTransport.incoming` has ended."""


class _OperatorSession:
    """A management client: QUERY, COMMAND, GOODBYE and nothing else."""

    def __init__(self, link: Link, management: Management) -> None:
        self._link = link
        self._management = management
        self.state = State.OPERATOR

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        """Act on one request."""
        if spec.number == Number.GOODBYE:
            Goodbye.decode_untrusted(frame.payload)
            self.state = State.CLOSED
            self._link.reply(frame.kind, frame.seq)
            self._link.finish("goodbye")
        else:
            self._management.begin(self._link, frame)

    def dropped(self, error: PeerProtocolError) -> None:
        """Operators have no asynchronous messages."""
        logger.debug("operator: %s", error)


class _Greeter:
    """The session until HELLO: negotiates, then puts the right session in its place."""

    state = State.NEW

    def __init__(self, server: Server) -> None:
        self._server = server
        self.link: Link
        self.greeted = trio.Event()
        self.transport: SocketTransport | None = None

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        """Negotiate; ``spec`` can only be HELLO in state NEW."""
        server, link = self._server, self.link
        hello = Hello.decode_untrusted(frame.payload)
        version = choose_version(hello)
        management = Management(server.query, server.command)
        features = Feature(0)
        if hello.role == Role.OPERATOR:
            link.session = _OperatorSession(link, management)
        else:
            limit = link.limits.max_vps
            require(hello.max_vps >= 1, "HELLO: max_vps must not be 0")
            require(
                hello.max_vps <= limit,
                f"HELLO: max_vps {hello.max_vps} is above {limit}, all that is served here",
                errno.E2BIG,
            )
            features = Feature(hello.features & ALL_FEATURES)
            self.transport = link.session = SocketTransport(
                link,
                hello,
                features=features,
                management=management,
                claim=server.claim,
                trust_vmm=server.trust_vmm,
            )
        reply = HelloReply(
            version, MAX_FDS, features, MAX_PAYLOAD, link.limits.post_credits, server.name
        )
        link.reply(frame.kind, frame.seq, reply.encode())
        self.greeted.set()

    def dropped(self, error: PeerProtocolError) -> None:
        """Nothing to drop it for yet."""
        logger.debug("before HELLO: %s", error)


class Server:
    """The state that connections share; use :func:`serve`."""

    def __init__(
        self,
        handler: Handler,
        *,
        name: str,
        limits: ServerLimits,
        trust_vmm: bool,
        query: QueryCallback | None,
        command: CommandCallback | None,
    ) -> None:
        self._handler = handler
        self._vm_ids: set[uuid.UUID] = set()
        self.name = name
        self.limits = limits
        self.trust_vmm = trust_vmm
        self.query = query
        self.command = command

    def claim(self, vm_id: uuid.UUID) -> None:
        """Reserve a VM's identity; all zeros is anonymous. Raises PeerProtocolError, EBUSY."""
        if vm_id.int:
            require(
                vm_id not in self._vm_ids,
                "VM_INFO: a VM with this vm_id is attached; if it was you, try again shortly",
                errno.EBUSY,
            )
            self._vm_ids.add(vm_id)

    async def serve_connection(self, sock: socket.socket) -> bool:
        """Serve one connected socket until it is closed; owns ``sock``.

        Returns:
            Whether a guest was attached.
        """
        greeter = _Greeter(self)
        link = greeter.link = Link(sock, greeter, self.limits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run_shielded, link)
            try:
                await _first_of(greeter.greeted, link.closed, self.limits.hello_timeout)
                if greeter.transport is not None:
                    await self._serve_guest(link, greeter.transport)
                elif greeter.greeted.is_set():
                    await link.closed.wait()
                else:
                    link.fail(f"no HELLO in {self.limits.hello_timeout:g} s")
                await link.closed.wait()
            finally:
                link.fail("the server let go")
        transport = greeter.transport
        logger.info("%s: closed: %s", transport.name if transport else "connection", link.reason)
        return transport is not None and transport.attached.is_set()

    async def _serve_guest(self, link: Link, transport: SocketTransport) -> None:
        reason = GoodbyeReason.SHUTDOWN
        try:
            await _first_of(transport.attached, link.closed)
            if transport.attached.is_set():
                reason = await self._run_handler(link, transport)
        finally:
            self._vm_ids.discard(transport.vm_id)
            transport.release(reason)

    async def _run_handler(self, link: Link, transport: SocketTransport) -> GoodbyeReason:
        """Run the handler; give it ``handler_grace`` seconds once the guest is gone."""
        finished = trio.Event()
        reason = GoodbyeReason.NORMAL
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await link.closed.wait()
                transport.end()
                with trio.move_on_after(link.limits.handler_grace):
                    await finished.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await self._handler(transport)
            except Exception as error:
                # One guest's failure must not end the others; the log has it all.
                gone = link.closed.is_set() or transport.state is State.CLOSED
                if gone and isinstance(error, trio.BrokenResourceError):
                    logger.info("%s: gone while it was being served: %s", transport.name, error)
                else:
                    logger.exception("%s: serving this guest failed", transport.name)
                    reason = GoodbyeReason.FAILURE
            finished.set()
            nursery.cancel_scope.cancel()
        return reason


async def _run_shielded(link: Link) -> None:
    """Keep the link alive during cancellation until ``link.fail``, so that goodbye gets out."""
    with trio.CancelScope(shield=True):
        try:
            await link.run()
        except Exception:
            # A bug of ours; it must not end the other connections.
            logger.exception("serving a connection failed")


async def _first_of(one: trio.Event, other: trio.Event, seconds: float = float("inf")) -> None:
    """Wait until either event is set, or so many seconds have passed."""
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:

            async def wait(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, one)
            nursery.start_soon(wait, other)


async def serve(
    listener: socket.socket,
    handler: Handler,
    *,
    name: str = "vmbus",
    limits: ServerLimits | None = None,
    trust_vmm: bool = False,
    query: QueryCallback | None = None,
    command: CommandCallback | None = None,
    exit_after_guest: bool = False,
) -> None:
    """Serve VMMs and operators until cancelled; see ``docs/reference/vmbus-user.md``.

    Args:
        listener: AF_UNIX, SOCK_SEQPACKET or SOCK_STREAM, listening; or connected already, which
            is then the only connection, and ``serve`` returns when it is closed. Borrowed if it
            listens, owned if it is connected. :mod:`vmbus.attach.server.listen` makes them.
        handler: Called once per attached guest, each in a task of its own, when memory is known.
            It adds the message ports, *then* iterates ``incoming()``, and returns at its end. If
            it raises, the guest is disconnected and the others go on.
        name: The server's name in HELLO.
        limits: Budgets per connection.
        trust_vmm: Accept guest memory that its owner could truncate (which would kill this
            process with SIGBUS).
        query: Answers QUERY, of operators and of VMMs.
        command: Answers COMMAND, of operators.
        exit_after_guest: Return when the first guest that was attached is gone.

    Raises:
        OSError: The listener is broken.
    """
    limits = limits or ServerLimits()
    server = Server(
        handler, name=name, limits=limits, trust_vmm=trust_vmm, query=query, command=command
    )
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        await server.serve_connection(listener)
        return
    slots = trio.CapacityLimiter(limits.max_connections)
    async with trio.open_nursery() as nursery:

        async def connection(sock: socket.socket, slot: object) -> None:
            try:
                attached = await server.serve_connection(sock)
            finally:
                slots.release_on_behalf_of(slot)
            if attached and exit_after_guest:
                nursery.cancel_scope.cancel()

        while True:
            slot = object()
            await slots.acquire_on_behalf_of(slot)
            nursery.start_soon(connection, await _accept(listener), slot)


async def _accept(listener: socket.socket) -> socket.socket:
    """Accept one connection; waits out a lack of descriptors."""
    listener.setblocking(False)
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            return listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                raise
            logger.warning("cannot accept a connection now: %s", error.strerror)
            await trio.sleep(0.1)
