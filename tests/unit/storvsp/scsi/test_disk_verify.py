"""VERIFY, WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE, and what happens beside them."""

import os
from typing import Any

import pytest
import trio
import trio.testing

from storvsp.disk import MediumError
from storvsp.scsi import DiskUnit
from storvsp.scsi.disk_core import BULK
from storvsp.scsi.disk_verify import first_difference
from storvsp.scsi.gate import Gate
from storvsp.scsi.unit import TASK_ABORTED
from tests.support.scsi import MemoryDisk, make_command, run


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


@pytest.mark.parametrize("size", [10, 12, 16])
async def test_verify_without_data_reads_the_medium(size):
    disk, unit = make_unit()
    assert (await run(unit, verify(0)[size])).status == 0
    assert disk.calls == ["read"]
    disk.fail = MediumError("bad", offset=1536)
    reply = await run(unit, verify(0)[size])
    assert (reply.fault, reply.information) == ((3, 0x1100), 3)


@pytest.mark.parametrize("size", [10, 12, 16])
async def test_verify_compares_with_the_guests_data(size):
    disk, unit = make_unit()
    good = bytes(disk.data[1536:2560])
    reply = await run(unit, verify(1)[size], out=good, pieces=(5, 700))
    assert (reply.status, reply.transferred) == (0, 1024)
    bad = bytearray(good)
    bad[700] ^= 1
    reply = await run(unit, verify(1)[size], out=bytes(bad))
    assert (reply.fault, reply.information) == ((0xE, 0x1D00), 4)


async def test_verify_compares_every_block_with_one():
    disk, unit = make_unit()
    disk.data[1536:3072] = b"abcd" * 384
    reply = await run(unit, verify(3, 3)[16], out=b"abcd" * 128)
    assert (reply.status, reply.transferred) == (0, 512)
    disk.data[3071] = 0
    reply = await run(unit, verify(3, 3)[16], out=b"abcd" * 128)
    assert (reply.fault, reply.information) == ((0xE, 0x1D00), 5)


async def test_verify_works_in_pieces_the_back_end_takes():
    disk, unit = make_unit(max_transfer=1024)
    disk.data[:] = b"q" * len(disk.data)
    for check, size in ((0, 0), (1, 5 * 512), (3, 512)):
        disk.calls.clear()
        assert (await run(unit, verify(check, 5)[10], out=b"q" * size)).status == 0
        assert disk.calls == ["read"] * 3
    disk.data[7 * 512] = 0
    reply = await run(unit, verify(1, 5)[10], out=b"q" * 2560)
    assert reply.information == 7


async def test_verify_refuses_what_it_cannot_do():
    _, unit = make_unit()
    assert (await run(unit, verify(2)[10])).pointer == (1, 2, True)
    reply = await run(unit, verify(1)[10], out=bytes(1023))
    assert reply.pointer == (7, None, True)
    assert (await run(unit, verify(3)[10], room=512)).fault == (5, 0x2400)
    assert (await run(unit, "2f 20 00000000 00 0001 00")).pointer == (1, 7, True)


@pytest.mark.parametrize("check", [0, 2])
@pytest.mark.parametrize(
    "cdb",
    [
        "2e {:02x} 00000003 00 0005 00",
        "ae {:02x} 00000003 00000005 00 00",
        "8e {:02x} 0000000000000003 00000005 00 00",
    ],
)
async def test_write_and_verify_writes_durably_and_reads_back(cdb, check):
    disk, unit = make_unit(max_transfer=1024)
    payload = os.urandom(2560)
    reply = await run(unit, cdb.format(check), out=payload, pieces=(3, 1400))
    assert (reply.status, reply.transferred) == (0, 2560)
    assert disk.data[1536:4096] == payload
    assert disk.calls == ["write fua", "read"] * 3


async def test_write_and_verify_notices_a_lying_medium():
    class Liar(MemoryDisk):
        def _write(self, offset, buffers, fua):
            super()._write(offset, buffers, fua)
            self.data[offset] ^= 0xFF

    disk = Liar()
    unit = DiskUnit(disk, luns=lambda: [0])
    assert (await run(unit, "2e 00 00000003 00 0001 00", out=bytes(512))).status == 0
    reply = await run(unit, "2e 02 00000003 00 0001 00", out=bytes(512))
    assert (reply.fault, reply.information) == ((0xE, 0x1D00), 3)
    assert (await run(unit, "2e 04 00000003 00 0001 00", out=bytes(512))).pointer == (1, 2, True)
    assert (await run(unit, "2e 00 00000003 00 0001 00", out=bytes(1))).fault == (5, 0x2400)


CAW = "89 00 0000000000000003 000000 02 00 00"


async def test_compare_and_write_writes_only_if_equal():
    disk, unit = make_unit()
    old, new = bytes(disk.data[1536:2560]), os.urandom(1024)
    reply = await run(unit, CAW, out=old + new, pieces=(1, 1023))
    assert (reply.status, reply.transferred) == (0, 2048)
    assert disk.data[1536:2560] == new
    expected = bytearray(new)
    expected[777] ^= 0x80
    reply = await run(unit, CAW, out=bytes(expected) + old)
    assert (reply.fault, reply.information, reply.transferred) == ((0xE, 0x1D00), 777, 0)
    assert disk.data[1536:2560] == new
    disk.calls.clear()
    await run(unit, CAW.replace("89 00", "89 08"), out=new + old)
    assert disk.calls == ["read", "write fua"]


async def test_compare_and_write_refuses_data_that_does_not_fit_and_too_many_blocks():
    """``iscsi-test-cu``: CompareAndWrite.InvalidDataOutSize."""
    disk, unit = make_unit(blocks=1024)
    for size in (2047, 4096):
        assert (await run(unit, CAW, out=bytes(size))).pointer == (13, None, True)
    reply = await run(unit, "89 00 0000000000000003 000000 81 00 00", out=bytes(0x81 * 1024))
    assert reply.pointer == (13, None, True)
    assert (await run(unit, "89 00 00000000000003ff 000000 02 00 00")).fault == (5, 0x2100)
    assert disk.calls == []


async def test_compare_and_write_of_no_blocks_is_one_without_data():
    """``iscsi-test-cu``: CompareAndWrite.Simple sends 256 blocks, which its CDB makes 0 of."""
    disk, unit = make_unit()
    none = CAW.replace("000000 02", "000000 00")
    assert (await run(unit, none)).status == 0
    assert (await run(unit, none, out=bytes(512 * 512))).pointer == (13, None, True)
    assert disk.calls == []


async def test_orwrite_sets_bits():
    disk, unit = make_unit(max_transfer=1024)
    before = bytes(disk.data[1536:4096])
    bits = os.urandom(2560)
    reply = await run(unit, "8b 08 0000000000000003 00000005 00 00", out=bits)
    assert (reply.status, reply.transferred) == (0, 2560)
    assert disk.data[1536:4096] == bytes(a | b for a, b in zip(before, bits, strict=True))
    assert set(disk.calls) == {"read", "write fua"}


@pytest.mark.parametrize("inline", [True, False])
async def test_two_compare_and_writes_never_both_win(inline):
    disk, unit = make_unit()
    disk.inline = inline
    old = bytes(disk.data[1536:2560])
    outcomes = []

    async def attempt(value):
        outcomes.append((await run(unit, CAW, out=old + bytes([value]) * 1024)).status)

    async with trio.open_nursery() as nursery:
        for value in range(1, 9):
            nursery.start_soon(attempt, value)
    assert sorted(outcomes) == [0, *[2] * 7]


async def test_nothing_gets_between_compare_and_write():
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    old, new = bytes(disk.data[1536:2560]), b"n" * 1024
    disk.inline = False
    disk.pause = trio.Event()
    order = []

    async def go(name: str, cdb: str, **keywords: Any) -> None:
        command, buffer = make_command(cdb, **keywords)
        outcome = await unit.execute(command)
        assert outcome.status == 0
        order.append((name, bytes(buffer)))

    async with trio.open_nursery() as nursery:
        read = "28 00 00000003 00 0002 00"
        command, _ = make_command(read, room=1024)
        nursery.start_soon(lambda: go("early read", read, room=1024))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: go("caw", CAW, out=old + new))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: go("late read", read, room=1024))
        await trio.testing.wait_all_tasks_blocked()
        assert not unit.gate.closed  # still waiting for the early read
        disk.pause.set()
        while not unit.gate.closed:
            await trio.sleep(0)
        disk.inline = True
        assert unit.try_execute(command) is None  # not even the fast path gets in
        six, _ = make_command("08 000003 02 00", room=1024)
        assert unit.try_execute(six) is None
        ready, _ = make_command("00" * 6)
        assert unit.try_execute(ready).status == 0
    assert [name for name, _ in order] == ["early read", "caw", "late read"]
    assert order[0][1] == old
    assert order[2][1] == new
    assert unit.try_execute(command).status == 0


async def test_a_cancelled_exclusive_command_lets_the_others_in():
    gate = Gate(lambda: None)
    await gate.acquire(exclusive=False)
    entered = []

    async def shared():
        await gate.acquire(exclusive=False)
        entered.append(True)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(lambda: gate.acquire(exclusive=True))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(shared)
                await trio.testing.wait_all_tasks_blocked()
                assert not entered
                scope.cancel()
    assert entered
    assert not gate.closed


@pytest.mark.parametrize(("cdb", "out"), [
    ("2f 00 00000000 00 0002 00", None),
    ("2e 00 00000000 00 0002 00", bytes(1024)),
    ("41 00 00000000 00 0002 00", b"x" * 512),
])  # fmt: skip
async def test_only_a_few_commands_work_in_the_hosts_memory_at_a_time(cdb, out):
    """A guest may have thousands under way, and each one holds up to a mebibyte."""
    disk, unit = make_unit()
    disk.pause = pause = trio.Event()
    entered = 0

    async def wait() -> None:
        nonlocal entered
        entered += 1
        await pause.wait()

    disk._wait = wait  # type: ignore[method-assign]  # counts who gets there
    async with trio.open_nursery() as nursery:
        for _ in range(BULK + 5):
            command, _ = make_command(cdb, out=out)
            nursery.start_soon(unit.execute, command)
        await trio.testing.wait_all_tasks_blocked()
        assert entered == BULK
        disk.pause.set()
    assert entered >= BULK + 5


async def test_a_reset_aborts_what_waits_for_the_disk():
    """Checklist row 24: every command gets its outcome, also after a reset."""
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    disk.inline = False
    disk.pause = trio.Event()
    outcomes = []

    async def go(initiator: str) -> None:
        command, _ = make_command("28 00 00000003 00 0002 00", room=1024, initiator=initiator)
        outcomes.append((initiator, await unit.execute(command)))

    async with trio.open_nursery() as nursery:
        for initiator in ("guest", "other", "guest"):
            nursery.start_soon(go, initiator)
        await trio.testing.wait_all_tasks_blocked()
        unit.abort("other")
        await trio.testing.wait_all_tasks_blocked()
        assert [name for name, _ in outcomes] == ["other"]
        unit.reset()
    assert {outcome for _, outcome in outcomes} == {(0x40, b"", 0)}
    assert len(outcomes) == 3
    for initiator in ("guest", "other"):
        assert (await run(unit, "00" * 6, initiator=initiator)).fault == (6, 0x2903)


async def test_a_command_that_begins_after_its_unit_was_closed_touches_nothing():
    """Its disk may be somebody else's by now."""
    disk, unit = make_unit()
    disk.inline = False
    command, _ = make_command("2a 00 00000003 00 0001 00", out=bytes(512))
    assert unit.try_execute(command) is None
    unit.close()
    assert await unit.execute(command) == TASK_ABORTED
    assert disk.calls == []


async def test_a_cancelled_caller_sees_its_cancellation():
    disk, unit = make_unit()
    disk.inline = False
    disk.pause = trio.Event()
    command, _ = make_command("28 00 00000003 00 0002 00", room=1024)
    with trio.move_on_after(0) as scope:
        await unit.execute(command)
    assert scope.cancelled_caught
    disk.pause.set()
    assert (await unit.execute(command)).status == 0


def test_the_first_difference_is_found():
    assert first_difference(b"", b"") is None
    for size in (1, 2, 3, 512, 1000):
        for at in {0, 1, size // 2, size - 1} & set(range(size)):
            left, right = bytearray(size), bytearray(size)
            right[at] = 1
            right[-1] |= 2
            assert first_difference(left, right) == at


@pytest.mark.parametrize(
    ("cdb", "size"),
    [
        ("2f 00 00000000 00 0020 00", 0),
        ("2f 06 00000000 00 0020 00", 512),
        ("2e 00 00000000 00 0020 00", 32 * 512),
        ("8b 00 0000000000000000 00000020 00 00", 32 * 512),
        ("41 00 00000000 00 0020 00", 512),
        ("28 00 00000000 00 0020 00", None),
        ("2a 00 00000000 00 0020 00", 32 * 512),
    ],
)
async def test_long_commands_let_others_run_although_the_disk_never_waits(cdb, size):
    disk = MemoryDisk(max_transfer=1024)
    disk.data[:] = b"q" * len(disk.data)
    disk.prompt = True
    unit = DiskUnit(disk, luns=lambda: [0])
    turns = 0

    async def count():
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        room = 32 * 512 if size is None else 0
        out = None if size is None else b"q" * size
        assert (await run(unit, cdb, room=room, out=out)).status == 0
        assert turns >= 10
        nursery.cancel_scope.cancel()
