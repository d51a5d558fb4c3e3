"""A file system of a VMM's own, which answers nobody but the VMM: FUSE without a library.

The kernel asks whoever has opened ``/dev/fuse`` (linux/include/uapi/linux/fuse.h; fuse(4)), and
makes a process wait that looks at a file, writes to it or just closes it, for as long as no answer
comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FILE = "memory"
SIZE = 1 << 20

_IN_HEADER = struct.Struct("<IIQQIII4x")
"""Length, opcode, unique, node, uid, gid, pid (that of a thread)."""
_OUT_HEADER = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQ24x12xIIIIIII")
"""Inode, size, blocks, times, mode, links, uid, gid, device, block size, flags."""
_INIT_OUT = struct.Struct("<IIIIHHIIHH32x")
_READ_SIZE = 1 << 17

_FORGET, _INTERRUPT, _BATCH_FORGET = 2, 36, 42
"""Are not answered by anybody."""
FLUSH = 25
"""What a close asks for."""
_ROOT, _NODE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_DETACH = 2
"""MNT_DETACH of umount2(2)."""


class SilentFileSystem:
    """Serves this process's own threads, and notes who else has asked for something.

    Args:
        fd: ``/dev/fuse``; owned.

    Attributes:
        waiting: Opcodes of the requests of others, none of which is answered.
    """

    def __init__(self, fd: int) -> None:
        self.waiting: list[int] = []
        self._fd = fd
        self._over = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="FUSE daemon")
        self._thread.start()

    def close(self) -> None:
        """End the connection: whoever waits gets an error."""
        os.eventfd_write(self._over, 1)
        self._thread.join()
        os.close(self._fd)
        os.close(self._over)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._over, select.POLLIN)
        while self._over not in dict(poll.poll()):
            try:
                request = os.read(self._fd, _READ_SIZE)
            except OSError as error:
                if error.errno == errno.ENODEV:  # it is mounted no more
                    return
                continue  # the request was taken back
            _, opcode, unique, node, _, _, thread = _IN_HEADER.unpack_from(request)
            if opcode in {_FORGET, _INTERRUPT, _BATCH_FORGET}:
                continue
            if thread and not os.path.exists(f"/proc/self/task/{thread}"):
                self.waiting.append(opcode)
                continue
            answer = _ANSWERS.get(opcode)
            data = answer(node) if answer is not None else b""
            code = -errno.ENOSYS if answer is None else 0
            with contextlib.suppress(OSError):  # it was taken back
                os.write(
                    self._fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(data), code, unique) + data
                )


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o700 if node == _ROOT else stat.S_IFREG | 0o600
    return _ATTRIBUTES.pack(node, SIZE, SIZE // 512, mode, 1, 0, 0, 0, 4096, 0)


_ANSWERS: dict[int, Callable[[int], bytes]] = {
    1: lambda _: struct.pack("<QQ24x", _NODE, 1) + _attributes(_NODE),  # LOOKUP
    3: lambda node: bytes(16) + _attributes(node),  # GETATTR, which is good for no time at all
    14: lambda _: bytes(16),  # OPEN
    18: lambda _: b"",  # RELEASE
    FLUSH: lambda _: b"",
    26: lambda _: _INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4096, 0, 0, 0),  # INIT
    38: lambda _: b"",  # DESTROY
}


@contextlib.contextmanager
def silent_file_system(folder: Path) -> Iterator[tuple[SilentFileSystem, Path]]:
    """Mount one; yields it and the path of its only file. Skips the test where that cannot be."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODEV, errno.EACCES, errno.EPERM}:
            raise
        pytest.skip(f"no FUSE here: /dev/fuse: {error.strerror}")
    folder.mkdir()
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    place = os.fsencode(folder)
    if _libc.mount(b"test", place, b"fuse", 0, options.encode()):
        code = ctypes.get_errno()
        os.close(fd)
        if code not in {errno.EPERM, errno.EACCES, errno.ENODEV}:
            raise OSError(code, os.strerror(code))
        pytest.skip(f"nothing can be mounted here: {os.strerror(code)}")
    system = SilentFileSystem(fd)
    try:
        yield system, folder / FILE
    finally:
        _libc.umount2(place, _DETACH)
        system.close()
