"""A disk full of random bytes, and VERIFY of every length."""

import os
from typing import Any

from storvsp.scsi import DiskUnit
from tests.support.scsi import MemoryDisk


def make_unit(**changes: Any) -> tuple[MemoryDisk, DiskUnit]:
    disk = MemoryDisk(**changes)
    disk.data[:] = os.urandom(len(disk.data))
    return disk, DiskUnit(disk, luns=lambda: [0])


def verify(check: int, count: int = 2, lba: int = 3) -> dict[int, str]:
    flags = check << 1
    return {
        10: f"2f {flags:02x} {lba:08x} 00 {count:04x} 00",
        12: f"af {flags:02x} {lba:08x} {count:08x} 00 00",
        16: f"8f {flags:02x} {lba:016x} {count:08x} 00 00",
    }


CAW = "89 00 0000000000000003 000000 02 00 00"
