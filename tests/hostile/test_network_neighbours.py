"""A guest's frames go on crossing a switch while another guest does its worst to its adapter.

As in ``test_neighbours.py``: a real server with a process per guest and one for the switch. While
the attack is under way, of which it tells, the victims' frames arrive, operators are answered,
and nothing grows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest
import trio

from netvsp.guest import attach
from netvsp.guest.adapter import NetvscAdapter
from tests.hostile.test_neighbours import MIB, ROUNDS, Server, serving
from tests.support.net_attackers import KINDS, network_guest
from tests.support.patience import PATIENCE, SOON
from vmbus.attach.client.machine import attach_machine
from vmbus.guest import LINUX_6_1, boot
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire.guids import CLASS_NIC

pytestmark = pytest.mark.slow

_numbers = itertools.count()
RECEIVE_SIZE = 256 << 10
"""Bytes of the victims' receive buffers: what a neighbour sends them waits nowhere for long."""


@contextlib.asynccontextmanager
async def guest_on(path: str, name: str) -> AsyncIterator[NetvscAdapter]:
    machine = SoftMachine([(0, 32 << 20)])
    try:
        async with attach_machine(machine, path, name=name), boot(machine, LINUX_6_1) as guest:
            offers = await guest.connection.connect()
            (offer,) = [each for each in offers if each.class_id == CLASS_NIC]
            adapter = await attach(guest, offer, sub_channels=0, receive_size=RECEIVE_SIZE)
            await adapter.up()
            yield adapter
    finally:
        machine.close()


async def crosses(one: NetvscAdapter, other: NetvscAdapter) -> None:
    """A frame from one adapter arrives at another one, whatever comes before it.

    It is sent until it does: who is flooded loses frames, as any guest with much else to do.
    """
    body = b"\x88\xb6" + next(_numbers).to_bytes(4, "little") + bytes(50)

    async def send() -> None:
        while True:
            await one.send(other.address + one.address + body)
            await trio.sleep(SOON)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while (await other.receive()).data[12:18] != body[:6]:
            continue
        nursery.cancel_scope.cancel()


async def served(one: NetvscAdapter, other: NetvscAdapter, server: Server) -> None:
    with trio.fail_after(PATIENCE):
        await crosses(one, other)
        await crosses(other, one)
        assert (await server.query())["guests_attached"] >= 2


@pytest.mark.parametrize("what", KINDS)
async def test_frames_cross_beside_a_guest_of_this_kind(what, tmp_path):
    with serving(tmp_path, net="switch:lan") as server:
        async with guest_on(server.path, "a") as one, guest_on(server.path, "b") as other:
            await served(one, other, server)
            descriptors, memory = server.descriptors(), server.memory()
            with network_guest(server.path, "other", what, one.address) as attacker:
                assert attacker.stdout is not None
                for _ in range(ROUNDS):
                    # "ready", and then that it goes on.
                    assert await trio.to_thread.run_sync(attacker.stdout.readline)
                    await served(one, other, server)
                found = await server.guest("other")
                assert found["answers"]
                assert server.memory_of(found["pid"]) < 160 * MIB
                assert attacker.poll() is None
                # Of each worker: a socket and two pipes.
                assert server.descriptors() - descriptors < 3 * 3
                assert server.memory() - memory < 16 * MIB
            await served(one, other, server)
        assert (tmp_path / "log").stat().st_size < MIB
