"""Who a guest is: its name is given by the server, not taken from the VMM's word.

A name decides which image ``{guest}`` stands for, which guest an operator means, and whose a
reservation is. So the socket that a VMM was given, or the user who runs it (SO_PEERCRED), says it;
what the VMM says about itself counts only where the server's owner wants that.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import pwd
import socket
import struct
import uuid
from typing import Protocol

import trio

from vmbus.attach.protocol.layout import require
from vmbus.errors import PeerProtocolError
from vmbus.log_budget import LogBudget

_log = logging.getLogger("vmbus.server")

IDENTITIES = ("hello", "user")
"""What names the guests of a socket that has no name of its own."""

LEAVING_GRACE = 5.0
"""Seconds that a guest waits whose name belongs to one that is just leaving: a VMM that was started
anew is often quicker than the end of the old one."""

_CREDENTIALS = struct.Struct("3i")


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, as the kernel saw it then (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Return who is at the other end of a connected AF_UNIX socket."""
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return cls(*_CREDENTIALS.unpack(data))

    @property
    def user(self) -> str:
        """The user's name, or number if it has none here."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


class Admission(Protocol):
    """Says what the guests of one socket are called."""

    async def admit(self, said: str, peer: Peer) -> str:
        """Return the name of a guest that comes, unique among those that are there. A checkpoint.

        Args:
            said: What its VMM calls it, at most 255 bytes; may be empty.
            peer: Who the VMM is.

        Raises:
            PeerProtocolError: It may not come in; the VMM is told text and errno.
        """

    def claim(self, name: str, vm_id: uuid.UUID) -> None:
        """Take note of an admitted guest's id; all zeros is anonymous. Cannot block.

        Raises:
            PeerProtocolError: EBUSY, another guest has that id.
        """

    def leaving(self, name: str) -> None:
        """Take note that the connection of an admitted guest has ended. Cannot block."""

    def leave(self, name: str) -> None:
        """Take note that nothing of an admitted guest is left. Cannot block."""


def choose_name(said: str, peer: Peer, identity: str, given: str | None) -> str:
    """Return what a guest is to be called, empty if nobody says.

    Args:
        said: What its VMM calls it.
        peer: Who the VMM is.
        identity: One of :data:`IDENTITIES`.
        given: The name of the socket that it came by.
    """
    if given is not None:
        return given
    return peer.user if identity == "user" else said


class Roll:
    """The names and ids of the guests that are there. One for all sockets of a server."""

    def __init__(self) -> None:
        self._names: dict[str, uuid.UUID] = {}
        self._leaving: set[str] = set()
        self._change = trio.Event()

    async def enter(self, name: str, *, given: bool = False) -> str:
        """Enter a guest; return its name, made up if ``name`` is empty. A checkpoint.

        Args:
            name: What it is to be called.
            given: That is not its VMM's to choose.

        Waits for a guest of that name to be gone, if it is on its way out.

        Raises:
            PeerProtocolError: EBUSY, the name is taken.
        """
        if not name:
            number = 1
            while (name := f"guest-{number}" if number > 1 else "guest") in self._names:
                number += 1
        with trio.move_on_after(LEAVING_GRACE):
            while name in self._leaving:
                await self._change.wait()
        require(
            name not in self._names,
            f"HELLO: a guest called {name!r} is attached; if it was you, try again shortly"
            + (
                "; this name is given, one guest has it at a time"
                if given
                else ", else give this one another name"
            ),
            errno.EBUSY,
        )
        self._names[name] = uuid.UUID(int=0)
        return name

    def claim(self, name: str, vm_id: uuid.UUID) -> None:
        """See :meth:`Admission.claim`."""
        others = {each for owner, each in self._names.items() if owner != name}
        require(
            not vm_id.int or vm_id not in others,
            "VM_INFO: a VM with this vm_id is attached; if it was you, try again shortly",
            errno.EBUSY,
        )
        self._names[name] = vm_id

    def leaving(self, name: str) -> None:
        """See :meth:`Admission.leaving`."""
        if name in self._names:
            self._leaving.add(name)

    def leave(self, name: str) -> None:
        """See :meth:`Admission.leave`."""
        self._names.pop(name, None)
        self._leaving.discard(name)
        self._change.set()
        self._change = trio.Event()


class Names:
    """The :class:`Admission` of one socket.

    Args:
        roll: Who is there; one for all sockets of a server.
        identity: What names a guest: ``hello``, what its VMM says, or ``user``, who runs the VMM.
        given: The one name that guests of this socket have, whatever they say.
        anonymous: Make up a name for a guest that nobody names. A later one may get the same, so
            they must not come in where a name says whose files are whose.
    """

    def __init__(
        self,
        roll: Roll | None = None,
        *,
        identity: str = "hello",
        given: str | None = None,
        anonymous: bool = True,
    ) -> None:
        self._roll = roll if roll is not None else Roll()
        self._anonymous = anonymous
        self._identity = identity
        self._given = given
        self._refusals = LogBudget()

    async def admit(self, said: str, peer: Peer) -> str:
        """See :meth:`Admission.admit`."""
        given = self._given is not None or self._identity == "user"
        name = choose_name(said, peer, self._identity, self._given)
        require(
            bool(name) or self._anonymous,
            "HELLO: the guest has no name, and what it gets here depends on its name; give it one",
        )
        try:
            return await self._roll.enter(name, given=given)
        except PeerProtocolError:
            if self._refusals.spend():
                words = self._refusals.left_out()
                _log.warning(
                    "%s: refused, for there is a guest of that name: the VMM is process %d of %s%s",
                    name, peer.pid, peer.user, words,
                )  # fmt: skip
            raise

    def claim(self, name: str, vm_id: uuid.UUID) -> None:
        """See :meth:`Admission.claim`."""
        self._roll.claim(name, vm_id)

    def leaving(self, name: str) -> None:
        """See :meth:`Admission.leaving`."""
        self._roll.leaving(name)

    def leave(self, name: str) -> None:
        """See :meth:`Admission.leave`."""
        self._roll.leave(name)
