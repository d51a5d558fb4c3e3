"""Python guests that are attached to a server by its socket, and adapters that they bring up."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from netvsp.guest import NetvscAdapter, attach
from tests.support.nics import plain_frame
from tests.support.patience import LOOK, PATIENCE
from vmbus.attach.client.machine import attach_machine
from vmbus.guest import LINUX_6_1, Guest, boot
from vmbus.partition.soft_machine import SoftMachine

_BUFFER = 1 << 20
_MEMORY = 16 << 20


@contextlib.asynccontextmanager
async def attached_guest(path: str, name: str) -> AsyncIterator[Guest]:
    """A guest that has asked what is on its bus."""
    machine = SoftMachine([(0, _MEMORY)])
    try:
        with trio.fail_after(PATIENCE):
            async with (
                attach_machine(machine, path, name=name),
                boot(machine, LINUX_6_1) as guest,
            ):
                await guest.connection.connect()
                yield guest
    finally:
        machine.close()


async def bring_up(guest: Guest, instance: str) -> NetvscAdapter:
    """Attach the driver to the adapter of an instance GUID, as soon as it is offered."""
    offers = await guest.connection.wait_offers(
        lambda offer: str(offer.instance_id) == instance and not offer.subchannel_index
    )
    adapter = await attach(
        guest, offers[0], sub_channels=0, receive_size=_BUFFER, send_size=_BUFFER
    )
    await adapter.up()
    return adapter


async def cross(sender: NetvscAdapter, receiver: NetvscAdapter) -> None:
    """Send a frame from one adapter to another, again until it has arrived.

    A switch drops what comes before it knows the other's address.
    """
    frame = plain_frame(1000, to=receiver.address, source=sender.address)
    with trio.fail_after(PATIENCE):
        while frame not in [each.data for each in receiver.received]:
            await sender.send(frame)
            await trio.sleep(LOOK)
    receiver.received.clear()
