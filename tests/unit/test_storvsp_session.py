"""The controller's session: what guests do wrong on one channel stays there."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disks.delay import DelayDisk
from storvsp.disks.ram import RamDisk
from storvsp.session import Session, Stage
from storvsp.wire import DATA_IN, SRB_SUCCESS, VERSION_6_2, build_srb, parse_srb_reply_untrusted
from vmbus.testing import channel_pair, make_offer
from vmbus.testing.channels import GuestEnd
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, RANGES_HEADER, build_packet

READ = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0)


def request(guest: GuestEnd, transaction_id: int, cdb: bytes = READ, *, flags: int = 1) -> bytes:
    return build_packet(
        GPA_DIRECT,
        build_srb(cdb, data_in=DATA_IN, transfer_length=512),
        transaction_id=transaction_id,
        flags=flags,
        header=RANGES_HEADER.pack(0, 1) + build_range(512, 0, [guest.free_pfn]),
    )


def make_session(controller: ScsiController) -> tuple[Session, Any, GuestEnd]:
    channel, guest = channel_pair(
        ring_pages=4, data_pages=4, offer=make_offer(max_subchannels=controller.max_subchannels)
    )
    session = Session(controller, channel)
    session.stage = Stage.READY
    session.version = VERSION_6_2
    return session, channel, guest


async def answer(guest: GuestEnd) -> tuple[int, int]:
    """Return transaction id and SRB status of the one answer that comes."""
    (packet,) = await guest.receive()
    return packet.transaction_id, parse_srb_reply_untrusted(bytes(packet.payload)).srb_status


async def test_a_corrupt_sub_channel_ends_alone():
    """The primary channel goes on, and the bus is told that nobody serves the other one."""
    controller = ScsiController(instance_id=UUID(int=7), max_subchannels=1)
    controller.add_disk(RamDisk(1 << 16))
    session, primary, guest = make_session(controller)
    branch, branch_guest = channel_pair(ring_pages=4, data_pages=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        primary.deliver_subchannel(branch)
        branch_guest.send(request(branch_guest, 1))
        assert await answer(branch_guest) == (1, SRB_SUCCESS)
        branch_guest.memory.page(0)[:4] = b"\xff" * 4  # write index
        branch_guest.ring_doorbell()
        await branch.wait_released()
        guest.send(request(guest, 2))
        assert await answer(guest) == (2, SRB_SUCCESS)
        primary.end()
    primary.close_doorbell()
    branch.close_doorbell()


async def test_a_command_that_wants_no_answer_is_not_waited_for(autojump_clock):
    """Nothing would limit how many there are: only requests with an answer count."""
    controller = ScsiController(instance_id=UUID(int=7))
    controller.add_disk(DelayDisk(RamDisk(1 << 16), read=1.0))
    session, primary, guest = make_session(controller)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        guest.send(*(request(guest, number, flags=0) for number in range(5)))
        guest.send(request(guest, 9))
        await trio.testing.wait_all_tasks_blocked()
        assert session.waited == 1
        assert controller.faults == 5
        assert await answer(guest) == (9, SRB_SUCCESS)
        primary.end()
    primary.close_doorbell()
