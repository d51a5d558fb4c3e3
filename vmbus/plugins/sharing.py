"""Back-ends that several guests have at once.

Guests may be served in different processes. What they share is kept in one place, by a *keeper*,
and each guest's device has a *line* to it: a socket and, if the plug-in wants one, a staging area
through which data goes. The server program brings both together; what is said on a line is the
plug-in's own.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

from vmbus.plugins.devices import DevicePlugin


class Share(NamedTuple):
    """How a back-end is shared."""

    keeper: str = ""
    """All back-ends of a plug-in that say the same here, those of several devices too, have one
    keeper. Empty: this back-end has one to itself."""
    staging: int = 0
    """Bytes of the staging area of each line; 0: there is none."""
    within_process: bool = True
    """Whether guests of one process need keeper and lines, too; otherwise the plug-in finds what
    they share by itself."""
    programs: bool = False
    """Whether the keeper starts programs: it is not confined, then, and must look at nothing that
    comes from guests."""


class Line(NamedTuple):
    """One end of a line; both are the holder's to close."""

    sock: socket.socket
    """AF_UNIX, SOCK_SEQPACKET."""
    staging_fd: int | None = None
    """A memfd whose size is sealed."""

    def filenos(self) -> list[int]:
        """Return its descriptors, borrowed: the socket's first."""
        return [self.sock.fileno(), *([] if self.staging_fd is None else [self.staging_fd])]

    @classmethod
    def of(cls, filenos: Sequence[int]) -> Line:
        """Return a line of what :meth:`filenos` returned, or copies of that. Owns them."""
        sock, *staging = filenos
        return cls(socket.socket(fileno=sock), *staging)

    def close(self) -> None:
        """Close both."""
        self.sock.close()
        if self.staging_fd is not None:
            os.close(self.staging_fd)


class Keeper(Protocol):
    """A back-end that is shared."""

    async def serve(self, line: Line, initiator: Hashable, spec: str) -> None:
        """Serve one guest until its line ends. Is a checkpoint.

        Must not raise, whatever comes over the line.

        Args:
            line: This end of it; owned.
            initiator: Who the guest is.
            spec: The back-end that the line is for, one of those that are kept here.
        """

    async def aclose(self) -> None:
        """Close the back-end, when no line is left. Is a checkpoint."""


@runtime_checkable
class SharingPlugin(Protocol):
    """What a device plug-in has besides, if its back-ends can be shared.

    Its ``from_specs`` takes ``shared``, a mapping of specifications to lines, and owns the lines.
    """

    def shared(self, specs: Sequence[str], options: Mapping[str, Any]) -> dict[str, Share]:
        """Return which of these back-ends are shared, and how.

        Raises:
            ConfigError: One cannot be.
        """

    async def open_keeper(self, specs: Sequence[str], *, identity: bytes) -> Keeper:
        """Open what is shared. Is a checkpoint.

        Args:
            specs: Those that ``shared`` has returned with this keeper: one, or some.
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
        staging: Bytes of the staging area; 0: there is none.

    Raises:
        OSError: Too many files are open.
    """
    if not staging:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Line(one), Line(other)
    fd = os.memfd_create("vmbus-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, staging)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Line(one, os.dup(fd)), Line(other, fd)
    except BaseException:
        os.close(fd)
        raise
