"""The controller's session: what guests do wrong on one channel stays there."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disk import Buffers
from storvsp.disks.delay import DelayDisk
from storvsp.disks.ram import RamDisk
from storvsp.scsi.unit import STATUS_TASK_ABORTED
from storvsp.session import Session, Stage
from storvsp.wire import (
    DATA_IN,
    RESET_BUS,
    SRB_AUTOSENSE_VALID,
    SRB_ERROR,
    SRB_INVALID_LUN,
    SRB_SUCCESS,
    VERSION_6_2,
    build_packet as vstor,
    build_srb,
    parse_packet_untrusted,
    parse_srb_reply_untrusted,
)
from vmbus.errors import STATUS_UNSUCCESSFUL
from vmbus.testing import channel_pair, make_offer
from vmbus.testing.channels import GuestEnd
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, IN_BAND, RANGES_HEADER, build_packet
from vmbus.workers import WorkerPool

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
        ring_pages=4,
        data_pages=4,
        offer=make_offer(max_subchannels=controller.limits.max_subchannels),
    )
    session = Session(channel, controller.units, controller.limits)
    session.stage = Stage.READY
    session.version = VERSION_6_2
    return session, channel, guest


async def answers(guest: GuestEnd, count: int) -> list[tuple[int, int, int]]:
    """Wait for answers; return transaction id, SRB status and SCSI status of each."""
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        for packet in await guest.receive():
            reply = parse_srb_reply_untrusted(bytes(packet.payload))
            if packet.kind == COMPLETION:
                found.append((packet.transaction_id, reply.srb_status, reply.scsi_status))
    assert len(found) == count
    return found


async def answer(guest: GuestEnd) -> tuple[int, int]:
    """Wait for one answer; return transaction id and SRB status."""
    ((number, srb_status, _scsi_status),) = await answers(guest, 1)
    return number, srb_status


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until something has happened."""
    while not condition():
        await trio.sleep(0)


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
        assert session.requests.waited == 1
        assert session.refused == 5
        assert await answer(guest) == (9, SRB_SUCCESS)
        primary.end()
    primary.close_doorbell()


class HeldDisk(RamDisk):
    """Every read waits in a worker thread, which nothing can interrupt."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.go = threading.Event()
        self.pool = WorkerPool(threads=2)
        self.asked = 0
        self.begun = 0

    @contextlib.contextmanager
    def let_go_at_the_end(self) -> Iterator[None]:
        """A test that fails must not wait for its own threads."""
        try:
            yield
        finally:
            self.go.set()

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return False

    async def readv(self, offset: int, buffers: Buffers) -> None:
        self.asked += 1

        def work() -> None:
            self.begun += 1
            self.go.wait()
            RamDisk.try_readv(self, offset, buffers)

        await self.pool.run(work)

    async def aclose(self) -> None:
        await self.pool.aclose()
        await super().aclose()


async def test_a_bus_reset_ends_every_command_once():
    """Checklist row 24: those in worker threads end as they do, those that wait are aborted."""
    controller = ScsiController(instance_id=UUID(int=7))
    disk = HeldDisk(1 << 16)
    controller.add_disk(disk)
    session, primary, guest = make_session(controller)
    async with trio.open_nursery() as nursery:
        with disk.let_go_at_the_end():
            nursery.start_soon(session.run)
            guest.send(*(request(guest, number) for number in range(1, 6)))
            await until(lambda: disk.asked == 5 and disk.begun == 2)
            guest.send(build_packet(IN_BAND, vstor(RESET_BUS), transaction_id=99, flags=1))
            aborted = await answers(guest, 3)
            assert {each[1:] for each in aborted} == {(SRB_SUCCESS, STATUS_TASK_ABORTED)}
            await trio.testing.wait_all_tasks_blocked()
            assert not guest.receive_nowait(), "the reset is not over: two threads write still"
            disk.go.set()
            *ended, last = await answers(guest, 3)
            assert last[0] == 99
            assert {each[1:] for each in ended} == {(SRB_SUCCESS, 0)}
            assert sorted(each[0] for each in aborted + ended) == [1, 2, 3, 4, 5]
            assert disk.begun == 2
            guest.send(request(guest, 6))
            assert await answer(guest) == (6, SRB_ERROR | SRB_AUTOSENSE_VALID), "told of the reset"
            assert primary.outstanding == 0
            primary.end()
    primary.close_doorbell()
    await controller.aclose()


class HungDisk(RamDisk):
    """Reads end when they are told to, like those of threads, which cannot be called back."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.go = trio.Event()

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return False

    async def readv(self, offset: int, buffers: Buffers) -> None:
        with trio.CancelScope(shield=True):
            await self.go.wait()


async def test_resets_of_a_disk_that_hangs_fail_in_time_and_nothing_is_left_of_them(
    autojump_clock, caplog
):
    """In less than the 5 s for which Linux waits; none of the requests is answered by them."""
    controller = ScsiController(instance_id=UUID(int=7))
    disk = HungDisk(1 << 16)
    controller.add_disk(disk)
    session, primary, guest = make_session(controller)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        guest.send(request(guest, 1))
        await trio.testing.wait_all_tasks_blocked()
        begun = trio.current_time()
        for number in (98, 99):
            guest.send(build_packet(IN_BAND, vstor(RESET_BUS), transaction_id=number, flags=1))
        packets: list[Any] = []
        while len(packets) < 2:
            packets += await guest.receive()
        assert sorted(each.transaction_id for each in packets) == [98, 99]
        for each in packets:
            assert parse_packet_untrusted(each.payload).status == STATUS_UNSUCCESSFUL
        assert trio.current_time() - begun == pytest.approx(4)
        assert "RESET_BUS: disk 0:0:0 (HungDisk): READ(10): not back in 4 s" in caplog.text
        assert not session.requests._under_way.waiting
        disk.go.set()
        assert await answer(guest) == (1, SRB_SUCCESS)
        guest.send(build_packet(IN_BAND, vstor(RESET_BUS), transaction_id=100, flags=1))
        (packet,) = await guest.receive()
        assert parse_packet_untrusted(packet.payload).status == 0
        assert primary.outstanding == 0
        primary.end()
    primary.close_doorbell()
    await controller.aclose()


async def test_a_disk_that_is_taken_away_answers_what_is_under_way():
    """Checklist row 24, for hot removal: later commands get INVALID_LUN, without flags."""
    controller = ScsiController(instance_id=UUID(int=7))
    disk = HeldDisk(1 << 16)
    address = controller.add_disk(disk)
    session, primary, guest = make_session(controller)
    async with trio.open_nursery() as nursery:
        with disk.let_go_at_the_end():
            nursery.start_soon(session.run)
            guest.send(*(request(guest, number) for number in range(1, 4)))
            await until(lambda: disk.asked == 3 and disk.begun == 2)
            nursery.start_soon(controller.remove_disk, address)
            aborted = await answers(guest, 1)
            assert aborted[0][1:] == (SRB_SUCCESS, STATUS_TASK_ABORTED)
            guest.send(request(guest, 4))
            assert await answer(guest) == (4, SRB_INVALID_LUN)
            disk.go.set()
            ended = await answers(guest, 2)
            assert {each[1:] for each in ended} == {(SRB_SUCCESS, 0)}
            assert sorted(each[0] for each in aborted + ended) == [1, 2, 3]
            assert primary.outstanding == 0
            primary.end()
    primary.close_doorbell()


async def test_a_closed_channel_waits_for_what_still_writes_guest_memory():
    controller = ScsiController(instance_id=UUID(int=7))
    disk = HeldDisk(1 << 16)
    controller.add_disk(disk)
    session, primary, guest = make_session(controller)
    over = trio.Event()

    async def serve() -> None:
        await session.run()
        over.set()

    async with trio.open_nursery() as nursery:
        with disk.let_go_at_the_end():
            nursery.start_soon(serve)
            guest.send(request(guest, 1))
            await until(lambda: disk.begun == 1)
            primary.end()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not over.is_set()
            disk.go.set()
            await over.wait()
    primary.close_doorbell()
    await controller.aclose()
