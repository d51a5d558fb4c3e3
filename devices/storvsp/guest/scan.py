"""Looking for disks, in the way of each operating system.

Sources: linux/drivers/scsi/scsi_scan.c, freebsd/sys/cam/scsi/scsi_xpt.c, openbsd/sys/scsi/
scsiconf.c, mu_msvm/MsvmPkg/StorvscDxe (``StorChannelBuildLunList``), MacHyperVSupport.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from storvsp.guest.adapter import StorvscAdapter
from storvsp.guest.disk import GuestDisk
from storvsp.guest.habits import Scan
from storvsp.guest.replies import Result, ScsiError
from vmbus.wire.guids import CLASS_IDE

INQUIRY = 0x12
TEST_UNIT_READY = 0x00
REPORT_LUNS = 0xA0
READ_CAPACITY_10 = 0x25
READ_CAPACITY_16 = struct.pack(">BB8xIBB", 0x9E, 0x10, 32, 0, 0)
_READ_CAPACITY_10 = struct.pack(">B9x", READ_CAPACITY_10)
_TEST_UNIT_READY = bytes(6)
STANDARD_INQUIRY = 36
_ABSENT = 0x7F
"""Byte 0 of INQUIRY data: no device can be here (SPC-3 table 83)."""
_LINUX_PATHS, _LINUX_TARGETS, _LINUX_LUNS = 8, 2, 255
_LINUX_REPORT = 4096
_UEFI_REPORT = 8 + 255 * 8
_TRIES = 6
"""Unit attentions after power-on come one at a time."""
_UNIT_ATTENTION = 6

Address = tuple[int, int, int]
"""Path, target, LUN."""


async def scan(adapter: StorvscAdapter) -> list[GuestDisk]:
    """Find all logical units and ask each for its size. A checkpoint.

    Returns:
        The units, disks and others, in the order of their addresses.

    Raises:
        GuestPanic: The host's answers would make this operating system see a ghost or stop.
    """
    scanner = _Scanner(adapter)
    style = adapter.habits.scan
    if adapter.offer.class_id == CLASS_IDE:  # the target stands in the second field of its GUID
        found = [(0, adapter.offer.instance_id.fields[1] & 0xFF, 0)]
    elif style is Scan.LINUX:
        found = await scanner.by_reports(
            [(path, target) for path in range(_LINUX_PATHS) for target in range(_LINUX_TARGETS)]
        )
    elif style is Scan.CAM:
        found = await scanner.by_reports([(0, target) for target in range(3)])
    elif style is Scan.INQUIRY_ALL:
        found = [(0, target, lun) for target in range(2) for lun in range(64)]
    elif style is Scan.ONE_TARGET:
        found = [(0, 0, lun) for lun in range(64)]
    elif style is Scan.TEST_UNIT_READY:
        found = await scanner.by_readiness()
    else:
        found = await scanner.by_reports_alone()
    return await scanner.attach(found)


class _Scanner:
    def __init__(self, adapter: StorvscAdapter) -> None:
        self._adapter = adapter
        self._panic = adapter.guest.panic

    async def _run(self, cdb: bytes, address: Address, read: int = 0) -> Result:
        path, target, lun = address
        return await self._adapter.execute(cdb, path=path, target=target, lun=lun, read=read)

    async def _inquire(self, address: Address, *, page: int | None = None, size: int) -> Result:
        cdb = struct.pack(">BBBHB", INQUIRY, page is not None, page or 0, size, 0)
        return await self._run(cdb, address, size)

    async def _standard(self, address: Address) -> bytes | None:
        """Return a unit's INQUIRY data, or None if it is absent.

        Linux turns a failed INQUIRY into a successful one with an empty buffer, and so sees a
        disk: absence has to be told by the data.
        """
        result = await self._inquire(address, size=STANDARD_INQUIRY)
        if not result.good or not result.data:
            self._panic(f"INQUIRY {address}: fails, where 0x7F tells that nothing is there")
        if result.data[0] == _ABSENT:
            return None
        if len(result.data) < STANDARD_INQUIRY or result.data[4] < STANDARD_INQUIRY - 5:
            self._panic(f"INQUIRY {address}: {len(result.data)} bytes, {result.data.hex()}")
        return result.data

    async def _report(self, address: Address, read: int, allocation: int) -> list[int]:
        result = await self._run(struct.pack(">B5xI2x", REPORT_LUNS, allocation), address, read)
        data = result.data
        if not result.good or len(data) < 8:
            self._panic(f"REPORT LUNS {address}: has to succeed on every target")
        size = int.from_bytes(data[:4], "big")
        luns = data[8 : 8 + size]
        # Peripheral addressing: bus 0, LUN in byte 1; flat addressing has 0x40 in byte 0.
        return [int.from_bytes(luns[n : n + 2], "big") & 0x3FFF for n in range(0, len(luns), 8)]

    async def by_reports(self, targets: Iterable[tuple[int, int]]) -> list[Address]:
        """INQUIRY of LUN 0 of each target, then its REPORT LUNS."""
        found = []
        for path, target in targets:
            first = (path, target, 0)
            present = await self._standard(first) is not None
            luns = await self._report(first, _LINUX_REPORT, _LINUX_REPORT)
            if present and 0 not in luns:
                self._panic(f"REPORT LUNS {first}: LUN 0 is there but not in the list")
            found += [(path, target, lun) for lun in luns if lun < _LINUX_LUNS]
        return found

    async def by_reports_alone(self) -> list[Address]:
        """REPORT LUNS with an allocation length of 0, as if it were that of the buffer."""
        found = []
        for target in range(3):
            luns = await self._report((0, target, 0), _UEFI_REPORT, 0)
            found += [(0, target, lun) for lun in luns]
        return found

    async def by_readiness(self) -> list[Address]:
        """TEST UNIT READY: whatever does not say "invalid LUN" is there."""
        addresses = [(0, 0, lun) for lun in range(64)]
        return [
            address
            for address in addresses
            if not (await self._run(_TEST_UNIT_READY, address)).absent
        ]

    async def attach(self, addresses: Iterable[Address]) -> list[GuestDisk]:
        """Make disks of the addresses at which something is."""
        disks = []
        for address in addresses:
            inquiry = await self._standard(address)
            if inquiry is None:
                if self._adapter.habits.scan in (Scan.TEST_UNIT_READY, Scan.REPORT_LUNS):
                    self._panic(f"INQUIRY {address}: absent, but found before: a ghost")
                continue
            disk = GuestDisk(self._adapter, *address, inquiry)
            if self._adapter.habits.scan is Scan.LINUX:
                await self._linux_probe(disk, address)
            await self._capacity(disk)
            disks.append(disk)
        return disks

    async def _linux_probe(self, disk: GuestDisk, address: Address) -> None:
        """Ask what Linux asks of a new unit: full INQUIRY, then the VPD pages that exist."""
        full = await self._inquire(address, size=disk.inquiry[4] + 5)
        if not full.good:
            raise ScsiError("INQUIRY", full)
        disk.inquiry = full.data
        head = await self._inquire(address, page=0, size=4)
        if not head.good:
            return
        size = int.from_bytes(head.data[2:4], "big") + 4
        pages = await self._inquire(address, page=0, size=size)
        for page in (0x80, 0x83, 0x89, 0xB0, 0xB1, 0xB2):
            if page in pages.data[4:]:
                answer = await self._inquire(address, page=page, size=255)
                if not answer.good or answer.data[1] != page:
                    self._panic(f"INQUIRY {address}: VPD page {page:#x} is listed but wrong")

    async def _capacity(self, disk: GuestDisk) -> None:
        """Find out the size, as sd does: TEST UNIT READY until ready, then READ CAPACITY."""
        for _ in range(_TRIES):
            result = await disk.execute(_TEST_UNIT_READY)
            if result.sense_key != _UNIT_ATTENTION:
                break
        if not result.good:
            return  # no medium, or no command of this kind of device
        data = await disk.command("READ CAPACITY(10)", _READ_CAPACITY_10, read=8)
        last, disk.block_size = struct.unpack(">II", data)
        if last == 0xFFFF_FFFF:
            data = await disk.command("READ CAPACITY(16)", READ_CAPACITY_16, read=32)
            last, disk.block_size = struct.unpack_from(">QI", data)
        disk.block_count = last + 1
