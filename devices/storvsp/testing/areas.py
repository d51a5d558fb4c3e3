"""Where on a disk it is worth trying something."""

from __future__ import annotations

from storvsp.disk import DiskInfo

AREA = 256 << 10
"""Most bytes that one check works on."""


def areas(info: DiskInfo) -> list[tuple[int, int]]:
    """Ranges worth a try, whatever the disk is made of: (offset, length)."""
    size, sector = info.size, info.sector_size
    limit = info.max_transfer or AREA
    wanted = [(0, sector), (size - sector, sector), (0, AREA), (size - AREA, AREA)]
    for border in (4 << 10, 64 << 10, 1 << 20, 2 << 20, size // 2 // sector * sector):
        wanted += [(border - sector, 2 * sector), (border - 8 * sector, 33 * sector)]
    chosen: list[tuple[int, int]] = []
    for offset, length in wanted:
        start = max(0, min(offset, size - sector))
        rounded = min(length, size - start, limit // sector * sector)
        if (start, rounded) not in chosen:
            chosen.append((start, rounded))
    return chosen
