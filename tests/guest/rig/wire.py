"""The end of a wire: frames as they are, to and from an adapter on an interface of this machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.guest.rig.packages import run
from tests.support.patience import PATIENCE

_ALL = 0x0003
"""ETH_P_ALL."""
_AUXDATA = 8
"""PACKET_AUXDATA: what the kernel has taken out of a frame comes beside it."""
_SOL_PACKET = 263
_BUFFER_FORCE = 33
"""SO_RCVBUFFORCE."""
_AUXILIARY = struct.Struct("=IIIHHHH")
"""struct tpacket_auxdata: status, lengths, offsets, the tag, its type."""
_HAS_TAG = 0x10
_ADDRESSES = 12
"""Bytes of a frame before its tag."""
_LONGEST = 1 << 16
_numbers = itertools.count()


class Wire:
    """A TAP interface on which the machine itself says nothing; made by :func:`open_wire`.

    Args:
        name: Of the interface, which is up.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(_SOL_PACKET, _AUXDATA, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _BUFFER_FORCE, 8 << 20)
        self._socket.settimeout(PATIENCE)
        self._socket.bind((name, _ALL))

    def send(self, frames: Sequence[bytes]) -> None:
        """Send frames to the adapter."""
        for frame in frames:
            self._socket.send(frame)

    def receive(self, count: int) -> list[bytes]:
        """Return frames that the adapter has sent. Raises TimeoutError if they do not come."""
        found: list[bytes] = []
        while len(found) < count:
            frame, beside, _, address = self._socket.recvmsg(
                _LONGEST, socket.CMSG_SPACE(_AUXILIARY.size)
            )
            if address[2] != socket.PACKET_OUTGOING:
                found.append(with_tag(frame, beside[0][2]))
        return found

    def close(self) -> None:
        """Let go of the interface."""
        self._socket.close()


def with_tag(frame: bytes, beside: bytes) -> bytes:
    """Return a frame with the VLAN tag that the kernel has put beside it, if it has one."""
    status, *_, tag, kind = _AUXILIARY.unpack_from(beside)
    if not status & _HAS_TAG:
        return frame
    return frame[:_ADDRESSES] + struct.pack(">HH", kind, tag) + frame[_ADDRESSES:]


@contextlib.contextmanager
def open_wire() -> Iterator[Wire]:
    """Make a TAP interface for the length of a ``with`` block. Raises RigError."""
    name = f"rigwire{os.getpid() % 10000}{next(_numbers)}"
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)
    run("ip", "tuntap", "add", name, "mode", "tap", "multi_queue", "vnet_hdr")
    try:
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        run("ip", "link", "set", name, "up")
        with contextlib.closing(Wire(name)) as wire:
            yield wire
    finally:
        run("ip", "link", "del", name)
