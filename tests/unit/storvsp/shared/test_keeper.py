"""What a keeper lets a guest do whose process was taken over."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from storvsp.disks.delay import DelayDisk
from storvsp.disks.ram import RamDisk
from storvsp.scsi.unit import Command, DataDirection
from storvsp.shared.messages import MAX_COMMANDS, CommandRecord, Kind, number_record
from tests.support.patience import PATIENCE
from tests.support.shared import kept, visitor
from vmbus.workers import _owner

TEST_UNIT_READY = bytes(6)
READ = bytes.fromhex("28 00 00000000 00 0001 00")


def ready(number: int) -> bytes:
    return CommandRecord(number, TEST_UNIT_READY, DataDirection.NONE, 0, 0).encode()


async def good(unit) -> None:
    """The other guest is served."""
    with trio.fail_after(PATIENCE):
        while True:
            outcome = await unit.execute(
                Command(READ, [memoryview(bytearray(512))], 512, DataDirection.READ, "me")
            )
            if outcome.status == 0:
                return


@pytest.mark.parametrize("what", ["commands", "waits"])
async def test_whoever_asks_and_never_reads_is_owed_so_many_answers(what, caplog):
    async with kept(RamDisk(1 << 20)) as keeper, visitor(keeper, "victim") as victim:
        line = keeper.line("hostile")
        line.sock.setblocking(False)
        sent = 0
        for _ in range(100):
            try:
                while sent < 100 * MAX_COMMANDS:
                    record = ready(sent) if what == "commands" else number_record(Kind.WAIT, sent)
                    line.sock.send(record)
                    sent += 1
            except BlockingIOError:
                await trio.testing.wait_all_tasks_blocked()
                await good(victim)
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            raise AssertionError("it may ask for ever")
        assert MAX_COMMANDS < sent < 5 * MAX_COMMANDS
        assert "hostile: shared disk: too many commands" in caplog.text
        await good(victim)
        line.sock.close()


async def test_the_end_of_a_guest_is_not_that_of_the_next_one_of_its_name(monkeypatch):
    disk = DelayDisk(RamDisk(1 << 20), read=1)
    async with kept(disk) as keeper:
        line = keeper.line("alice")
        await trio.testing.wait_all_tasks_blocked()
        line.sock.send(CommandRecord(1, READ, DataDirection.READ, 512, 0).encode())
        await trio.testing.wait_all_tasks_blocked()
        order: list[str] = []
        unit = keeper.keeper.unit
        abort, introduce = unit.abort, keeper.keeper.describe

        def aborting(*who: Any) -> None:
            order.append("abort")
            abort(*who)

        def describing() -> dict[str, Any]:
            order.append("welcome")
            return introduce()

        monkeypatch.setattr(unit, "abort", aborting)
        monkeypatch.setattr(keeper.keeper, "describe", describing)
        line.sock.close()
        async with visitor(keeper, "alice") as again:
            assert order == ["abort", "welcome"]
            await good(again)
            assert order == ["abort", "welcome"]


async def test_guests_take_turns_at_the_threads_of_the_disk():
    owners: set[Any] = set()

    class Slow(DelayDisk):
        async def readv(self, offset: int, buffers: Any) -> None:
            owners.add(_owner.get()[0])
            await super().readv(offset, buffers)

    disk = Slow(RamDisk(1 << 20), read=0.001)
    async with (
        kept(disk) as keeper,
        visitor(keeper, "alice") as alice,
        visitor(keeper, "bob") as bob,
    ):
        for unit in (alice, bob):
            await good(unit)
    assert owners == {"alice", "bob"}
