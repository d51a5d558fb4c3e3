"""One worker, as the supervisor sees it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import uuid
from collections.abc import Mapping, Sequence
from typing import Protocol

import trio

from vmbus.attach.protocol.layout import decode_text_untrusted
from vmbus.attach.protocol.limits import MAX_NAME
from vmbus.attach.server.admission import Admission, Peer
from vmbus.errors import ConfigError, NotBackError, PeerProtocolError
from vmbus.log_budget import LogBudget
from vmbus.plugins.sharing import Line
from vmbus.server.devices import SharedKey
from vmbus.server.keepers import KeeperKey
from vmbus.supervisor import relay
from vmbus.supervisor.parcels import READ_SIZE, Parcel, Unpacker, send_down

_log = logging.getLogger("vmbus.server")

_PIPE_SIZE = 1 << 20
"""Bytes between a worker and us before it has to wait."""


MAX_FAULTS = 1_000_000
"""What a worker can say at most that its guest has done."""


class Gone(Exception):  # noqa: N818 - an end, no error
    """The worker has ended."""


class Owner(Protocol):
    """What a worker needs of the supervisor."""

    def kill(self, pid: int) -> None:
        """Have a worker killed, if it is there."""

    def came(self) -> None:
        """Take note that a guest was attached. Cannot block."""

    def left(self, worker: Worker) -> None:
        """Take note that a worker's line has ended. Cannot block."""

    def expect_end(self, worker: Worker) -> None:
        """See that a worker ends, whose guest has left. Cannot block."""

    def full(self) -> str:
        """Return why no further guest can be served, or an empty text."""

    async def lines(self, guest: str) -> Mapping[SharedKey, Line]:
        """Return a guest's lines to what it shares, the caller's. Raises ConfigError, OSError."""


class Worker:
    """A worker process and the guest that it has.

    Args:
        owner: The supervisor.
        down: To the worker; owned.
        up: From the worker; owned.
        claims: To the worker; owned.
    """

    def __init__(self, owner: Owner, down: socket.socket, up: int, claims: int) -> None:
        down.setblocking(False)
        os.set_blocking(up, False)
        os.set_blocking(claims, False)
        self._owner = owner
        self._down = down
        self._up = up
        self._claims = claims
        self._asked: dict[int, tuple[trio.Event, list[Parcel]]] = {}
        self._asking = 0
        self._owed = 0
        """Answers that have not come, also those that nobody waits for any more."""
        self._admitting = False
        self._admission: Admission | None = None
        self.peer: Peer | None = None
        """Who its VMM is; None if it has none."""
        self._lines = LogBudget(burst=200, interval=0.2)
        # Who asks for debug lines wants each control message; a driver that comes and goes makes
        # some hundred in a second.
        self._details = LogBudget(burst=20_000, interval=0.001)
        self._left_out = 0
        self.pid = 0
        self.number = 0
        """Counts the guests of a supervisor."""
        self.name: str | None = None
        """The guest's, from its admission until it has left."""
        self._called = ""
        self.keeps: KeeperKey | None = None
        """What it keeps for all guests, if it has none itself."""
        self.attached = False
        self.evicted = False
        """It was killed to make room for others."""
        self.failed = False
        """Whether it said that serving its guest failed."""
        self.faults = 0
        """Rules that its guest and VMM have broken, as it said."""
        self.ready = trio.Event()
        self.gone = trio.Event()
        self.status: int | None = None
        """As ``waitpid`` gives it, once the process is known to have ended."""

    async def run(self, _: object = None) -> None:
        """Read what comes up, until the worker's end. Never raises but Cancelled."""
        unpacker = Unpacker()
        try:
            while True:
                await trio.lowlevel.wait_readable(self._up)
                data = os.read(self._up, READ_SIZE)
                if not data:
                    break
                for parcel in unpacker.feed_untrusted(data, lambda: self._owed > 0):
                    self._take_untrusted(parcel)
        except PeerProtocolError as error:
            _log.error("%s: killed, for it sent %s", self.label, error)
        finally:
            # A line ends with its process; one that has closed it would be seen by nobody.
            self._owner.kill(self.pid)
            self._close()

    @property
    def label(self) -> str:
        """What lines of the log call it."""
        if self.keeps is not None:
            return self.keeps.name
        return self._called or f"worker {self.pid}"

    def discard(self) -> None:
        """Close our ends, if the worker's process never came to be."""
        self._down.close()
        for fd in (self._up, self._claims):
            os.close(fd)

    def _close(self) -> None:
        self.discard()
        for event, _ in self._asked.values():
            event.set()
        self._asked.clear()
        self._say_left_out()
        self._give_back_name()
        self._owner.left(self)
        self.ready.set()
        self.gone.set()

    def _say_left_out(self) -> None:
        """Say it where the gap is, not only at the end."""
        if self._left_out:
            _log.warning("%s: %d lines of its log were left out", self.label, self._left_out)
            self._left_out = 0

    def _give_back_name(self) -> None:
        if self.name is not None and self._admission is not None:
            self._admission.leave(self.name)
            self._admission = self.name = None

    # -- down ------------------------------------------------------------------------------------

    def send(self, parcel: Parcel, fds: Sequence[int] = ()) -> None:
        """Send something down. Cannot block. Raises Gone if that is impossible."""
        try:
            if self.gone.is_set():
                raise Gone
            send_down(self._down, parcel, fds)
        except BlockingIOError:
            # A worker that is held up by its guest or disk; it gets no more until it is not.
            raise Gone from None
        except OSError as error:
            raise Gone from error

    def serve(self, sock: socket.socket, peer: Peer, admission: Admission, number: int) -> None:
        """Hand a connection over. Raises Gone."""
        self._admission = admission
        self.peer = peer
        self.number = number
        self.send({"serve": True}, [sock.fileno()])

    def stop(self) -> None:
        """Have it say goodbye and end."""
        try:
            self.send({"stop": True})
        except Gone:
            if not self.gone.is_set():
                self._owner.kill(self.pid)

    async def ask(self, what: Parcel, fds: Sequence[int] = ()) -> Parcel:
        """Have a worker answer something. Is a checkpoint.

        Args:
            what: Members of the message.
            fds: What goes with it, borrowed.

        Raises:
            Gone: It ended before it had answered.
            ConfigError: It refuses.
            NotBackError: The disk does not give back what it was handed.
            OSError: The disk refuses.
        """
        self._asking += 1
        number = self._asking
        event, answers = self._asked[number] = trio.Event(), []
        try:
            self.send({"ask": number, **what}, fds)
            self._owed += 1
            await event.wait()
        finally:
            self._asked.pop(number, None)
        if not answers:
            raise Gone
        answer = answers[0]
        if "error" in answer:
            code, text = answer.get("errno"), str(answer["error"])
            if code == errno.EINVAL or not isinstance(code, int):
                raise ConfigError(text)
            if code == errno.ETIMEDOUT:
                raise NotBackError(text)
            raise OSError(code, text)
        value = answer.get("value")
        return value if isinstance(value, dict) else {}

    # -- up --------------------------------------------------------------------------------------

    def _take_untrusted(self, parcel: Parcel) -> None:
        match parcel:
            case {"log": line}:
                budget = self._details if relay.is_detail_untrusted(line) else self._lines
                if budget.spend():
                    self._say_left_out()
                    relay.replay_untrusted(line)
                else:
                    self._left_out += 1
            case {"ready": True}:
                self.ready.set()
            case {"ask": int(number), "admit": str(said)}:
                _check_name(said)
                if self._admitting or self.name is not None or self._admission is None:
                    self._refuse(number, "HELLO: it has been answered", errno.EPROTO)
                else:
                    self._admitting = True
                    trio.lowlevel.spawn_system_task(self._admit, number, said, self._admission)
            case {"claim": str(text)}:
                self._claim_untrusted(text)
            case {"attached": True}:
                if not self.attached:
                    self._owner.came()
                self.attached = True
            case {"leaving": True} if self.name is not None and self._admission is not None:
                self._admission.leaving(self.name)
            case {"left": True}:
                self._give_back_name()
                self._owner.expect_end(self)
            case {"answer": int(number)}:
                # Whoever asked may have lost patience.
                self._owed = max(0, self._owed - 1)
                event, answers = self._asked.get(number, (trio.Event(), []))
                answers.append(parcel)
                event.set()
            case {"ended": {"failed": bool(failed), "faults": int(faults)}}:
                self.failed = failed
                self.faults = min(max(0, faults), MAX_FAULTS)
            case _:
                raise PeerProtocolError("a message that makes no sense", errno=errno.EPROTO)

    def _refuse(self, number: int, text: str, code: int) -> None:
        with contextlib.suppress(Gone):
            self.send({"answer": number, "error": text, "errno": code})

    async def _admit(self, number: int, said: str, admission: Admission) -> None:
        answer: Parcel = {"answer": number}
        lines: Mapping[SharedKey, Line] = {}
        peer = self.peer
        assert peer is not None  # it came with the connection
        try:
            if full := self._owner.full():
                raise PeerProtocolError(f"HELLO: {full}", errno=errno.EAGAIN)
            self.name = self._called = await admission.admit(said, peer)
            lines = await self._owner.lines(self.name)
            answer["value"] = {
                "name": self.name,
                "shared": [[*key, len(line.filenos())] for key, line in lines.items()],
            }
        except PeerProtocolError as error:
            answer |= {"error": str(error), "errno": error.errno}
        except (ConfigError, OSError, Gone) as error:
            why = str(error) or "the process that keeps what guests share has ended"
            answer |= {"error": f"HELLO: {why}", "errno": errno.EIO}
            self._give_back_name()
        try:
            self.send(answer, [fd for line in lines.values() for fd in line.filenos()])
        except Gone:
            self._give_back_name()
        finally:
            self._admitting = False
            for line in lines.values():
                line.close()

    def _claim_untrusted(self, text: str) -> None:
        answer = b"y"
        try:
            if self.name is not None and self._admission is not None:
                self._admission.claim(self.name, uuid.UUID(text))
        except (PeerProtocolError, ValueError):
            answer = b"n"
        try:
            os.write(self._claims, answer)
        except OSError as error:
            # It asks and asks and does not read, or it is about to be gone.
            raise PeerProtocolError(
                "claims whose answers it does not take", errno=errno.EPROTO
            ) from error


def _check_name(said: str) -> None:
    """Check what a worker says that a VMM said. Raises PeerProtocolError."""
    try:
        data = said.encode()
    except UnicodeEncodeError as error:
        raise PeerProtocolError("a name that is no UTF-8", errno=errno.EPROTO) from error
    decode_text_untrusted("a name", data, 0, MAX_NAME)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals have none
        return f"signal {number}"


def make_ends() -> tuple[socket.socket, int, int, list[int]]:
    """Return our ends of a new worker's line (down, up, claims) and the descriptors of its own.

    Raises:
        OSError: Too many files are open.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Nothing is ever read from the worker here: what it sends fails at its end.
    ours.shutdown(socket.SHUT_RD)
    up_read, up_write = os.pipe()
    claims_read, claims_write = os.pipe()
    fcntl.fcntl(up_write, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return ours, up_read, claims_write, [theirs.detach(), up_write, claims_read]


def describe_status(status: int) -> str:
    """Return in words how a process ended, empty if well."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"was killed by {_signal_name(-code)}"
    return f"ended with exit code {code}" if code else ""
