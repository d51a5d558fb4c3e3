"""Writing to disks in a guest and reading back, with nothing but busybox."""

from __future__ import annotations

from tests.guest.rig.guest import Guest

CHUNK = 64
"""KiB of one write."""


def write_and_compare(guest: Guest, name: str, *, megabytes: int = 1, at: int = 0) -> None:
    """Write random data to a disk, let the guest forget it, read it back and compare.

    Args:
        guest: Has the disk.
        name: Of the disk, for example ``sda``.
        megabytes: How much.
        at: Where, in MiB.
    """
    count, skip = (megabytes << 10) // CHUNK, (at << 10) // CHUNK
    guest.run(
        f"dd if=/dev/urandom of=/run/written bs={CHUNK}k count={count} 2>/dev/null &&"
        f" dd if=/run/written of=/dev/{name} bs={CHUNK}k seek={skip} conv=notrunc,fsync"
        " 2>/dev/null && sync && echo 3 >/proc/sys/vm/drop_caches &&"
        f" dd if=/dev/{name} bs={CHUNK}k skip={skip} count={count} 2>/dev/null"
        " | cmp - /run/written"
    )


def checksum(guest: Guest, name: str, *, megabytes: int = 1, at: int = 0) -> str:
    """Return the checksum of what is on a disk, read past the guest's caches."""
    count, skip = (megabytes << 10) // CHUNK, (at << 10) // CHUNK
    return guest.run(
        f"dd if=/dev/{name} bs={CHUNK}k skip={skip} count={count} iflag=direct 2>/dev/null | md5sum"
    ).split()[0]
