"""Network namespaces: servers, and what they talk to, have networks of their own.

So no test needs anything of the machine's own network, or changes it. Takes root, and ``ip``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from tests.guest.rig.packages import run

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_RESOLV_CONF = "/etc/resolv.conf"
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Place(NamedTuple):
    """Where a program runs."""

    namespace: str
    """As ``ip netns`` calls it."""
    resolv_conf: str = ""
    """A file that is there instead of ``/etc/resolv.conf``; empty: none is."""

    def enter(self) -> None:
        """Have this process there for good. It must have no other thread. Raises OSError."""
        _enter(self.namespace)
        if self.resolv_conf:
            _check(_libc.unshare(_CLONE_NEWNS))
            # What is mounted from here on is seen by this process and its children only.
            _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
            paths = self.resolv_conf.encode(), _RESOLV_CONF.encode()
            _check(_libc.mount(*paths, None, _MS_BIND, None))


def _enter(namespace: str) -> None:
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET))
    finally:
        os.close(fd)


class Namespace:
    """A network namespace; of interfaces it has ``lo`` only, at first.

    Args:
        name: For ``ip netns``, which nobody else has.

    Raises:
        RigError: It cannot be made.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        self.ip("link set lo up")

    def ip(self, *commands: str) -> None:
        """Run commands of ``ip`` in it. Raises RigError."""
        for each in commands:
            run("ip", "-n", self.name, *each.split())

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Have this thread in it: sockets that it makes belong to it for good."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(self.name)
            try:
                yield
            finally:
                _check(_libc.setns(before, _CLONE_NEWNET))
        finally:
            os.close(before)

    def start(self, *command: str, output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a program in it."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )

    def close(self) -> None:
        """Let go of it, and of its interfaces, as soon as no program is in it any more."""
        run("ip", "netns", "del", self.name)
