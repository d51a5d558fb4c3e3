"""Flushes of one disk that wait together are one flush."""

from __future__ import annotations

import errno
import threading
from functools import partial

import pytest
import trio
import trio.testing

from storvsp.disk import MediumError
from storvsp.disks import linux
from storvsp.disks.durability import WAKE_AT_ONCE, Durability
from storvsp.disks.linux import SyncError
from storvsp.disks.raw import RawDisk
from tests.support.patience import PATIENCE, until
from tests.support.turns import Work, watched
from vmbus.workers import AbandonedError


class Syncs:
    """Flushes that wait to be let through."""

    def __init__(self) -> None:
        self.begun = 0
        self.gates = [trio.Event() for _ in range(9)]
        self.errors: dict[int, Exception] = {}

    async def make(self) -> None:
        number = self.begun
        self.begun += 1
        await self.gates[number].wait()
        if number in self.errors:
            raise self.errors[number]


async def test_those_who_wait_share_the_next_flush_and_not_the_one_that_has_begun():
    """What is under way may have begun before the data of a later one was written."""
    durability, syncs = Durability(cached=True), Syncs()
    ended: list[str] = []

    async def flush(name: str) -> None:
        await durability.flush(syncs.make)
        ended.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush, "first")
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(50):
            nursery.start_soon(flush, "later")
        await trio.testing.wait_all_tasks_blocked()
        assert syncs.begun == 1
        syncs.gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["first"]
        assert syncs.begun == 2
        nursery.start_soon(flush, "last")
        await trio.testing.wait_all_tasks_blocked()
        syncs.gates[1].set()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["first"] + ["later"] * 50
        assert syncs.begun == 3
        syncs.gates[2].set()
    assert ended[-1] == "last"


@pytest.mark.parametrize("cached", [True, False])
async def test_a_failed_flush_has_failed_for_all_who_shared_it(cached):
    durability, syncs = Durability(cached=cached), Syncs()
    syncs.errors[1] = SyncError(errno.EIO, "Input/output error")
    outcomes: list[object] = []

    async def flush() -> None:
        try:
            await durability.flush(syncs.make)
            outcomes.append(None)
        except (SyncError, MediumError) as error:
            outcomes.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            nursery.start_soon(flush)
        await trio.testing.wait_all_tasks_blocked()
        for gate in syncs.gates:
            gate.set()
    assert outcomes[0] is None
    assert [type(each) for each in outcomes[1:]] == [SyncError] * 5
    assert {str(each) for each in outcomes[1:]} == {str(syncs.errors[1])}
    assert len(set(map(id, outcomes[1:]))) == 5, "each has a traceback of its own"
    assert syncs.begun == 2
    if cached:
        with pytest.raises(MediumError, match="has to be opened anew"):
            await durability.flush(syncs.make)


async def test_another_one_makes_the_flush_if_the_first_to_ask_is_cancelled():
    durability, syncs = Durability(cached=True), Syncs()
    ended: list[str] = []

    async def flush(scope: trio.CancelScope, name: str) -> None:
        with scope:
            await durability.flush(syncs.make)
            ended.append(name)

    scopes = {name: trio.CancelScope() for name in ("first", "second", "third")}
    async with trio.open_nursery() as nursery:
        for name, scope in scopes.items():
            nursery.start_soon(flush, scope, name)
            await trio.testing.wait_all_tasks_blocked()
        scopes["first"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert syncs.begun == 2, "one of the others goes on"
        for gate in syncs.gates:
            gate.set()
    assert sorted(ended) == ["second", "third"]
    assert syncs.begun == 2, "and it is enough for both"


async def test_a_flush_that_does_not_come_back_has_failed():
    durability = Durability(cached=True)

    async def hang() -> None:
        raise AbandonedError

    with pytest.raises(AbandonedError):
        await durability.flush(hang)
    with pytest.raises(MediumError, match="not come back"):
        durability.check()


async def test_flushes_of_an_image_are_one_system_call(tmp_path, monkeypatch):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk = await RawDisk.open(image)
    go = threading.Event()
    calls: list[int] = []

    def sync(fd: int) -> None:
        calls.append(fd)
        assert go.wait(PATIENCE)

    monkeypatch.setattr(linux, "sync", sync)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.flush)
        await until(lambda: calls)
        for _ in range(40):
            nursery.start_soon(disk.flush)
        nursery.start_soon(partial(disk.writev, 0, [memoryview(bytes(512))], fua=True))
        await trio.testing.wait_all_tasks_blocked(0.01)
        go.set()
    assert len(calls) == 2
    await disk.aclose()


async def test_all_who_shared_a_flush_that_does_not_come_back_hear_of_it():
    durability, syncs = Durability(cached=True), Syncs()
    syncs.errors[1] = AbandonedError()
    heard: list[type[Exception]] = []

    async def flush() -> None:
        try:
            await durability.flush(syncs.make)
        except Exception as error:
            heard.append(type(error))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked()
        for gate in syncs.gates:
            gate.set()
    assert heard == [AbandonedError] * 3


async def test_thousands_that_share_a_flush_do_not_all_go_on_in_one_turn_of_the_loop():
    durability, syncs, work = Durability(cached=True), Syncs(), Work()
    order: list[str] = []

    async def flush(name: str) -> None:
        await durability.flush(syncs.make)
        work.done()
        order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush, "first")
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(10 * WAKE_AT_ONCE):
            nursery.start_soon(flush, "shared")
        await trio.testing.wait_all_tasks_blocked()
        syncs.gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(flush, "next")
        await trio.testing.wait_all_tasks_blocked()
        syncs.gates[2].set()
        with watched(work):
            syncs.gates[1].set()
            await trio.testing.wait_all_tasks_blocked()
    assert work.total == 10 * WAKE_AT_ONCE + 2
    assert work.most_in_turn <= WAKE_AT_ONCE + 2
    assert order.index("next") < 3 * WAKE_AT_ONCE, "the next flush does not wait for all of them"
