"""Guests attached to a server in another process, over every tier and both kinds of sockets."""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from storvsp.guest import attach, scan
from tests.support.patience import PATIENCE, until
from tests.support.server_process import server_process
from tests.support.worlds import ALL, DISK_SIZE, TIERS, exercise, whole_life
from vmbus.attach.client import operator
from vmbus.attach.client.machine import MachineDelegate, attach_machine
from vmbus.attach.protocol.messages import RefusedError
from vmbus.guest import LINUX_6_1, PERSONALITIES, Guest, boot
from vmbus.partition.soft_machine import SoftMachine


@pytest.fixture(scope="module", params=["seqpacket", "stream"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("server") / "socket"
    with server_process(path, request.param):
        yield path, request.param


@contextlib.asynccontextmanager
async def attached(
    server: tuple[Path, str], tier: str, *, vps: int = 4, **options: Any
) -> AsyncIterator[tuple[SoftMachine, Any, MachineDelegate]]:
    path, mode = server
    machine = SoftMachine(((0, 64 << 20),), vp_count=vps)
    try:
        with trio.fail_after(PATIENCE):
            async with attach_machine(
                machine, str(path), features=TIERS[tier], mode=mode, **options
            ) as (attachment, delegate):
                yield machine, attachment, delegate
    finally:
        machine.close()


def check_server(server: tuple[Path, str], guests: list[str]) -> dict[str, Any]:
    status = operator.query(str(server[0]), "guests")
    assert [guest["name"] for guest in status["guests"]] == guests
    return status


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ALL)
async def test_a_whole_life_over_a_socket(server, name, tier):
    async with attached(server, tier, name=name) as (machine, _, delegate):
        async with boot(machine, PERSONALITIES[name]) as guest:
            await whole_life(guest)
        assert delegate.logged == []
    if tier == "T2":
        assert machine.flags_are_shared


@pytest.mark.parametrize("tier", TIERS)
async def test_a_guest_is_killed_in_flight_and_the_next_one_is_served_unharmed(server, tier):
    vm_id = uuid.uuid4()
    with trio.CancelScope() as life:
        async with (
            attached(server, tier, vm_id=vm_id, orderly=False) as (machine, attachment, _),
            boot(machine, LINUX_6_1) as guest,
            trio.open_nursery() as nursery,
        ):
            offers = await guest.connection.connect()
            adapter = await attach(guest, offers[0], sub_channels=3, contiguous=False)
            disk = (await scan(adapter))[0]

            @nursery.start_soon
            async def busy() -> None:
                while True:
                    await exercise(adapter, disk, tasks=64)

            await until(lambda: all(channel.outstanding for channel in adapter.channels))
            attachment.close()
            life.cancel()
    async with attached(server, tier) as (machine, _, delegate), boot(machine, LINUX_6_1) as guest:
        await whole_life(guest)
        assert delegate.logged == []


async def test_two_guests_do_not_meet_and_a_name_is_taken_once(server):
    async def work(guest: Guest, byte: int) -> None:
        offers = await guest.connection.connect()
        adapter = await attach(guest, offers[0], sub_channels=1, contiguous=False)
        disk = (await scan(adapter))[0]
        await disk.write(0, bytes([byte]) * 4096)
        await exercise(adapter, disk)
        await disk.write(100, bytes([byte]) * 4096)
        assert await disk.read(100, 8) == bytes([byte]) * 4096
        await guest.connection.unload()

    async with (
        attached(server, "T1", name="twin") as (first, _, _),
        attached(server, "T2", name="twin-2") as (second, _, _),
        boot(first, LINUX_6_1) as one,
        boot(second, PERSONALITIES["freebsd"]) as two,
        trio.open_nursery() as nursery,
    ):
        with pytest.raises(RefusedError, match="a guest called 'twin' is attached") as refused:
            async with attached(server, "T2", name="twin"):
                raise AssertionError("it was let in")
        assert refused.value.errno == errno.EBUSY
        await trio.to_thread.run_sync(check_server, server, ["twin", "twin-2"])
        nursery.start_soon(work, one, 1)
        nursery.start_soon(work, two, 2)


@pytest.mark.parametrize("tier", TIERS)
async def test_pauses_over_a_socket_lose_nothing(server, tier):
    async with (
        attached(server, tier) as (machine, attachment, _),
        boot(machine, LINUX_6_1) as guest,
    ):
        offers = await guest.connection.connect()
        adapter = await attach(guest, offers[0], sub_channels=2, contiguous=False)
        disk = (await scan(adapter))[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exercise, adapter, disk)
            for _ in range(5):
                await trio.to_thread.run_sync(attachment.pause)
                await trio.to_thread.run_sync(attachment.resume)
        await adapter.close()
        await guest.connection.unload()
        guest.check_memory()


@pytest.mark.parametrize("tier", TIERS)
async def test_a_reset_over_a_socket_begins_a_new_life(server, tier):
    async with attached(server, tier) as (machine, attachment, _):
        for turn in range(3):
            with trio.CancelScope() as power:
                async with boot(machine, LINUX_6_1, seed=turn) as guest:
                    offers = await guest.connection.connect()
                    adapter = await attach(guest, offers[1], contiguous=False)
                    (disk,) = await scan(adapter)
                    assert disk.size == DISK_SIZE
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(exercise, adapter, disk)
                        await trio.sleep(0)
                        power.cancel()
            await trio.to_thread.run_sync(attachment.reset)
            machine.reset()
        async with boot(machine, LINUX_6_1, seed=9) as guest:
            await whole_life(guest)


async def test_an_operator_adds_and_removes_a_disk_of_a_guest_at_work(server):
    def operate(request: dict[str, Any]) -> dict[str, Any]:
        return operator.command(str(server[0]), {"guest": "busy", "index": 0, **request})

    async with (
        attached(server, "T2", name="busy") as (machine, _, _),
        boot(machine, LINUX_6_1) as guest,
    ):
        offers = await guest.connection.connect()
        adapter = await attach(guest, offers[0], contiguous=False)
        disk = (await scan(adapter))[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exercise, adapter, disk)
            answer = await trio.to_thread.run_sync(operate, {"action": "add", "spec": "ram:1M"})
        assert answer == {"address": "0:0:2"}
        await adapter.wait_notifications(1)
        assert [each.size for each in await scan(adapter)] == [DISK_SIZE, DISK_SIZE, 1 << 20]
        await trio.to_thread.run_sync(operate, {"action": "remove", "address": "0:0:2"})
        await adapter.wait_notifications(2)
        assert len(await scan(adapter)) == 2
