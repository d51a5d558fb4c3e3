"""Back-ends that several guests have at once.

Guests may be served in different processes. What they share is kept in one place, by a *keeper*,
and each guest's device has a *line* to it: a socket, and a staging area through which data goes.
The server program brings both together; what is said on a line is the plug-in's own.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

from vmbus.plugins.devices import DevicePlugin


class Line(NamedTuple):
    """One end of a line; both are the holder's to close."""

    sock: socket.socket
    """AF_UNIX, SOCK_SEQPACKET."""
    staging_fd: int
    """A memfd whose size is sealed."""

    def filenos(self) -> tuple[int, int]:
        """Return both descriptors, borrowed."""
        return self.sock.fileno(), self.staging_fd

    def close(self) -> None:
        """Close both."""
        self.sock.close()
        os.close(self.staging_fd)


class Keeper(Protocol):
    """A back-end that is shared."""

    async def serve(self, sock: socket.socket, staging_fd: int, initiator: Hashable) -> None:
        """Serve one guest until its line ends; owns both ends' descriptors. Is a checkpoint.

        Must not raise, whatever comes over the line.
        """

    async def aclose(self) -> None:
        """Close the back-end, when no line is left. Is a checkpoint."""


@runtime_checkable
class SharingPlugin(Protocol):
    """What a device plug-in has besides, if its back-ends can be shared.

    Its ``from_specs`` takes ``shared``, a mapping of specifications to lines, and owns the lines.
    """

    def shared(self, specs: Sequence[str], options: Mapping[str, Any]) -> dict[str, int]:
        """Return which of these back-ends are shared, with the bytes of their staging areas.

        Raises:
            ConfigError: One cannot be.
        """

    async def open_keeper(self, spec: str, *, identity: bytes) -> Keeper:
        """Open a back-end that is shared. Is a checkpoint.

        Args:
            spec: One of those that ``shared`` has returned.
            identity: 16 bytes naming it, if it has no name of its own.

        Raises:
            ConfigError: It cannot be opened.
        """


def can_share(plugin: DevicePlugin) -> TypeGuard[SharingPlugin]:
    """Whether a plug-in has back-ends that can be shared."""
    return isinstance(plugin, SharingPlugin)


def make_line(staging: int) -> tuple[Line, Line]:
    """Return both ends of a new line.

    Args:
        staging: Bytes of the staging area.

    Raises:
        OSError: Too many files are open.
    """
    fd = os.memfd_create("vmbus-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, staging)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Line(one, os.dup(fd)), Line(other, fd)
    except BaseException:
        os.close(fd)
        raise
