"""Sockets for :func:`vmbus.attach.server.serve`: from a path, or from systemd."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from vmbus.attach.protocol.sockets import from_fd, socket_kind
from vmbus.errors import ConfigError

_BACKLOG = 16
_LISTEN_FDS_START = 3
"""First descriptor that a service manager passes (sd_listen_fds(3))."""


def listen_path(
    path: str | os.PathLike[str], *, mode: str = "seqpacket", permissions: int = 0o600
) -> socket.socket:
    """Listen on a new socket file. The caller closes the socket and unlinks the file.

    A socket file that nobody listens on any more is replaced.

    Args:
        path: Where; at most 107 bytes (unix(7)).
        mode: ``seqpacket`` or ``stream``.
        permissions: Of the file: who may connect is who may attach a guest.

    Raises:
        ConfigError: Unknown mode, something else is there, or a server is listening.
        OSError: The file cannot be made.
    """
    kind = socket_kind(mode)
    path = os.fspath(path)
    _remove_stale(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.bind(path)
        # Nobody can connect before listen(), so nobody slips in before the chmod.
        Path(path).chmod(permissions)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if "too long" in str(error):
            raise ConfigError(f"socket path {path}: longer than 107 bytes") from error
        raise
    return sock


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    try:
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket path {path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    # EPROTOTYPE: a listener of the other type; EAGAIN: a listener with a full queue.
    if result != errno.ECONNREFUSED:
        raise ConfigError(f"socket path {path}: another server is using it")
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()


@contextlib.contextmanager
def open_listener(
    path: str | os.PathLike[str], *, mode: str = "seqpacket", permissions: int = 0o600
) -> Iterator[socket.socket]:
    """Listen on ``path`` for the length of a ``with`` block; see :func:`listen_path`."""
    sock = listen_path(path, mode=mode, permissions=permissions)
    identity = _identity(path)
    try:
        yield sock
    finally:
        sock.close()
        # Only our own file: another server may have replaced it.
        if identity is not None and _identity(path) == identity:
            Path(path).unlink()


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = Path(path).lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def from_systemd(
    name: str | None = None, *, environ: MutableMapping[str, str] | None = None
) -> list[socket.socket]:
    """Adopt the sockets that a service manager passed, as :func:`named_from_systemd` does.

    Args:
        name: Only those with this name; the others are closed.
        environ: As there.
    """
    found = []
    for label, sock in named_from_systemd(environ=environ):
        if name is None or label == name:
            found.append(sock)
        else:
            sock.close()
    return found


def named_from_systemd(
    *, environ: MutableMapping[str, str] | None = None
) -> list[tuple[str, socket.socket]]:
    """Adopt the sockets that a service manager passed, with their names (sd_listen_fds(3)).

    Args:
        environ: Where to look, ``os.environ`` by default; the LISTEN variables are removed, so
            that children do not take the sockets for theirs.

    Returns:
        Names (``FileDescriptorName=`` of the unit) and sockets, the caller's; none if nothing was
        passed to this process.

    Raises:
        ConfigError: The variables make no sense, or a descriptor is not a socket we speak on.
    """
    environ = os.environ if environ is None else environ
    pid, count, names = (
        environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if not (pid.isdecimal() and count.isdecimal()):
        if pid or count:
            raise ConfigError(f"socket activation: LISTEN_PID={pid!r} LISTEN_FDS={count!r}")
        return []
    if int(pid) != os.getpid():
        return []
    labels = names.split(":") if names else []
    return [
        (labels[index] if index < len(labels) else "unknown", from_fd(_LISTEN_FDS_START + index))
        for index in range(int(count))
    ]
