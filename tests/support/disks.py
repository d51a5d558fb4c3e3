"""Buffers, and disks with something in them."""

from storvsp.disks.ram import RamDisk

SECTOR = 512
MIB = 1 << 20


def views(*parts):
    return [memoryview(bytearray(part)) for part in parts]


def full(sectors=64):
    disk = RamDisk(sectors * SECTOR)
    disk.try_writev(0, views(b"d" * (sectors * SECTOR)))
    return disk
