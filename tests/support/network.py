"""A network namespace of a test's own, and what is in it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def own_namespace() -> Iterator[None]:
    """Have this thread, and what it starts, in a network namespace without anything but lo, up.

    Raises:
        OSError: It takes a privilege.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        try:
            ip("link set lo up")
            yield
        finally:
            _check(_libc.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


async def _inline(function: Callable[..., Any], *args: Any, **_options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*args)


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network namespace of the test's own."""
    # A thread that trio keeps for later is in the namespace of an earlier test, and what it starts.
    monkeypatch.setattr(trio.to_thread, "run_sync", _inline)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_namespace())
        except PermissionError as error:
            pytest.skip(f"no network namespaces: {error}")
        yield


def ip(*commands: str) -> None:
    """Run commands of ``ip``, in the namespace of this thread."""
    for each in commands:
        subprocess.run(["ip", *each.split()], check=True, capture_output=True)


def setting(name: str, value: object) -> None:
    """Set one of the namespace's own settings, such as ``ipv4/ip_forward``."""
    Path("/proc/sys/net", name).write_text(str(value))


def packet_socket(interface: str) -> socket.socket:
    """Return a socket for all frames of an interface, as its driver sees them."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sock.bind((interface, 3))
    return sock
