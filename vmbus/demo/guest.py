"""One life of a demo's guest: attach, boot, contact, use the devices, leave in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import trio

from vmbus.attach.client.machine import MachineDelegate, attach_machine
from vmbus.demo.half import Half, Options
from vmbus.demo.story import Story
from vmbus.errors import AttachError, VMBusError, leaves
from vmbus.guest import Driver, Guest, GuestPanic, boot
from vmbus.guest.personality import Rescind
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.guids import class_name
from vmbus.wire.messages import OfferChannel

BASE_RAM = 32 << 20
"""Bytes of RAM beside rings and data."""
LEAVING_SECONDS = 2.0
"""A server that takes things away without a word has left by then, or has made a mistake."""


class DemoGuest:
    """A guest of a demo.

    Args:
        options: The common part of the command line.
        halves: What to do with devices, in this order.
        story: Gets the lines; the halves' too.
    """

    def __init__(self, options: Options, halves: Sequence[Half[Any]], story: Story) -> None:
        self.options = options
        self.halves = halves
        self.story = story

    async def run(self) -> bool:
        """Live; whatever goes wrong is told. A checkpoint.

        Returns:
            Whether all went well.
        """
        options = self.options
        ram = -(-(BASE_RAM + sum(half.ram for half in self.halves)) >> 20) << 20
        machine = SoftMachine(((0, ram),), vp_count=options.channels)
        name = options.personality.name
        self.story.emit("start", guest=name, vps=machine.vp_count, ram=ram, pid=os.getpid())
        try:
            await self._attached(machine)
        except* (VMBusError, trio.BrokenResourceError, OSError) as group:
            self.story.problem("guest", leaves(group)[0])
        finally:
            machine.close()
        return not self.story.failed

    async def _attached(self, machine: SoftMachine) -> None:
        async with (
            attach_machine(machine, self.options.socket, name=self.options.name) as (
                attachment,
                delegate,
            ),
            trio.open_nursery() as nursery,
        ):
            features = [feature.name for feature in attachment.features]
            self.story.emit("attached", server=attachment.server_name, features=features)
            nursery.start_soon(_watch, delegate)
            try:
                async with boot(machine, self.options.personality) as guest:
                    await self._booted(guest)
                    guest.check_memory()
            except GuestPanic as panic:
                # A server that stops takes the doorbells away first, and then leaves.
                with trio.move_on_after(LEAVING_SECONDS):
                    await delegate.over.wait()
                if delegate.over.is_set():
                    raise _gone(delegate) from panic
                raise
            nursery.cancel_scope.cancel()

    async def _booted(self, guest: Guest) -> None:
        connection = guest.connection
        connection.on_offer = self._offered
        version = await connection.contact()
        features = [feature.name for feature in connection.features]
        self.story.emit("contact", version=str(version), features=features)
        offers = await connection.request_offers()
        for offer, reason in connection.ignored.values():
            self._offered(offer, ignored=reason)
        drivers = []
        for half in self.halves:
            driver = await half.attach(guest, offers)
            self._opened(driver)
            drivers.append(driver)
        for half, driver in zip(self.halves, drivers, strict=True):
            await half.use(driver)
        await self._leave(guest, drivers)

    def _offered(self, offer: OfferChannel, ignored: str | None = None) -> None:
        self.story.emit(
            "offer",
            relid=offer.relid,
            **{"class": class_name(offer.class_id)},
            instance=str(offer.instance_id),
            subchannel=offer.subchannel_index,
            connection=offer.connection_id,
            monitor=offer.monitor_id if offer.monitor_allocated else None,
            ignored=ignored,
        )

    def _opened(self, driver: Driver) -> None:
        for channel in driver.channels:
            self.story.emit(
                "channel",
                relid=channel.relid,
                subchannel=channel.offer.subchannel_index,
                vp=channel.target_vp,
                ring=driver.ring_pages * PAGE_SIZE,
                gpadl_pages=2 * driver.ring_pages,
            )

    async def _leave(self, guest: Guest, drivers: Sequence[Driver]) -> None:
        """Close what is open, and leave the bus."""
        channels = [channel for driver in drivers for channel in driver.channels]
        interrupts = sum(channel.interrupts for channel in channels)
        signals = sum(channel.signals for channel in channels)
        for driver in reversed(drivers):
            await driver.close()
        if self.options.personality.rescind is Rescind.RELEASE:
            # Sub-channels go with their primary; their relids are to be released before UNLOAD.
            for channel in channels:
                if channel.offer.subchannel_index:
                    await guest.connection.wait_gone(channel.relid)
        await guest.connection.unload()
        self.story.emit("left", interrupts=interrupts, signals=signals)


async def _watch(delegate: MachineDelegate) -> None:
    """Raise when the server is gone: nothing that is in flight would ever come back."""
    await delegate.over.wait()
    raise _gone(delegate)


def _gone(delegate: MachineDelegate) -> AttachError:
    return AttachError(f"the server is gone: {delegate.reason}")
