"""PREEMPT AND ABORT: over when nothing of the preempted initiator moves any more."""

import struct

import pytest
import trio
import trio.testing

from storvsp.disks.ram import RamDisk
from storvsp.scsi import Command, DataDirection, DiskUnit


class HeldWrites(RamDisk):
    """Writes that wait in a thread, as it were: nothing can interrupt them."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.go = trio.Event()
        self.held = 0

    def try_writev(self, offset, buffers, *, fua=False):
        return False

    async def writev(self, offset, buffers, *, fua=False):
        self.held += 1
        with trio.CancelScope(shield=True):
            await self.go.wait()
        assert RamDisk.try_writev(self, offset, buffers)


@pytest.mark.parametrize("kind", [1, 3, 5, 8], ids=hex)
async def test_preempt_and_abort_is_over_when_the_preempted_cannot_write_any_more(kind):
    disk = HeldWrites()
    unit = DiskUnit(disk, luns=lambda: [0])
    order: list[str] = []

    async def execute(who: str, cdb: bytes, data: bytearray, name: str) -> None:
        command = Command(cdb, [memoryview(data)], len(data), DataDirection.WRITE, who)
        outcome = unit.try_execute(command)
        if outcome is None:
            outcome = await unit.execute(command)
        order.append(f"{name}: {outcome.status:#x}")

    def out(action: int, key: int, new: int) -> tuple[bytes, bytearray]:
        cdb = struct.pack(">BBB2xIx", 0x5F, action, kind, 24)
        return cdb, bytearray(struct.pack(">QQ8x", key, new))

    write = struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 8, 0)
    for who, key in (("A", 0xA), ("B", 0xB)):
        for _ in range(3):  # past the attentions after power-on
            await execute(who, bytes(6), bytearray(), "ready")
        await execute(who, *out(0, 0, key), "register")
    await execute("A", *out(1, 0xA, 0), "reserve")
    order.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(execute, "A", write, bytearray(b"A" * 4096), "A writes")
        await trio.testing.wait_all_tasks_blocked()
        assert disk.held == 1
        nursery.start_soon(execute, "B", *out(5, 0xB, 0xA), "B preempts")
        await trio.testing.wait_all_tasks_blocked()
        assert order == [], "A's write is still able to land"
        await execute("A", write, bytearray(b"a" * 4096), "A tries again")
        assert order.pop() == "A tries again: 0x18", "no new one begins"
        disk.go.set()
    assert [each.split(":")[0] for each in order] == ["A writes", "B preempts"]
    assert order[1] == "B preempts: 0x0"


async def test_who_preempts_does_not_wait_for_itself():
    unit = DiskUnit(RamDisk(1 << 20), luns=lambda: [0])

    async def out(action, key, new):
        data = bytearray(struct.pack(">QQ8x", key, new))
        cdb = struct.pack(">BBB2xIx", 0x5F, action, 1, 24)
        command = Command(cdb, [memoryview(data)], len(data), DataDirection.WRITE, "A")
        return unit.try_execute(command) or await unit.execute(command)

    assert (await out(0, 0, 0xA)).status == 0
    assert (await out(1, 0xA, 0)).status == 0
    assert (await out(5, 0xA, 0xA)).status == 0
