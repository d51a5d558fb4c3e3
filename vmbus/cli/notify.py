"""Telling a service manager how the service is doing (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send ``state``, for example ``READY=1``, if a service manager wants to know. Cannot block.

    Args:
        state: What to say.
        environ: Where NOTIFY_SOCKET is looked for.

    Returns:
        Whether it was told. A manager that cannot be reached is no reason to fail.
    """
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    if path.startswith("@"):  # the abstract name space
        path = "\0" + path[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), path)
        except OSError:
            return False
    return True
