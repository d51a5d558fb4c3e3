"""Sockets that come as a number."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmbus.attach.protocol.sockets import from_fd
from vmbus.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_a_descriptor_must_be_a_socket_we_speak_on(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    os.set_inheritable(theirs.fileno(), True)
    adopted = from_fd(theirs.detach())
    assert adopted.type == socket.SOCK_STREAM
    assert not adopted.get_inheritable()
    adopted.close()
    ours.close()
    with (tmp_path / "f").open("w") as file, pytest.raises(ConfigError, match="not a socket"):
        from_fd(file.fileno())
    with pytest.raises(ConfigError, match="descriptor -1"):
        from_fd(-1)
    for family, kind in (
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
    ):
        with socket.socket(family, kind) as sock:
            with pytest.raises(ConfigError, match="not an AF_UNIX"):
                from_fd(sock.fileno())
            assert sock.fileno() >= 0
            os.fstat(sock.fileno())
