"""Requests: what is counted for each unit, on each way that a command may take."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import trio

from storvsp import ScsiController, open_disk
from storvsp.session import Session, Stage
from storvsp.wire import DATA_IN, DATA_OUT, VERSION_6_2, build_srb
from vmbus.testing import channel_pair
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, RANGES_HEADER, build_packet

DISKS = ("ram:1M", "delay:[read=1us,write=1us]ram:1M", "fault:[on=read]ram:1M")


async def counted(
    commands: Sequence[tuple[int, bool, int, int]],
) -> list[tuple[int, int, int, int]]:
    """Return what is counted per disk: commands, bytes read and written, errors."""
    controller = ScsiController()
    for spec in DISKS:
        controller.add_disk(await open_disk(spec))
    channel, guest = channel_pair(ring_pages=4, data_pages=4)
    session = Session(channel, controller.units, controller.limits)
    session.stage, session.version = Stage.READY, VERSION_6_2
    for number, (lun, writing, lba, sectors) in enumerate(commands):
        size = sectors * 512
        cdb = struct.pack(">BBIBHB", 0x2A if writing else 0x28, 0, lba, 0, sectors, 0)
        request = build_srb(
            cdb, lun=lun, data_in=DATA_OUT if writing else DATA_IN, transfer_length=size
        )
        pages = RANGES_HEADER.pack(0, 1) + build_range(size, 0, [guest.free_pfn])
        guest.send(
            build_packet(GPA_DIRECT, request, transaction_id=number + 1, flags=1, header=pages)
        )
    async with trio.open_nursery() as nursery:
        packets = channel._reader.read_batch_untrusted()
        while packets:  # it may end early, when it has done the work of a turn
            packets = packets[session.serve_batch(channel, packets, nursery) :]
    units = controller.snapshot()["units"]
    await controller.aclose()
    channel.close_doorbell()
    names = ("commands", "bytes_read", "bytes_written", "errors")
    return [tuple(unit[name] for name in names) for unit in units]


@pytest.mark.parametrize("luns", [(0, 1, 2), (2, 1, 0), (1, 1, 2, 2, 0, 0, 0)], ids=str)
async def test_each_unit_counts_its_own_commands(luns: tuple[int, ...]):
    found = await counted([(lun, writing, 0, 2) for lun in luns for writing in (False, True, True)])
    for lun, fails in ((0, False), (1, False), (2, True)):
        turns = luns.count(lun)
        read = 0 if fails else 1024 * turns
        assert found[lun] == (3 * turns, read, 2048 * turns, turns if fails else 0)


async def test_what_a_guest_gets_wrong_is_no_error_of_the_disk():
    found = await counted([(0, False, 1 << 11, 1), (0, False, 0, 8), (9, False, 0, 1)])
    assert found[0] == (2, 4096, 0, 0)
