"""How switches of the same name find each other, and are one.

They have a directory in common. Each has a socket in it, ``NAME.ID``, and is connected to all
others, so a frame has one way at most: it never goes from one switch over another to a third
(:attr:`netvsp.switch.port.PortConfig.joint`). Who comes looks who is there and connects to them;
all look again every :data:`LOOK_AGAIN` seconds, which mends what has broken. A socket has its name
when it can be connected to, and not before; one that refuses is a dead switch's, and is removed:
no name is used twice.

Whoever connects may reach all VLANs. So both show that they can read ``NAME.key`` in the directory,
which belongs to the server's user and nobody else::

    both    HELLO   id (8 bytes), a number used once (16 bytes)
    both    PROOF   HMAC-SHA256(key, what) with what = b"c" or b"a" (of the one who has connected,
                    who has accepted), then the name, the HELLO of the one who has connected, and of
                    the one who has accepted

Then both tell the stations of their own ports (ADD, REMOVE), and frames follow. If two connect to
each other at once, the connection that the lower id has made stays.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import socket
import stat
from typing import Any, NamedTuple

import trio

from netvsp.shared.carrier import Carrier
from netvsp.shared.line import FrameLine
from netvsp.shared.messages import HEADER, Kind, broken, kind_untrusted, stations_untrusted
from netvsp.switch.switch import JOINT, Switch
from vmbus.errors import ConfigError, PeerProtocolError, leaves
from vmbus.log_budget import LogBudget

log = logging.getLogger("vmbus.netvsp")

LOOK_AGAIN = 5.0
"""Seconds."""
GREETING_PATIENCE = 5.0
"""Seconds for another switch to show who it is."""
MAX_GREETING = 16
"""Connections that have not done so."""
MAX_PEERS = 64
_KEY_SIZE = 32
_ID_SIZE = 8
_NONCE_SIZE = 16
_HELLO_SIZE = _ID_SIZE + _NONCE_SIZE
_PROOF_SIZE = 32


class _Peer(NamedTuple):
    """A switch that this one is joined to."""

    connected_by: bytes
    """Id of the one who has connected."""
    carrier: Carrier
    scope: trio.CancelScope


class Meeting:
    """Joins a switch with others of its name. Must be made inside a trio run.

    Args:
        switch: Ours.
        name: Of all.
        directory: Where they meet.
        buffer: As :class:`FrameLine` has it.

    Raises:
        ConfigError: The directory cannot be used, or is not ours alone.
    """

    def __init__(self, switch: Switch, name: str, directory: str, buffer: memoryview) -> None:
        self.directory = directory
        self._switch = switch
        self._name = name
        self._buffer = buffer
        self._id = os.urandom(_ID_SIZE)
        self._peers: dict[bytes, _Peer] = {}
        self._greeting = 0
        self._budget = LogBudget()
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        try:
            self._key = _common_key(directory, name)
            self._path, self._listener = _listen(directory, name, self._id)
        except OSError as error:
            raise ConfigError(
                f"switch {name}: join={directory}: {error.strerror or error}"
            ) from error
        trio.lowlevel.spawn_system_task(self._run)

    async def aclose(self) -> None:
        """Leave. Is a checkpoint."""
        self._scope.cancel()
        await self._over.wait()

    def tell_station(self, address: bytes, there: bool) -> None:
        """Tell all others of a station that has come or gone. Cannot block."""
        for peer in self._peers.values():
            peer.carrier.tell_station(address, there)

    def describe(self) -> dict[str, Any]:
        """Describe it for people, as JSON types. Cannot block."""
        return {"directory": self.directory, "with": sorted(each.hex() for each in self._peers)}

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._accept, nursery)
                    while True:
                        await self._look(nursery)
                        await trio.sleep(LOOK_AGAIN)
        except Exception:
            log.exception("switch %s: it is no longer joined with others", self._name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._listener.close()
            self._over.set()

    # -- finding each other ----------------------------------------------------------------------

    async def _look(self, nursery: trio.Nursery) -> None:
        """Connect to all who are there and known not to be connected."""
        prefix = self._name + "."
        try:
            names = os.listdir(self.directory)
        except OSError as error:
            self._complain(f"{self.directory}: {error.strerror}")
            return
        for name in names:
            peer = name.removeprefix(prefix)
            if not name.startswith(prefix) or len(peer) != 2 * _ID_SIZE or peer == self._id.hex():
                continue
            with contextlib.suppress(ValueError):
                if bytes.fromhex(peer) not in self._peers and self._greeting < MAX_GREETING:
                    self._connect(os.path.join(self.directory, name), nursery)
        await trio.lowlevel.checkpoint()

    def _connect(self, path: str, nursery: trio.Nursery) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            if error.errno == errno.ECONNREFUSED:
                # It could be connected to when it got its name: so its owner is gone.
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return
        self._greeting += 1
        nursery.start_soon(self._meet, sock, True)

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._listener)
                continue
            except OSError as error:  # too many files
                self._complain(error.strerror or str(error))
                await trio.sleep(LOOK_AGAIN)
                continue
            if self._greeting >= MAX_GREETING or len(self._peers) >= MAX_PEERS:
                sock.close()
            else:
                self._greeting += 1
                nursery.start_soon(self._meet, sock, False)
            await trio.lowlevel.checkpoint()

    # -- one connection --------------------------------------------------------------------------

    async def _meet(self, sock: socket.socket, connected: bool) -> None:
        line = FrameLine(sock, self._buffer)
        try:
            try:
                with trio.fail_after(GREETING_PATIENCE):
                    peer = await self._greet_untrusted(line, connected=connected)
            finally:
                self._greeting -= 1
            await self._join(line, peer, connected_by=self._id if connected else peer)
        except* (PeerProtocolError, ConfigError, trio.TooSlowError) as group:
            error = leaves(group)[0]
            self._complain(str(error) or "somebody does not say who he is")
        except* OSError:
            log.debug("switch %s: another switch of its name has left", self._name)
        finally:
            line.close()

    async def _greet_untrusted(self, line: FrameLine, *, connected: bool) -> bytes:
        """Find out who is at the other end; return its id."""
        ours = self._id + os.urandom(_NONCE_SIZE)
        await _send(line, HEADER.pack(Kind.HELLO, 0) + ours)
        theirs = await _receive_untrusted(line, Kind.HELLO, _HELLO_SIZE)
        both = ours + theirs if connected else theirs + ours
        mine, other = (b"c", b"a") if connected else (b"a", b"c")
        await _send(line, HEADER.pack(Kind.PROOF, 0) + self._proof(mine, both))
        proof = await _receive_untrusted(line, Kind.PROOF, _PROOF_SIZE)
        if not hmac.compare_digest(proof, self._proof(other, both)):
            raise broken("somebody without the key")
        peer = theirs[:_ID_SIZE]
        if peer == self._id:
            raise broken("somebody with our id")
        return peer

    def _proof(self, role: bytes, hellos: bytes) -> bytes:
        return hmac.digest(self._key, role + self._name.encode() + b"\0" + hellos, "sha256")

    async def _join(self, line: FrameLine, peer: bytes, *, connected_by: bytes) -> None:
        earlier = self._peers.get(peer)
        if earlier is not None:
            if earlier.connected_by < connected_by:
                return
            earlier.scope.cancel()
        elif len(self._peers) >= MAX_PEERS:
            return

        def obey(kind: Kind, count: int, data: memoryview) -> bool:
            if kind not in {Kind.ADD, Kind.REMOVE}:
                return False
            change = self._switch.add_station if kind is Kind.ADD else self._switch.remove_station
            for address in stations_untrusted(data, count):
                change(carrier.port, address)
            return True

        carrier = Carrier(self._switch, line, f"switch {peer.hex()}", JOINT, obey)
        entry = self._peers[peer] = _Peer(connected_by, carrier, trio.CancelScope())
        for address in self._switch.own_stations():
            carrier.tell_station(address, True)
        log.info("switch %s: joined with %s", self._name, peer.hex())
        try:
            with entry.scope:
                await carrier.run()
        finally:
            if self._peers.get(peer) is entry:
                del self._peers[peer]
                log.info("switch %s: no longer joined with %s", self._name, peer.hex())

    def _complain(self, text: str) -> None:
        if self._budget.spend():
            log.warning("switch %s: %s%s", self._name, text, self._budget.left_out())


async def _send(line: FrameLine, message: bytes) -> None:
    while not line.send(message):
        await line.wait_writable()


async def _receive_untrusted(line: FrameLine, wanted: Kind, size: int) -> bytes:
    """Return the body of a message of the greeting."""
    data = await line.receive()
    if not data:
        raise OSError(errno.ECONNRESET, "it has left")
    kind, _ = kind_untrusted(data)
    if kind is not wanted or len(data) != HEADER.size + size:
        raise broken(f"{kind.name} of {len(data)} bytes where {wanted.name} is expected")
    return bytes(data[HEADER.size :])


# -- the directory -------------------------------------------------------------------------------


def _common_key(directory: str, name: str) -> bytes:
    """Return the key of all switches of a name, made by the first. Raises OSError, ConfigError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    found = os.stat(directory)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise ConfigError(
            f"switch {name}: join={directory}: it has to be the server's own user's, and nobody "
            "else may write there"
        )
    path = os.path.join(directory, name + ".key")
    try:
        return _read_key(path)
    except FileNotFoundError:
        # It has its name when it is complete.
        made = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")
        fd = os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, os.urandom(_KEY_SIZE))
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
        finally:
            os.close(fd)
            os.unlink(made)
        return _read_key(path)


def _read_key(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(f"{path}: it has to be the server's own user's, with mode 600")
        key = os.read(fd, _KEY_SIZE)
    finally:
        os.close(fd)
    if len(key) != _KEY_SIZE:
        raise ConfigError(f"{path}: it has no {_KEY_SIZE} bytes; remove it")
    return key


def _listen(directory: str, name: str, number: bytes) -> tuple[str, socket.socket]:
    """Return a socket that listens, and its path. Raises OSError."""
    path = os.path.join(directory, f"{name}.{number.hex()}")
    early = os.path.join(directory, f".{name}.{number.hex()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        sock.bind(early)
        os.chmod(early, 0o600)
        sock.listen(MAX_GREETING)
        os.rename(early, path)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(early)
        raise
    return path, sock
