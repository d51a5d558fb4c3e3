"""``cd:PATH``: an ISO image as a read-only optical medium with 2048-byte sectors.

An ISO 9660 volume is counted in whole sectors, so bytes behind the last whole one cannot belong
to it and are not part of the disk. ``share`` means the same as for ``raw``; without it the image
is locked for reading, so that nobody writes it under the guest. ``cd:install.iso`` is a drive with
that medium; ``cd:`` by itself, behind a
controller, is a drive without a medium.
"""

from __future__ import annotations

from storvsp.disks.raw import RawDisk
from storvsp.disks.specs import DiskSpec
from vmbus.plugins.options import Option

SECTOR_SIZE = 2048
"""Bytes of a CD-ROM mode 1 sector (ECMA-130)."""
OPTIONS = (Option("share", "take no lock, and mind nobody else's; not the same as `shared`"),)


async def open_spec(spec: DiskSpec) -> RawDisk:
    """Open ``cd:[share]PATH``."""
    options = spec.reader()
    share = options.flag("share")
    options.finish()
    if not spec.target:
        raise spec.error("needs the path of an ISO image, as in cd:install.iso")
    return await RawDisk.open(
        spec.target, read_only=True, sector_size=SECTOR_SIZE, share=share, optical=True
    )
