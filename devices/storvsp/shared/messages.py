"""What goes over the line between a shared unit and its keeper: one record, one message.

Neither end trusts the other: behind each may be a guest that has taken its process over. So what
arrives is checked as if a guest had sent it, and nothing that arrives carries descriptors.
"""

from __future__ import annotations

import enum
import errno
import json
import socket
import struct
from typing import Any, NamedTuple

import trio

from storvsp.scsi import DataDirection, Outcome
from vmbus.errors import PeerProtocolError

MAX_RECORD = 4096
MAX_COMMANDS = 1024
"""Commands of one guest under way; a controller has 32 to 512 for all its disks."""


class Kind(enum.IntEnum):
    """First byte of a record."""

    COMMAND = 1
    ABORT = 2
    RESET = 3
    WAIT = 4
    ATTENTION = 5
    INTRODUCE = 6
    DETACH = 7
    HOLD = 8
    """Let a command stand still. Answered once: with HELD, or with the command's own DONE."""
    GO_ON = 9
    """Let it go on. A HOLD that has no answer yet gets one."""
    DONE = 16
    WAITED = 17
    INFO = 18
    HELD = 19


_COMMAND = struct.Struct("<BBBxIIQ16s")
_NUMBER = struct.Struct("<BxxxI")
_DONE = struct.Struct("<BBBxII20s")


class CommandRecord(NamedTuple):
    """A command on its way to the keeper."""

    number: int
    cdb: bytes
    direction: DataDirection
    length: int
    """Bytes of the data buffer."""
    offset: int
    """Where that is in the staging area."""

    def encode(self) -> bytes:
        """Return the record."""
        return _COMMAND.pack(
            Kind.COMMAND, len(self.cdb), self.direction, self.number, self.length, self.offset,
            self.cdb,
        )  # fmt: skip


class DoneRecord(NamedTuple):
    """An outcome on its way back."""

    number: int
    outcome: Outcome

    def encode(self) -> bytes:
        """Return the record."""
        status, sense, transferred = self.outcome
        return _DONE.pack(Kind.DONE, status, len(sense), self.number, transferred, sense)


def number_record(kind: Kind, number: int = 0) -> bytes:
    """Return a record that is a kind and a number."""
    return _NUMBER.pack(kind, number)


def info_record(info: dict[str, Any]) -> bytes:
    """Return a record that describes the unit."""
    return bytes([Kind.INFO]) + json.dumps(info, ensure_ascii=False).encode("utf-8", "replace")


def _bad(text: str) -> PeerProtocolError:
    return PeerProtocolError(f"shared disk: {text}", errno=errno.EPROTO, fatal=True)


def decode_to_keeper_untrusted(data: bytes, staging: int) -> CommandRecord | tuple[Kind, int]:
    """Parse what a keeper receives.

    Args:
        data: One record.
        staging: Bytes of the staging area.

    Raises:
        PeerProtocolError: It is no record, or its buffer is not in the staging area.
    """
    if len(data) == _COMMAND.size and data[0] == Kind.COMMAND:
        _, cdb_length, direction, number, length, offset, cdb = _COMMAND.unpack(data)
        if not 0 < cdb_length <= 16 or direction > DataDirection.NONE:
            raise _bad("a command of the wrong shape")
        if length > staging or offset > staging - length:
            raise _bad("a buffer beyond the staging area")
        return CommandRecord(number, cdb[:cdb_length], DataDirection(direction), length, offset)
    if len(data) == _NUMBER.size and Kind.ABORT <= data[0] <= Kind.GO_ON:
        kind, number = _NUMBER.unpack(data)
        return Kind(kind), number
    raise _bad(f"a record of {len(data)} bytes")


def decode_to_unit_untrusted(data: bytes) -> DoneRecord | tuple[Kind, int] | dict[str, Any]:
    """Parse what a shared unit receives. Raises PeerProtocolError if it is no record."""
    if len(data) == _DONE.size and data[0] == Kind.DONE:
        _, status, sense_length, number, transferred, sense = _DONE.unpack(data)
        if sense_length > len(sense):
            raise _bad("sense data that is too long")
        return DoneRecord(number, Outcome(status, sense[:sense_length], transferred))
    if len(data) == _NUMBER.size and data[0] in {Kind.WAITED, Kind.HELD}:
        kind, number = _NUMBER.unpack(data)
        return Kind(kind), number
    if data[:1] == bytes([Kind.INFO]):
        try:
            info = json.loads(data[1:])
        except (ValueError, RecursionError) as error:
            raise _bad("a description that is no JSON") from error
        if _is_info(info):
            return {name: info[name] for name in (*INFO, *MORE_INFO) if name in info}
    raise _bad(f"a record of {len(data)} bytes")


INFO: dict[str, type] = {"size": int, "read_only": bool, "kind": str, "warnings": list}
"""What a unit is described by."""
MORE_INFO: dict[str, type] = {"stopped": str, "no_space": int, "tray": str, "locked": bool}
"""What is said of disks only, or of drives."""
MAX_WARNINGS = 3
MAX_WARNING = 250
"""Characters; all of them have to fit into a record."""


def _is_info(info: object) -> bool:
    return (
        isinstance(info, dict)
        and all(type(info.get(name)) is kind for name, kind in INFO.items())
        and all(type(info[name]) is kind for name, kind in MORE_INFO.items() if name in info)
        and all(isinstance(each, str) for each in info["warnings"])
    )


class Line:
    """One end of a line: records in order, never blocking the loop. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._turn = trio.Lock()

    async def send(self, record: bytes) -> None:
        """Send a record. A checkpoint if the other end is slow; raises OSError if it is gone."""
        if not self._turn.locked():
            try:
                self._sock.send(record, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass
            else:
                return
        async with self._turn:
            while True:
                try:
                    self._sock.send(record, socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
                else:
                    return

    async def receive(self) -> bytes:
        """Return the next record, empty at the end. A checkpoint if there is none yet.

        The control buffer is left out, so that the kernel keeps descriptors from us; closing
        one could take as long as its maker likes.
        """
        while True:
            try:
                return self._sock.recv(MAX_RECORD)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
            except OSError:
                return b""

    def finish(self) -> None:
        """Send nothing any more; the other end sees the end. Idempotent."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it is gone already

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._sock.close()
