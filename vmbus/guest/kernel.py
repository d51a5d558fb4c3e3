"""The guest as a whole: boots a personality on a machine and takes its interrupts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import trio

from vmbus.errors import leaves
from vmbus.guest.channel import GuestChannel
from vmbus.guest.connection import Connection
from vmbus.guest.machine import GuestPanic, Machine
from vmbus.guest.personality import Masking, Personality
from vmbus.guest.processor import Processors
from vmbus.guest.ram import Ram

_POLL_SECONDS = 0.001


class Guest:
    """A running guest; made by :func:`boot`."""

    def __init__(
        self, machine: Machine, personality: Personality, nursery: trio.Nursery, *, seed: int
    ) -> None:
        self.machine = machine
        self.personality = personality
        self.ram = Ram(machine, seed=seed)
        self.processors = Processors(machine, personality, self.ram, self.panic)
        self.start_soon = nursery.start_soon
        """Starts a task that lives as long as the guest; what it raises crashes the guest."""
        self.connection = Connection(
            personality, self.ram, self.processors, self.panic, self.start_soon
        )

    def __repr__(self) -> str:
        return f"<Guest {self.personality}, VMBus {self.connection.version}>"

    def panic(self, reason: str) -> NoReturn:
        """Crash the guest."""
        raise GuestPanic(self.personality.name, reason)

    def check_memory(self) -> None:
        """Look for writes into memory that the host had given back. Cannot block.

        Raises:
            GuestPanic: There were some: with a real kernel this is somebody else's memory by now.
        """
        pages = self.ram.dirty_poison()
        if pages:
            self.panic(f"memory: the host has written to pages {pages} after giving them back")

    async def _interrupts(self) -> None:
        """Take interrupts until cancelled: first messages, then event flags."""
        machine, processors = self.machine, self.processors
        expected = self.personality.vector
        while True:
            for vp, vector in sorted(await machine.wait_interrupt()):
                if vector == expected:
                    self._messages(vp)
                    await self._flags(vp)
                elif vector != expected + 1 or vp not in processors.vps:
                    self.panic(f"interrupt {vector:#x} on VP {vp}: SINT 2 is {expected:#x}")

    def _messages(self, vp: int) -> None:
        while (payload := self.processors.take_message(vp)) is not None:
            if vp:
                self.panic(f"control message on VP {vp} instead of 0")
            self.connection.message(payload)

    async def _flags(self, vp: int) -> None:
        flags = self.processors.take_flags(vp)
        if not flags:
            return
        channels = self.connection.announced(vp, flags)
        if self.machine.flags_are_shared:
            words = {flag // 32 for flag in flags}
            channels += [
                channel
                for channel in self.connection.channels.values()
                if channel.relid // 32 in words and channel.has_packets and channel not in channels
            ]
        for channel in channels:
            await self._serve(channel)

    async def _serve(self, channel: GuestChannel) -> None:
        if channel.interrupted():
            await channel.signal()

    async def _poll(self) -> None:
        """Poll all channels, for drivers that keep interrupts masked."""
        while True:
            await trio.sleep(_POLL_SECONDS)
            for channel in list(self.connection.channels.values()):
                if channel.has_packets:
                    await self._serve(channel)


@asynccontextmanager
async def boot(
    machine: Machine, personality: Personality, *, seed: int = 0
) -> AsyncIterator[Guest]:
    """Boot a guest: check CPUID, program the SynIC, take interrupts. It knows no bus yet.

    On leaving, the SynIC is taken down but the bus is not left: that is
    :meth:`Connection.unload`, and a guest that crashes does without it, too.

    Args:
        machine: The hardware; free for another boot afterwards.
        personality: Which drivers.
        seed: Makes the choice of scattered pages repeatable.

    Raises:
        GuestPanic: The machine or the host broke a rule that these drivers rely on; raised by
            itself and not in a group, with what failed in consequence as its cause.
    """
    try:
        async with trio.open_nursery() as nursery:
            guest = Guest(machine, personality, nursery, seed=seed)
            guest.processors.start()
            nursery.start_soon(guest._interrupts)
            if personality.masking is Masking.ALWAYS:
                nursery.start_soon(guest._poll)
            try:
                yield guest
            finally:
                guest.processors.stop()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        panics, others = group.split(GuestPanic)
        if panics is None or not isinstance(others, Exception | None):
            raise
        raise leaves(panics)[0] from others
