"""A turn of the loop is bounded in work, whatever length a guest chooses.

Everybody else waits while the loop does what one guest has asked for. Each test does the most of
one kind and counts what is done in one step of a task, or in one turn of the loop by all of them.
"""

from __future__ import annotations

import struct

import pytest
import trio

from storvsp import ScsiController
from storvsp.disk import EXTENTS_AT_ONCE, NoSpaceError
from storvsp.disks import overlay, ram
from storvsp.disks.delay import DelayDisk
from storvsp.disks.overlay import MARK_STEP, RUNS_AT_ONCE, OverlayDisk
from storvsp.disks.ram import CHUNK, GROUP, RamDisk
from storvsp.requests import COST, LONG_COST, PIECE_COST, TASK_COST, TURN, Requests
from storvsp.scsi import DiskUnit, table
from storvsp.scsi.base import COMMON
from storvsp.scsi.modes import ModePages
from storvsp.scsi.running import ABORTS_AT_ONCE
from storvsp.scsi.table import make_table
from storvsp.scsi.unit import TASK_ABORTED, Command, DataDirection
from storvsp.wire import (
    RESET_LUN,
    SRB_INVALID_REQUEST,
    build_packet,
    build_srb,
    parse_srb_reply_untrusted,
)
from tests.support.engine import Guest, make_offer, pages_message
from tests.support.storage_line import CHECK, Line, clear, line
from tests.support.turns import Work, counting, watched
from vmbus.gpadl import Gpadl
from vmbus.host.buffer import TEARDOWNS_AT_ONCE, Leases
from vmbus.host.serving import MOST_PARTS
from vmbus.host.waking import WAKES_AT_ONCE
from vmbus.memory import GuestMemory, allocate_memory
from vmbus.testing import channel_pair
from vmbus.wire import messages as m
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, RANGES_HEADER

MIB = 1 << 20


def pages_in(_memory, _offset, _count, pfns, **_options) -> int:
    return len(pfns)


# -- packets -----------------------------------------------------------------------------------


def send_scattered(wire: Line, cdb: bytes, pages: int) -> int:
    """A command for data in so many pages, no two of them neighbours."""
    pfns = [wire.guest.free_pfn + 2 * (index % 1000) for index in range(pages)]
    size = pages * 4096
    header = RANGES_HEADER.pack(0, 1) + build_range(size, 0, pfns)
    payload = build_srb(cdb, data_in=1, transfer_length=size, sense_length=20)
    return wire.send(payload, kind=GPA_DIRECT, header=header)


async def test_a_page_list_that_is_too_long_is_refused_from_its_length_alone():
    store = ScsiController(max_transfer_bytes=64 << 10)
    store.add_disk(RamDisk(MIB))
    async with line(store) as wire:
        await clear(wire)
        with counting(GuestMemory, "gather", pages_in) as gathered:
            for pages in (129, 10_000):
                send_scattered(wire, bytes(6), pages)
            answers = [parse_srb_reply_untrusted(each.payload) for each in await wire.replies()]
        assert [each.srb_status for each in answers] == [SRB_INVALID_REQUEST] * 2
        assert gathered.total == 0
        # Drivers send 512 KiB that have never looked at what they were told.
        send_scattered(wire, struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1024, 0), 128)
        (packet,) = await wire.replies()
        assert parse_srb_reply_untrusted(packet.payload).transfer_length == 512 << 10


async def test_only_the_pages_of_the_transfer_are_looked_at():
    store = ScsiController()
    store.add_disk(RamDisk(MIB))
    async with line(store) as wire:
        await clear(wire)
        pfns = [wire.guest.free_pfn + 2 * (index % 1000) for index in range(9000)]
        header = RANGES_HEADER.pack(0, 1) + build_range(9000 * 4096, 0, pfns)
        payload = build_srb(bytes(6), data_in=1, transfer_length=5000, sense_length=20)
        with counting(GuestMemory, "gather", pages_in) as gathered:
            wire.send(payload, kind=GPA_DIRECT, header=header)
            assert len(await wire.replies()) == 1
        assert gathered.total == 2


async def serve(wire: Line, cdb: bytes, *, pages: int, count: int, owner, name, amount=None):
    """Have the same command served many times at once; return what was counted."""
    with counting(owner, name, *([amount] if amount else [])) as work:
        for _ in range(count):
            if pages:
                send_scattered(wire, cdb, pages)
            else:
                wire.start(cdb)
        assert len(await wire.replies()) == count
    return work


async def test_a_batch_is_given_up_after_the_work_of_a_turn():
    store = ScsiController()
    store.add_disk(RamDisk(4 * MIB))
    async with line(store) as wire:
        await clear(wire)
        done = {"owner": DiskUnit, "name": "try_execute"}
        short = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0)
        work = await serve(wire, short, pages=1, count=250, **done)
        assert work.total == 250
        assert work.most_in_step <= 256, "short ones are bounded in packets"
        some = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 16, 0)
        work = await serve(wire, some, pages=2, count=250, **done)
        assert 20 < work.most_in_step <= TURN // (COST + 2 * (4096 + PIECE_COST)) + 1
        long = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 2048, 0)
        work = await serve(wire, long, pages=256, count=8, **done)
        assert work.total == 8
        assert work.most_in_step <= 2
        for cdb in ("12 01 83 1000 00", "a3 0c 80 00 0000 00001000 00 00"):
            work = await serve(wire, bytes.fromhex(cdb), pages=1, count=60, **done)
            assert work.total == 60
            assert work.most_in_step <= TURN // LONG_COST
        work = await serve(wire, bytes(6), pages=0, count=60, **done)
        assert work.most_in_step <= TURN // LONG_COST
        tasks = {"owner": Requests, "name": "_wait"}
        verify = bytes.fromhex("2f 00 00000000 00 0000 00")
        work = await serve(wire, verify, pages=1, count=60, **tasks)
        assert work.total == 60
        assert work.most_in_step <= TURN // TASK_COST


async def test_a_channel_does_less_in_a_turn_beside_others_that_are_busy():
    store = ScsiController()
    store.add_disk(RamDisk(4 * MIB))
    async with line(store) as wire:
        await clear(wire)
        assert store._session is not None
        life = store._session._life
        others = [channel_pair(ring_pages=2, data_pages=1)[0] for _ in range(7)]
        for each in others:
            life._is_busy(each, busy=True)
        inquiry = bytes.fromhex("12 01 83 1000 00")
        work = await serve(wire, inquiry, pages=1, count=60, owner=DiskUnit, name="try_execute")
        assert work.total == 60
        assert work.most_in_step <= TURN // LONG_COST // MOST_PARTS
    for each in others:
        each.close_doorbell()


async def test_tasks_of_commands_that_wait_begin_in_several_turns():
    store = ScsiController()
    store.add_disk(DelayDisk(RamDisk(MIB), read=0.001))
    async with line(store) as wire:
        await clear(wire)
        with counting(Requests, "_wait") as begun:
            for _ in range(60):
                send_scattered(wire, struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), 1)
            answers = 0
            while answers < 60:
                answers += len(await wire.guest.receive())
        assert begun.total == 60
        assert begun.most_in_step <= TURN // TASK_COST


async def test_the_list_of_commands_is_made_once():
    commands = make_table(COMMON)
    with counting(table, "_describe") as made:
        for timeouts in (0x00, 0x80) * 10:
            cdb = bytes.fromhex(f"a3 0c {timeouts:02x} 00 0000 00001000 00 00")
            assert table.report_supported_opcodes_untrusted(commands, cdb)
    assert made.total == 2


async def test_what_is_left_of_a_batch_is_forgotten_when_the_channel_ends():
    store = ScsiController()
    store.add_disk(RamDisk(MIB))
    async with line(store) as wire:
        await clear(wire)
        with counting(DiskUnit, "try_execute") as work:
            for _ in range(60):
                wire.start(bytes(6))
            while not work.total:
                await trio.lowlevel.checkpoint()
            assert store._session is not None
            store._session.primary.end()
            await trio.testing.wait_all_tasks_blocked()
        assert work.total < 60


# -- commands ----------------------------------------------------------------------------------


async def run(disk, cdb: str, *, out: bytes | None = None, room: int = 0, count: int = 4):
    """Have the same command executed several times at once."""
    unit = DiskUnit(disk, luns=lambda: [0])
    buffer = memoryview(bytearray(room) if out is None else bytearray(out))
    direction = DataDirection.READ if out is None else DataDirection.WRITE
    outcomes = []

    async def one() -> None:
        command = Command(bytes.fromhex(cdb), [buffer], len(buffer), direction, "guest")
        outcome = unit.try_execute(command)
        outcomes.append(await unit.execute(command) if outcome is None else outcome)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return outcomes, bytes(buffer)


def unmap_list(*ranges: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack(">QI4x", *each) for each in ranges)
    return struct.pack(">HH4x", len(body) + 6, len(body)) + body


def shredded(size: int) -> OverlayDisk:
    """Every second sector in the scratch."""
    disk = OverlayDisk(RamDisk(size))
    for at in range(0, size, 1024):
        disk.try_writev(at, [memoryview(b"x" * 512)])
    return disk


async def test_block_status_of_a_shredded_overlay():
    disk = shredded(2 * MIB)
    with counting(overlay, "Extent") as made:
        outcomes, data = await run(disk, f"9e12 {0:016x} {1 << 20:08x} 0000", room=1 << 20)
    assert [each.status for each in outcomes] == [0] * 4
    assert struct.unpack_from(">I", data)[0] // 16 >= EXTENTS_AT_ONCE, "more than one look"
    assert made.total >= 8 * EXTENTS_AT_ONCE
    assert made.most_in_turn <= EXTENTS_AT_ONCE


async def test_block_status_of_a_shredded_ram_disk():
    disk = RamDisk(64 * MIB)
    for at in range(0, 64 * MIB, 2 * CHUNK):
        disk.try_writev(at, [memoryview(b"x")])
    with counting(ram, "Extent") as made:
        outcomes, data = await run(disk, f"9e12 {0:016x} {1 << 20:08x} 0000", room=1 << 20)
    assert [each.status for each in outcomes] == [0] * 4
    assert struct.unpack_from(">I", data)[0] // 16 == 1024, "all of them, in several looks"
    assert made.most_in_turn <= EXTENTS_AT_ONCE + 2 * GROUP + 1


async def test_a_read_of_a_shredded_overlay():
    disk = shredded(MIB)
    with counting(RamDisk, "try_readv") as reads:
        outcomes, data = await run(disk, f"88 00 {0:016x} {2048:08x} 0000", room=MIB)
    assert data == (b"x" * 512 + bytes(512)) * 1024
    assert [each.status for each in outcomes] == [0] * 4
    assert reads.total == 4 * 2048
    # Each begins at once, and they go on one after the other.
    assert reads.most_in_step <= RUNS_AT_ONCE
    assert reads.most_in_turn <= 4 * RUNS_AT_ONCE


async def test_marks_of_an_overlay():
    disk = OverlayDisk(RamDisk(4 * MARK_STEP))
    for at in range(0, MARK_STEP, 1 << 16):
        disk._mark(at, 512)
    for cdb, parameters in (
        ("42 000000000000 0018 00", unmap_list((0, 4 * MARK_STEP // 512))),
        ("04 0000000000", None),
        (f"93 01 {0:016x} {MARK_STEP // 512:08x} 0000", None),
    ):
        with counting(OverlayDisk, "_mark", lambda _disk, _offset, length: length) as marked:
            outcomes, _ = await run(disk, cdb, out=parameters)
        assert [each.status for each in outcomes] == [0] * 4
        assert marked.total >= 4 * MARK_STEP
        assert marked.most_in_turn <= MARK_STEP
    assert disk._masks == {}


def test_marking_takes_no_look_at_masks_elsewhere():
    class NotToBeWalked(dict[int, int]):
        def __iter__(self):
            raise AssertionError("a guest can make a million of them")

        items = keys = values = __iter__

    disk = OverlayDisk(RamDisk(64 * MIB))
    disk._masks = NotToBeWalked()
    for at in range(0, 64 * MIB, 1 << 16):
        disk._mark(at, 512)
    disk._mark(MIB, MIB)
    assert len(disk._masks) == 1024 - 16


async def test_freeing_a_ram_disk():
    size = 4 * GROUP * CHUNK
    for cdb, parameters in (
        ("42 000000000000 0018 00", unmap_list((0, size // 512))),
        ("04 0000000000", None),
        (f"93 01 {0:016x} {size // 512:08x} 0000", None),
    ):
        disk = RamDisk(size)
        disk.try_writev(0, [memoryview(b"x" * size)])
        with counting(RamDisk, "_clear") as cleared:
            outcomes, _ = await run(disk, cdb, out=parameters)
        assert [each.status for each in outcomes] == [0] * 4
        assert disk.allocated == 0
        assert cleared.total == 4 * GROUP
        assert cleared.most_in_turn <= GROUP


async def test_closing_and_shrinking_a_ram_disk():
    size = 4 * GROUP * CHUNK
    disk = RamDisk(size)
    disk.try_writev(0, [memoryview(b"x" * size)])
    with counting(RamDisk, "_clear") as cleared:
        await disk.resize(CHUNK)
    assert (cleared.total, disk.allocated) == (4 * GROUP - 1, CHUNK)
    assert cleared.most_in_turn <= GROUP
    await disk.resize(size)
    disk.try_writev(CHUNK, [memoryview(b"x" * (size - CHUNK))])
    work = Work()
    with watched(work):
        await disk.aclose()
    assert work.turns >= 4


async def test_a_list_of_mode_pages():
    parameters = bytes(8) + bytes.fromhex("0a0a 02100000000000000000") * 5000
    disk = RamDisk(MIB)
    with counting(ModePages, "_select_page") as pages:
        outcomes, _ = await run(disk, f"55 10 0000000000 {60000:04x} 00", out=parameters)
    assert [(each.status, each.sense[2], each.sense[12]) for each in outcomes] == [(2, 5, 0x1A)] * 4
    assert CHECK == 0x84
    assert pages.total == 0


class Uninterruptible(DelayDisk):
    """Ends reads when it is told to, one by one, like a thread that cannot be called back."""

    def __init__(self) -> None:
        super().__init__(RamDisk(MIB), read=1000)
        self.reads: list[trio.Event] = []

    async def readv(self, offset, buffers) -> None:
        self.reads.append(trio.Event())
        with trio.CancelScope(shield=True):
            await self.reads[-1].wait()


class StepsOf(trio.abc.Instrument):
    """Counts the steps of tasks of a name."""

    def __init__(self, name: str) -> None:
        self.count = 0
        self._name = name

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += self._name in task.name


async def test_resets_that_wait_are_not_woken_by_each_command_that_ends():
    store = ScsiController()
    disk = Uninterruptible()
    store.add_disk(disk)
    async with line(store) as wire:
        await clear(wire)
        for _ in range(40):
            send_scattered(wire, struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), 1)
            await trio.testing.wait_all_tasks_blocked()
        assert len(disk.reads) == 40
        steps = StepsOf("_answer_reset")
        with watched(steps):
            for _ in range(40):
                wire.send(build_packet(RESET_LUN, b"", size=64))
            for each in disk.reads:
                await trio.testing.wait_all_tasks_blocked()
                each.set()
            assert len(await wire.replies()) == 80
        assert 40 <= steps.count <= 40 * 5


async def test_a_reset_of_many_commands():
    unit = DiskUnit(DelayDisk(RamDisk(MIB), read=1000), luns=lambda: [0])
    outcomes = []

    async def read() -> None:
        buffer = memoryview(bytearray(512))
        command = Command(
            struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0), [buffer], 512, DataDirection.READ, "guest"
        )
        assert unit.try_execute(command) is None
        outcomes.append(await unit.execute(command))

    async with trio.open_nursery() as nursery:
        for _ in range(5 * ABORTS_AT_ONCE):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        with counting(trio.CancelScope, "cancel") as ended:
            unit.abort("somebody else")
            for _ in range(3):
                unit.reset()
            await unit.ended()
        assert not unit.busy
    assert outcomes == [TASK_ABORTED] * 5 * ABORTS_AT_ONCE
    assert ended.total == 5 * ABORTS_AT_ONCE
    assert ended.most_in_turn <= ABORTS_AT_ONCE


class Full(RamDisk):
    """Has no room until it is made; no write is quick."""

    full = True

    def try_writev(self, offset, buffers, *, fua=False) -> bool:
        return False

    async def writev(self, offset, buffers, *, fua=False) -> None:
        if self.full:
            raise NoSpaceError("full")
        await super().writev(offset, buffers, fua=fua)


@pytest.mark.parametrize("reason", ["pause", "no room"])
async def test_commands_that_stood_still_go_on_in_several_turns(reason):
    store = ScsiController()
    disk = Full(MIB)
    place = store.add_disk(disk, stop_when_full=True)
    async with line(store) as wire:
        await clear(wire)
        assert store._session is not None
        channel = store._session.primary
        if reason == "pause":
            channel.undertakings.hold()
            disk.full = False
        count = 6 * WAKES_AT_ONCE
        with counting(Full, "writev") as writes:
            for _ in range(count):
                wire.start(struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 1, 0), write=bytes(512))
            await trio.testing.wait_all_tasks_blocked()
            begun = writes.total
            assert (begun == 0) is (reason == "pause")
            disk.full = False
            writes.most_in_turn = 0
            if reason == "pause":
                channel.undertakings.go_on()
            else:
                assert store.continue_disk(place)
            answers = await wire.replies()
        assert writes.total - begun == count == len(answers)
        assert writes.most_in_turn <= WAKES_AT_ONCE
    await store.aclose()


async def test_commands_that_fail_are_weighed():
    store = ScsiController()
    store.add_disk(RamDisk(MIB))
    async with line(store) as wire:
        await clear(wire)
        beyond = struct.pack(">BBIBHB", 0x28, 0, MIB, 0, 8, 0)
        work = await serve(wire, beyond, pages=1, count=60, owner=DiskUnit, name="try_execute")
        assert work.total == 60
        assert work.most_in_step <= TURN // LONG_COST


# -- the control plane -------------------------------------------------------------------------


def test_a_gpadl_of_8000_pages_is_proven_to_be_memory_without_views():
    guest = Guest()
    guest.engine.offer(make_offer())
    guest.contact()
    guest.post(m.RequestOffers())
    *most, last = pages_message(1, 5, list(range(4095)) * 2)
    with_views = []
    guest.post(*most)
    original = GuestMemory.gather
    GuestMemory.gather = lambda *args, **options: with_views.append(1)  # type: ignore[assignment, method-assign]
    try:
        (answer,) = guest.post(last)
    finally:
        GuestMemory.gather = original  # type: ignore[method-assign]
    assert answer.status == 0
    assert with_views == []


async def test_the_gpadls_of_a_guest_that_leaves():
    torn_down = []
    memory = allocate_memory(4096)
    async with trio.open_nursery() as nursery:
        leases = Leases(memory, lambda _key, handle: torn_down.append(handle), nursery)
        with counting(Leases, "_tear_down") as work:
            for handle in range(1000):
                leases.tear_down(1, handle)
            assert len(torn_down) == TEARDOWNS_AT_ONCE
            await trio.testing.wait_all_tasks_blocked()
            lease = leases.take(1, Gpadl(5, ()))
            leases.tear_down(1, 5)
            assert len(torn_down) == 1000, "a lease is waited for"
            lease.release()
    assert torn_down == [*range(1000), 5]
    assert work.most_in_turn <= TEARDOWNS_AT_ONCE
    memory.close()
