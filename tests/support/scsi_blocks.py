"""A disk full of random bytes, and every command that reads or writes it."""

import os
from typing import Any

from storvsp.scsi import DiskUnit
from tests.support.scsi import MemoryDisk


def filled_unit(disk: MemoryDisk | None = None, **changes: Any) -> tuple[MemoryDisk, DiskUnit]:
    disk = disk or MemoryDisk(**changes)
    disk.data[:] = os.urandom(len(disk.data))
    return disk, DiskUnit(disk, luns=lambda: [0], identity=b"0123456789abcdef")


READS = {
    "READ(6)": "08 000003 02 00",
    "READ(10)": "28 00 00000003 00 0002 00",
    "READ(12)": "a8 00 00000003 00000002 00 00",
    "READ(16)": "88 00 0000000000000003 00000002 00 00",
}


WRITES = {
    name.replace("READ", "WRITE"): cdb
    for name, cdb in {
        "READ(6)": "0a 000003 02 00",
        "READ(10)": "2a 00 00000003 00 0002 00",
        "READ(12)": "aa 00 00000003 00000002 00 00",
        "READ(16)": "8a 00 0000000000000003 00000002 00 00",
    }.items()
}


LAST = 127
