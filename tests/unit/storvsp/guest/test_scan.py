"""How each system looks for disks."""

from __future__ import annotations

import pytest

from storvsp.guest import ScsiError, scan
from tests.support.fake_storage import answer, sense
from tests.support.storage_guest import attached
from vmbus.guest import FREEBSD, HAIKU, ILLUMOS, LINUX_6_1, MACOS, UEFI, GuestPanic


async def test_scans_ask_what_each_system_asks():
    for personality, inquiries, reports in (
        (LINUX_6_1, 16 + 2 * 5 + 2 + 2 * 1, 16),
        (FREEBSD, 3 + 2, 3),
        (ILLUMOS, 128, 0),
        (HAIKU, 64, 0),
        (UEFI, 2, 3),
        (MACOS, 2, 0),
    ):
        async with attached(personality) as (adapter, storage):
            await scan(adapter)
            codes = [cdb[0] for cdb in storage.cdbs]
            assert (codes.count(0x12), codes.count(0xA0)) == (inquiries, reports), personality
            if personality is MACOS:
                assert codes[:64] == [0] * 64
            if personality is UEFI:
                report = next(cdb for cdb in storage.cdbs if cdb[0] == 0xA0)
                assert len(report) == 12
                assert report[6:10] == bytes(4)


async def test_scans_wait_for_unit_attentions_and_stand_units_without_a_medium():
    async with attached() as (adapter, storage):
        storage.attention = 3
        disk, other = await scan(adapter)
        assert disk.size
        storage.replies[0] = answer(0x84, 2, sense(2, 0x3A00))
        disk, other = await scan(adapter)
        assert disk.size == other.size == 0
        storage.attention = 0
        storage.replies[0] = answer(0x84, 2, sense(6, 0x2900))
        disk, other = await scan(adapter)
        assert disk.size == 0


@pytest.mark.parametrize(
    ("personality", "replies", "reason"),
    [
        (LINUX_6_1, {0x12: answer(0x20, 0)}, "nothing is there"),
        (LINUX_6_1, {0x12: answer(1, 0)}, "nothing is there"),
        (LINUX_6_1, {0x12: answer(1, 0, length=5)}, "5 bytes"),
        (LINUX_6_1, {0xA0: answer(0x20, 0)}, "every target"),
        (UEFI, {0xA0: answer(1, 0)}, "every target"),
        (LINUX_6_1, {0xA0: 16}, "not in the list"),
        (MACOS, {0: answer(5, 0)}, "ghost"),
    ],
)
async def test_answers_that_make_ghosts_crash_the_guest(personality, replies, reason):
    """Checklist row 21."""
    with pytest.raises(GuestPanic, match=reason):
        async with attached(personality) as (adapter, storage):
            storage.replies.update(replies)
            await scan(adapter)


async def test_linux_reads_the_vpd_pages_that_are_listed():
    async with attached() as (adapter, storage):
        ordinary = storage.inquiry
        storage.inquiry = lambda cdb, unit: b"" if cdb[1] else ordinary(cdb, unit)
        replies: list[int] = []

        def inquiry(cdb, unit):
            if cdb[1] and cdb[2] == 0x83 and replies:
                return b"\x00\x80\x00\x00"
            return ordinary(cdb, unit)

        storage.inquiry = inquiry
        await scan(adapter)
        pages = [cdb[2] for cdb in storage.cdbs if cdb[0] == 0x12 and cdb[1]]
        assert pages[:5] == [0, 0, 0x80, 0x83, 0xB0]
        replies.append(1)
        with pytest.raises(GuestPanic, match="VPD page 0x83"):
            await scan(adapter)


async def test_linux_takes_a_unit_without_vpd_pages():
    async with attached() as (adapter, storage):
        ordinary = storage.srb

        def srb(request, header):
            cdb = request[28:34]
            if cdb[0] == 0x12 and cdb[1]:
                return answer(0x84, 2, sense(5, 0x2400))
            if cdb[0] == 0x12 and cdb[4] == 36 and storage.broken:
                storage.broken -= 1
                if not storage.broken:
                    return answer(0x84, 2, sense(5, 0x2400))
            return ordinary(request, header)

        storage.srb = srb
        storage.broken = 0
        assert len(await scan(adapter)) == 2
        storage.broken = 18  # the full INQUIRY behind 16 of the scan and one of the unit
        with pytest.raises(ScsiError, match="INQUIRY"):
            await scan(adapter)
