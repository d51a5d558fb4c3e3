"""Opening an image file or block device: making it, checking it, locking it."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat

from storvsp.disks import linux
from vmbus.errors import ConfigError
from vmbus.plugins.remarks import remark

_log = logging.getLogger("storvsp")


def measure(fd: int, sector_size: int) -> int:
    """Return the size of an open file or block device in bytes, whole sectors. Raises OSError."""
    status = os.fstat(fd)
    size = linux.block_device_size(fd) if stat.S_ISBLK(status.st_mode) else status.st_size
    return size - size % sector_size


def identify(fd: int) -> bytes:
    """Return 16 bytes naming a file or block device, the same each time it is opened. Blocks.

    A file that is renamed stays the same disk, a copy of it is another one, and so is what takes
    over the inode number of a deleted file, as far as the file system counts that. Empty if a
    block device or a file system has no name that outlives a restart of the host.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        name = linux.block_device_name(status.st_rdev)
        parts = [b"block device", name.encode()] if name else []
    else:
        numbers = (os.fstatvfs(fd).f_fsid, status.st_ino, linux.generation(fd))
        # NFS and FUSE do not say which file system it is: inodes of two of them could be the same.
        parts = [b"file", *(str(number).encode() for number in numbers)] if numbers[0] else []
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest() if parts else b""


# Where the formats of images have their names: offset from the start, or from the end.
_FORMATS = (
    ("qcow2", 0, b"QFI\xfb"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VHD", -512, b"conectix"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VDI", 64, b"\x7f\x10\xda\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
)


def oddities(fd: int, sector_size: int) -> list[str]:
    """Return what somebody who opens this as a raw image should know. Blocks; raises OSError."""
    found = []
    size = measure(fd, 1)
    if rest := size % sector_size:
        found.append(
            f"the last {rest} of its {size} bytes are no whole sector of {sector_size} bytes, and "
            "not part of the disk"
        )
    for name, offset, magic in _FORMATS:
        at = offset if offset >= 0 else size + offset
        if at >= 0 and os.pread(fd, len(magic), at) == magic:
            found.append(
                f"it looks like a {name} image; as a raw one, the guest sees the format's own bytes"
            )
            break
    return found


def open_file(
    name: str, *, read_only: bool, sector_size: int, direct: bool, create: int | None, share: bool
) -> int:
    """Open, create and lock the file; nothing is left behind on failure. Blocks.

    Args:
        name: The path.
        read_only: For reading only, with a shared lock.
        sector_size: Bytes; what ``create`` has to be a multiple of.
        direct: Bypass the page cache.
        create: Make a sparse file of that many bytes if there is none.
        share: Take no lock.

    Returns:
        A descriptor, the caller's.

    Raises:
        ConfigError: It cannot be used like that; the message says what to do.
        OSError: The kernel refused.
    """
    created = False
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    if create is not None:
        if read_only:
            raise ConfigError(
                f"{name}: create= makes a disk to be written, but this one is for reading only"
            )
        if create <= 0 or create % sector_size:
            raise ConfigError(
                f"{name}: create={create} is not a number of {sector_size}-byte sectors"
            )
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            pass
        else:
            created = True
            try:
                os.ftruncate(fd, create)
            except BaseException:
                os.unlink(name)
                raise
            finally:
                os.close(fd)
    try:
        kind = os.stat(name).st_mode
    except FileNotFoundError as error:
        if read_only:
            raise
        raise ConfigError(
            f"{name}: {error.strerror}; raw:[create=SIZE]{name} makes a new image"
        ) from error
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        raise ConfigError(f"{name} is neither a file nor a block device")
    if stat.S_ISBLK(kind) and not (read_only or share):
        flags |= os.O_EXCL
    fd = -1
    try:
        fd = _open_existing(name, flags)
        if not share:
            _lock(fd, name, exclusive=not read_only)
        size = measure(fd, 1)
        if create is not None and size != create:
            # It may have been resized since it was made.
            text = f"{name} has {size} bytes and is used as it is; create= is for new ones"
            remark(_log, text)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        if created:
            os.unlink(name)
        raise
    return fd


def _open_existing(name: str, flags: int) -> int:
    try:
        return os.open(name, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConfigError(
                f"{name} is mounted or in use by the host; [share] opens it all the same"
            ) from error
        refused = error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}
        if refused and flags & os.O_RDWR and _can_be_read(name):
            raise ConfigError(f"{name} cannot be opened for writing; use raw:[ro]{name}") from error
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise ConfigError(
                f"{name} is on a file system without direct I/O; leave out direct"
            ) from error
        raise


def _can_be_read(name: str) -> bool:
    """Whether opening for reading helps; asked by doing it: a sandbox has rules of its own."""
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError:
        return False
    return True


def _lock(fd: int, name: str, *, exclusive: bool) -> None:
    try:
        linux.lock(fd, exclusive=exclusive)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            holder = "has it open" if exclusive else "has it open for writing"
            raise ConfigError(
                f"{name} is in use: another guest or process {holder}. Guests of a server have one "
                "disk together with [shared], files of their own with {guest} in the name, or read "
                "one image with [ro] or overlay:"
            ) from error
        raise ConfigError(
            f"{name} is on a file system that cannot lock ({error.strerror}); [share] opens it "
            "without a lock, so that nothing keeps two writers apart"
        ) from error
