"""The kinds of socket that ``vmbus-user`` is spoken on, and sockets that were inherited."""

from __future__ import annotations

import os
import socket
import stat

from vmbus.errors import ConfigError

MODES = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}
"""Socket types by the name that options have for them."""

CONTROL_SUFFIX = ".control"
"""What the path of a server's socket for operators ends in, after that of its first for VMMs."""


def control_path(path: str) -> str:
    """Return where the operators of the server at ``path`` connect, if it has such a socket.

    Args:
        path: Of its socket for VMMs, or of that for operators itself.
    """
    beside = path + CONTROL_SUFFIX
    return beside if os.path.exists(beside) else path


def socket_kind(mode: str) -> socket.SocketKind:
    """Return the socket type of ``seqpacket`` or ``stream``. Raises ConfigError."""
    try:
        return MODES[mode]
    except KeyError:
        raise ConfigError(f"socket mode {mode!r}: must be one of {', '.join(MODES)}") from None


def from_fd(fd: int) -> socket.socket:
    """Adopt an inherited socket, listening or connected (``--fd N``); it is the caller's then.

    Raises:
        ConfigError: Not an AF_UNIX socket of a type we speak.
    """
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"descriptor {fd}: not open") from error
    if not is_socket:
        raise ConfigError(f"descriptor {fd}: not a socket")
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type not in MODES.values():
        sock.detach()
        raise ConfigError(f"descriptor {fd}: not an AF_UNIX seqpacket or stream socket")
    sock.set_inheritable(False)
    return sock
