"""The connecting side's sockets; stdlib only."""

from __future__ import annotations

import errno
import os
import socket

from vmbus.attach.protocol.sockets import MODES, from_fd, socket_kind
from vmbus.errors import AttachError

Target = str | os.PathLike[str] | int | socket.socket
"""A socket path, an inherited connected descriptor, or a connected socket."""


def connect_socket(target: Target, mode: str | None = None) -> socket.socket:
    """Return a connected socket, the caller's from now on.

    Args:
        target: See :data:`Target`; descriptors and sockets change owner.
        mode: ``seqpacket``, ``stream``, or None for whichever the server listens on.

    Raises:
        AttachError: Nobody answers there.
        ConfigError: The descriptor is not a socket we speak on, or the mode is unknown.
    """
    if isinstance(target, socket.socket):
        return target
    if isinstance(target, int):
        return from_fd(target)
    path = os.fspath(target)
    kinds = list(MODES.values()) if mode is None else [socket_kind(mode)]
    for kind in kinds:
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            if error.errno == errno.EPROTOTYPE and kind != kinds[-1]:
                continue
            raise AttachError(f"cannot connect to {path}: {error.strerror or error}") from error
        return sock
    raise AssertionError("the last kind returns or raises")
