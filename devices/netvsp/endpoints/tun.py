"""Linux TAP interfaces: opening their queues, and what the kernel says of them.

Nothing here waits for anybody but the kernel's own lock on its interfaces. Numbers are those of
x86-64: linux/include/uapi/linux/if_tun.h, linux/include/uapi/linux/sockios.h.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from netvsp.endpoint import Offloads
from netvsp.frames.frame import VIRTIO_HEADER
from vmbus.errors import ConfigError

DEVICE = "/dev/net/tun"
MAX_NAME = 15
"""Bytes of an interface's name: IFNAMSIZ, with its NUL."""
MAX_QUEUES = 64

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETVNETLE = 0x400454DC
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFMTU = 0x8921
_SIOCGIFTXQLEN = 0x8942

_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_UP = 0x0001
_IFF_RUNNING = 0x0040

_CHECKSUM, _TSO, _ECN, _USO = 0x01, 0x06, 0x08, 0x60
_OFFLOADS = (
    (_CHECKSUM | _TSO | _ECN | _USO, Offloads(checksum=True, tcp_segments=True, udp_segments=True)),
    # Before Linux 6.2.
    (_CHECKSUM | _TSO | _ECN, Offloads(checksum=True, tcp_segments=True)),
)

_TX_DROPPED = 11
"""Which of an interface's counters it is: linux/net/core/net-procfs.c, dev_seq_printf_stats."""
_IFREQ = struct.Struct("16sH22x")
_IFREQ_INT = struct.Struct("16si20x")


@dataclasses.dataclass(frozen=True, slots=True)
class Tap:
    """An open TAP interface."""

    name: str
    queues: Sequence[int]
    """Descriptors, the holder's to close. They do not block."""
    offloads: Offloads
    mtu: int


def open_tap(name: str, count: int) -> Tap:
    """Attach to an interface, or make one that is there as long as it is open. Cannot block.

    Args:
        name: Of the interface; ``%d`` in it is a number that is free, for a new one.
        count: Queues.

    Returns:
        It, with a ``virtio_net_hdr`` of 12 bytes before each frame. A new one is up.

    Raises:
        ConfigError: It cannot be had; the message says what to do.
        OSError: The kernel refused.
    """
    if not name or len(os.fsencode(name)) > MAX_NAME or "/" in name or name in {".", ".."}:
        raise ConfigError(f"{name!r} is not the name of an interface, 1 to {MAX_NAME} bytes")
    new = not _exists(name)
    queues: list[int] = []
    try:
        for _ in range(count):
            queues.append(_open_device())
            name = _attach(queues[-1], name, several=count > 1, new=new)
        for each in queues:
            fcntl.ioctl(each, _TUNSETVNETHDRSZ, struct.pack("i", VIRTIO_HEADER.size))
            fcntl.ioctl(each, _TUNSETVNETLE, struct.pack("i", 1))
        offloads = _offer(queues[0])
        if new:
            _set_up(name)
        return Tap(name, queues, offloads, _ask(name, _SIOCGIFMTU))
    except BaseException:
        _close(queues)
        raise


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {DEVICE}: the kernel has no TAP") from error
    except PermissionError as error:
        raise ConfigError(f"{DEVICE} may not be opened by user {_user()}") from error


def _close(fds: Sequence[int]) -> None:
    for each in fds:
        os.close(each)


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _attach(fd: int, name: str, *, several: bool, new: bool) -> str:
    """Make a descriptor a queue of an interface; returns what that is called."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    # One that was made with multi_queue takes no queue without, and the other way round.
    for each in (flags | _IFF_MULTI_QUEUE,) if several else (flags, flags | _IFF_MULTI_QUEUE):
        try:
            answer = fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(os.fsencode(name), each))
        except OSError as error:
            if error.errno == errno.EINVAL and not several and each == flags:
                continue
            raise _explained(name, error, several=several, new=new) from error
        return _name_in(answer)
    raise AssertionError("the last of them raises")


def _explained(name: str, error: OSError, *, several: bool, new: bool) -> Exception:
    if error.errno == errno.EPERM:
        if new:
            return ConfigError(
                f"there is no interface {name}, and making one needs CAP_NET_ADMIN; as root: "
                f"ip tuntap add dev {name} mode tap user {_user()}{' multi_queue' * several}"
            )
        return ConfigError(f"the interface {name} belongs to another user, or is no TAP")
    if error.errno == errno.EBUSY:
        return ConfigError(f"{name} is in use: another guest or process has it open")
    if error.errno == errno.EINVAL and not new:
        return ConfigError(
            f"{name} is no TAP interface"
            + (", or one for a single queue; make it with multi_queue" if several else "")
        )
    return error


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())


def _name_in(request: bytes) -> str:
    return os.fsdecode(request[:16].partition(b"\0")[0])


def _offer(fd: int) -> Offloads:
    """Tell the kernel what frames may have when it hands them to us; returns what it takes."""
    for flags, offloads in _OFFLOADS:
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _TUNSETOFFLOAD, flags)
            return offloads
    return Offloads(checksum=True)


def release(fd: int) -> None:
    """Leave an interface as it was found: who has it next may not know of offloads."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)


def name_of(fd: int) -> str | None:
    """Return what a queue's interface is called now, or None if it has been deleted."""
    try:
        return _name_in(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
    except OSError:
        return None


def is_up(name: str) -> bool | None:
    """Whether an interface is up and has a carrier; None if it is not in our namespace."""
    try:
        flags = _ask(name, _SIOCGIFFLAGS) & 0xFFFF
    except OSError:
        return None
    return flags & (_IFF_UP | _IFF_RUNNING) == _IFF_UP | _IFF_RUNNING


def is_set_up(name: str) -> bool:
    """Whether somebody has set an interface up; its carrier may come a moment later."""
    return bool(_ask(name, _SIOCGIFFLAGS) & _IFF_UP)


def queue_length(name: str) -> int:
    """Return how many frames an interface keeps for who reads them. Raises OSError."""
    return _ask(name, _SIOCGIFTXQLEN)


def dropped(name: str) -> int | None:
    """Return how many frames an interface has dropped since nobody read them in time.

    None, if it is not in our namespace.
    """
    for line in Path("/proc/thread-self/net/dev").read_bytes().splitlines():
        found, colon, counters = line.partition(b":")
        if colon and found.strip() == os.fsencode(name):
            return int(counters.split()[_TX_DROPPED])
    return None


def _set_up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = _ask(name, _SIOCGIFFLAGS) & 0xFFFF
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(os.fsencode(name), flags | _IFF_UP))


def _ask(name: str, request: int) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, request, _IFREQ_INT.pack(os.fsencode(name), 0))
    value: int = _IFREQ_INT.unpack(answer)[1]
    return value


def watch_links() -> socket.socket:
    """Return a socket that is readable when any interface has changed. Raises OSError.

    What it says need not be read: who it wakes asks for what it wants to know, and nothing is
    missed if there was more to say than the socket holds.
    """
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
    )
    try:
        sock.bind((0, 1))  # NETLINK_ROUTE; RTMGRP_LINK
    except BaseException:
        sock.close()
        raise
    return sock
