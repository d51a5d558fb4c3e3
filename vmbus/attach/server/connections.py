"""The server: accepts VMMs, or operators, and gives each guest its own task.

VMMs and operators have sockets of their own. Whoever can open the one may attach a guest, whoever
can open the other may change all of them: a role in HELLO says what a peer wants, and never what it
may.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

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
from vmbus.attach.server.admission import Admission, Names, Peer
from vmbus.attach.server.link import Link, ServerLimits, check_frame
from vmbus.attach.server.management import CommandCallback, Management, QueryCallback
from vmbus.attach.server.places import DescriptorShares, Places
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import PeerProtocolError, VMBusError, leaves
from vmbus.log_budget import LogBudget

logger = logging.getLogger(__name__)

Handler = Callable[[SocketTransport], Awaitable[None]]
"""Serves one partition; returns once :meth:`SocketTransport.incoming` has ended."""
OwnQuery = Callable[[SocketTransport, str], "dict[str, Any] | Awaitable[dict[str, Any]]"]
"""Takes a VMM's transport and a kind, returns what this VMM may know."""


class _OperatorSession:
    """A management client: QUERY, COMMAND, GOODBYE and nothing else."""

    def __init__(self, link: Link, management: Management) -> None:
        self._link = link
        self._management = management
        self.state = State.OPERATOR

    def check(self, spec: MessageSpec, frame: Frame) -> None:
        """See :class:`~vmbus.attach.server.link.Session`."""
        check_frame(spec, self.state, frame)

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        """Act on one request."""
        if spec.number == Number.GOODBYE:
            Goodbye.decode_untrusted(frame.payload)
            self.state = State.CLOSED
            self._link.reply(frame.kind, frame.seq)
            self._link.finish("the peer said goodbye")
        else:
            self._management.begin(self._link, frame)

    def dropped(self, _kind: int, error: PeerProtocolError) -> None:
        """Operators have no asynchronous messages."""
        logger.debug("operator: %s", error)


_WRONG_SOCKET = {
    Role.VMM: "HELLO: this socket is for VMMs; operators have one of their own",
    Role.OPERATOR: "HELLO: this socket is for operators; VMMs have one of their own",
}


class _Greeter:
    """The session until HELLO: negotiates, then puts the right session in its place."""

    state = State.NEW

    def __init__(self, server: Server, peer: Peer) -> None:
        self._server = server
        self._peer = peer
        self._busy = False
        self.link: Link
        self.greeted = trio.Event()
        self.name: str | None = None
        """Of the guest, once it is admitted."""
        self.transport: SocketTransport | None = None

    def check(self, spec: MessageSpec, frame: Frame) -> None:
        """See :class:`~vmbus.attach.server.link.Session`."""
        check_frame(spec, self.state, frame)

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        """Negotiate; ``spec`` can only be HELLO in state NEW."""
        hello = Hello.decode_untrusted(frame.payload)
        version = choose_version(hello)
        require(not self._busy, "HELLO: another one is being answered", errno.EBUSY)
        require(hello.role == self._server.role, _WRONG_SOCKET[self._server.role], errno.EPERM)
        kind, seq = frame.kind, frame.seq
        if hello.role == Role.OPERATOR:
            server = self._server
            server.places.greet(self.link)
            self.link.name = f"operator {hello.name!r}"
            self.link.session = _OperatorSession(
                self.link, Management(server.query, server.command, server.failure_log)
            )
            self._welcome(kind, seq, version, Feature(0))
            return
        limit = self.link.limits.max_vps
        require(hello.max_vps >= 1, "HELLO: max_vps must not be 0")
        require(
            hello.max_vps <= limit,
            f"HELLO: max_vps {hello.max_vps} is above {limit}, all that is served here",
            errno.E2BIG,
        )
        self._server.places.greet(self.link)
        self._busy = True

        async def admit() -> None:
            try:
                self.name = await self._server.admission.admit(hello.name, self._peer)
            except PeerProtocolError as error:
                self._server.places.refuse(self.link)
                self.link.reply_error(kind, seq, error.errno, str(error))
            else:
                self.link.name = self.name
                features = Feature(hello.features & ALL_FEATURES)
                self.transport = self.link.session = self._transport(hello, self.name, features)
                self._welcome(kind, seq, version, features)
            finally:
                self._busy = False

        self.link.spawn(admit)

    def _transport(self, hello: Hello, name: str, features: Feature) -> SocketTransport:
        own_query = self._server.own_query

        def query(kind: str) -> dict[str, Any] | Awaitable[dict[str, Any]]:
            assert own_query is not None
            return own_query(transport, kind)

        transport = SocketTransport(
            self.link,
            hello,
            name=name,
            features=features,
            management=Management(
                query if own_query is not None else None, None, self._server.failure_log
            ),
            claim=lambda vm_id: self._server.admission.claim(name, vm_id),
            shares=self._server.shares,
            trust_vmm=self._server.trust_vmm,
        )
        return transport

    def _welcome(self, kind: int, seq: int, version: int, features: Feature) -> None:
        self._server.places.welcome(self.link)
        credits_ = self.link.limits.post_credits
        reply = HelloReply(version, MAX_FDS, features, MAX_PAYLOAD, credits_, self._server.name)
        self.link.reply(kind, seq, reply.encode())
        self.greeted.set()

    def leave(self) -> None:
        """Give the guest's name back. Idempotent."""
        name, self.name = self.name, None
        if name is not None:
            self._server.admission.leave(name)

    def dropped(self, _kind: int, error: PeerProtocolError) -> None:
        """Nothing to drop it for yet."""
        logger.debug("before HELLO: %s", error)


@dataclasses.dataclass(slots=True, kw_only=True)
class Server:
    """The state that connections share; use :func:`serve` and :func:`serve_operators`."""

    role: Role
    """Of those who may connect."""
    name: str
    limits: ServerLimits
    handler: Handler | None = None
    admission: Admission = dataclasses.field(default_factory=Names)
    trust_vmm: bool = False
    own_query: OwnQuery | None = None
    query: QueryCallback | None = None
    command: CommandCallback | None = None
    stranger: Callable[[Peer], bool] = lambda _: False
    """Whether to hang up on somebody."""
    places: Places = dataclasses.field(init=False)
    shares: DescriptorShares = dataclasses.field(init=False)
    failure_log: LogBudget = dataclasses.field(default_factory=LogBudget)
    """For what fails on our side, with a traceback each."""
    guest_log: LogBudget = dataclasses.field(default_factory=LogBudget)
    """For the ends of guests."""
    stranger_log: LogBudget = dataclasses.field(default_factory=LogBudget)
    """For the ends of other connections, which cost a peer nothing."""

    def __post_init__(self) -> None:
        """Give out places and descriptors within the limits."""
        self.places = Places(self.limits)
        self.shares = DescriptorShares(self.limits)

    async def serve_connection(self, sock: socket.socket) -> bool:
        """Serve one connected socket until it is closed; owns ``sock``.

        Returns:
            Whether a guest was attached.
        """
        peer = Peer.of(sock)
        if self.stranger(peer):
            if self.stranger_log.spend():
                text = "process %d of user %d: has no business here%s"
                logger.warning(text, peer.pid, peer.uid, self.stranger_log.left_out())
            sock.close()
            await trio.lowlevel.checkpoint()
            return False
        greeter = _Greeter(self, peer)
        link = greeter.link = Link(sock, greeter, self.limits)
        link.name = f"process {peer.pid} of user {peer.uid}"
        self.places.arrive(link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run_shielded, link, self.failure_log)
            try:
                await _first_of(greeter.greeted, link.closed, self.limits.hello_timeout)
                if greeter.transport is not None:
                    await self._serve_guest(link, greeter.transport, greeter.leave)
                elif greeter.greeted.is_set():
                    await link.closed.wait()
                else:
                    link.fail(f"no HELLO in {self.limits.hello_timeout:g} s")
                await link.closed.wait()
            finally:
                link.fail("the server let go")
                self.places.leave(link)
                greeter.leave()
        attached = greeter.transport is not None and greeter.transport.attached.is_set()
        budget = self.guest_log if attached else self.stranger_log
        if budget.spend():
            level = logging.WARNING if link.broken else logging.INFO
            logger.log(level, "%s: closed: %s%s", link.name, link.reason, budget.left_out())
        return attached

    async def _serve_guest(
        self, link: Link, transport: SocketTransport, leave: Callable[[], None]
    ) -> None:
        reason, why = GoodbyeReason.SHUTDOWN, ""
        try:
            await _first_of(transport.attached, link.closed)
            if transport.attached.is_set():
                reason, why = await self._run_handler(link, transport)
        finally:
            # Whoever is told goodbye may come again at once.
            leave()
            transport.release(reason, why)

    async def _run_handler(
        self, link: Link, transport: SocketTransport
    ) -> tuple[GoodbyeReason, str]:
        """Run the handler; give it ``handler_grace`` seconds once the guest is gone.

        Returns:
            Why it ended; and what the VMM may know of it.
        """
        finished = trio.Event()
        reason, why = GoodbyeReason.NORMAL, ""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await link.closed.wait()
                self.admission.leaving(transport.name)
                transport.end()
                with trio.move_on_after(link.limits.handler_grace):
                    await finished.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                assert self.handler is not None  # VMMs have one
                await self.handler(transport)
            except Exception as error:
                # One guest's failure must not end the others; the log has it all.
                gone = link.closed.is_set() or transport.state is State.CLOSED
                if gone and isinstance(error, trio.BrokenResourceError):
                    if self.guest_log.spend():
                        logger.info("%s: gone while it was being served: %s", link.name, error)
                else:
                    reason, why = GoodbyeReason.FAILURE, self._explain(transport.name, error)
            finished.set()
            nursery.cancel_scope.cancel()
        return reason, why

    def _explain(self, name: str, error: Exception) -> str:
        """Log why a guest could not be served; return what its VMM may know of it.

        What this project raises on purpose says what is the matter, an image in use for example.
        Anything else is our own affair.
        """
        failures = leaves(error)
        expected = [str(each) for each in failures if isinstance(each, VMBusError)]
        if self.failure_log.spend():
            left_out = self.failure_log.left_out()
            if len(expected) == len(failures):
                logger.error("%s: cannot be served: %s%s", name, "; ".join(expected), left_out)
            else:
                logger.error("%s: serving this guest failed%s", name, left_out, exc_info=error)
        return "; ".join(expected) or "the server failed, see its log"


async def _run_shielded(link: Link, log: LogBudget) -> None:
    """Keep the link alive during cancellation until ``link.fail``, so that goodbye gets out."""
    with trio.CancelScope(shield=True):
        try:
            await link.run()
        except Exception:
            # A bug of ours; it must not end the other connections.
            if log.spend():
                logger.exception("%s: serving it failed%s", link.name, log.left_out())


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
    admission: Admission | None = None,
    query: OwnQuery | None = None,
    exit_after_guest: bool = False,
) -> None:
    """Serve VMMs until cancelled; see ``docs/reference/vmbus-user.md``.

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
        admission: Says what a guest is called, or that it may not come in; by default what its
            VMM says it is called. Sockets that lead to the same guests share one.
        query: Answers QUERY of a VMM, which should hear of its own guest and no other.
        exit_after_guest: Return when the first guest that was attached is gone.

    Raises:
        OSError: The listener is broken.
    """
    server = Server(
        role=Role.VMM,
        handler=handler,
        name=name,
        limits=limits or ServerLimits(),
        trust_vmm=trust_vmm,
        admission=admission or Names(),
        own_query=query,
    )
    await _serve(listener, server, exit_after_guest=exit_after_guest)


async def serve_operators(
    listener: socket.socket,
    *,
    name: str = "vmbus",
    limits: ServerLimits | None = None,
    query: QueryCallback | None = None,
    command: CommandCallback | None = None,
    stranger: Callable[[Peer], bool] = lambda _: False,
) -> None:
    """Serve operators until cancelled. Whoever may connect may do whatever ``command`` does.

    Args:
        listener: As in :func:`serve`.
        name: The server's name in HELLO.
        limits: Budgets per connection.
        query: Answers QUERY.
        command: Answers COMMAND.
        stranger: Whether to hang up on somebody, though the socket let it in.

    Raises:
        OSError: The listener is broken.
    """
    server = Server(
        role=Role.OPERATOR,
        stranger=stranger,
        name=name,
        limits=limits or ServerLimits(),
        query=query,
        command=command,
    )
    await _serve(listener, server, exit_after_guest=False)


async def _serve(listener: socket.socket, server: Server, *, exit_after_guest: bool) -> None:
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        await server.serve_connection(listener)
        return
    async with trio.open_nursery() as nursery:

        async def connection(sock: socket.socket) -> None:
            attached = await server.serve_connection(sock)
            if attached and exit_after_guest:
                nursery.cancel_scope.cancel()

        while True:
            nursery.start_soon(connection, await accept(listener, server.failure_log))


async def accept(listener: socket.socket, log: LogBudget | None = None) -> socket.socket:
    """Accept one connection; waits out a lack of descriptors, saying so as ``log`` allows."""
    log = log or LogBudget()
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
            if log.spend():
                logger.warning("cannot accept now: %s%s", error.strerror, log.left_out())
            await trio.sleep(0.1)
