"""Attaching a machine for Python guests to a server, as the VMM it is.

All three event-flag tiers can be had, so this is also an example of what a VMM with a user-space
SynIC has to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from uuid import UUID

import trio

from vmbus.attach.client.attachment import Attachment
from vmbus.attach.client.delegate import Done, Region
from vmbus.attach.client.synic import AttachedSynic
from vmbus.attach.protocol.limits import ALL_FEATURES, Feature
from vmbus.partition.soft_machine import SoftMachine

_log = logging.getLogger("vmbus.machine")


class MachineDelegate:
    """Does for the server what a VMM does: messages, flags and ports of one machine.

    Args:
        machine: The machine.
    """

    def __init__(self, machine: SoftMachine) -> None:
        self.machine = machine
        self.synic = AttachedSynic(machine.synic)
        self.logged: list[str] = []
        """What the server said about the guest; the last 100 lines."""
        self.over = trio.Event()
        """Set when the connection has ended."""
        self.reason = ""
        machine.synic.slot_free = self.synic.queue.retry

    def deliver_message(
        self, vp: int, sint: int, message_type: int, payload: bytes, done: Done
    ) -> None:
        """See :meth:`vmbus.attach.client.Delegate.deliver_message`."""
        self.synic.deliver(vp, sint, message_type, payload, done)

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.set_flag`."""
        self.machine.synic.set_flag(vp, sint, flag)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """See the protocol; a SynIC in this process asks the attachment, not the kernel."""

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """See :meth:`event_port_added`."""

    def call_fd(self, port: int, vp: int, sint: int, flag: int, fd: int | None) -> bool:
        """See :meth:`vmbus.attach.client.Delegate.call_fd`: the attachment may watch it."""
        return False

    def log(self, text: str) -> None:
        """See :meth:`vmbus.attach.client.Delegate.log`."""
        _log.info("server: %s", text)
        self.logged = [*self.logged[-99:], text]

    def closed(self, reason: str) -> None:
        """See :meth:`vmbus.attach.client.Delegate.closed`."""
        self.reason = reason
        self.machine.in_trio(self.over.set)


@contextlib.asynccontextmanager
async def attach_machine(
    machine: SoftMachine,
    target: str | int,
    *,
    name: str = "guest",
    vm_id: UUID | None = None,
    features: Feature = ALL_FEATURES,
    mode: str | None = None,
    orderly: bool = True,
) -> AsyncIterator[tuple[Attachment, MachineDelegate]]:
    """Attach a machine to a ``vmbus-user`` server for the length of the block.

    Args:
        machine: Whose memory and SynIC the server gets to use.
        target: Socket path, or a connected descriptor.
        name: For the server's logs and listings.
        vm_id: Identity of the VM.
        features: ``DIRECT`` lets the server set event flags itself (tier T2), ``CALL_FD`` gives
            it an eventfd per channel (T1); without both every flag is a message (T0).
        mode: ``seqpacket``, ``stream`` or None.
        orderly: Say goodbye at the end; False vanishes, as a crash would.

    Raises:
        AttachError: No server, or it refused.
    """
    delegate = MachineDelegate(machine)
    attachment = await trio.to_thread.run_sync(
        lambda: Attachment.connect(
            target, delegate, name=name, max_vps=machine.vp_count, features=features, mode=mode
        )
    )
    direct = bool(attachment.features & Feature.DIRECT)
    machine.flags_are_shared = direct
    kicks: list[int] = []
    try:
        async with trio.open_nursery() as nursery:
            delegate.synic.attach(attachment)
            if direct:
                kicks += [_eventfd() for _ in range(machine.vp_count)]
            await trio.to_thread.run_sync(_introduce, attachment, machine, vm_id, kicks)
            if direct:
                for vp, kick in enumerate(kicks):
                    nursery.start_soon(_kicked, machine, vp, kick)
                machine.msr_written = delegate.synic.register_written
            reading = trio.CancelScope()
            stopped = trio.Event()
            nursery.start_soon(_process, attachment, reading, stopped)
            yield attachment, delegate
            if orderly and not delegate.over.is_set():
                # goodbye() reads the answer and closes the socket, in a thread of its own.
                reading.cancel()
                await stopped.wait()
                await trio.to_thread.run_sync(attachment.goodbye)
            nursery.cancel_scope.cancel()
    finally:
        machine.msr_written = None
        attachment.close()
        for kick in kicks:
            os.close(kick)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _introduce(
    attachment: Attachment, machine: SoftMachine, vm_id: UUID | None, kicks: list[int]
) -> None:
    """Tell the server all about the machine. Blocks."""
    attachment.vm_info(machine.vp_count, vm_id=vm_id)
    attachment.set_memory_table(
        [
            Region(region.gpa, region.size, fd)
            for region, fd in zip(machine.regions, machine.fds, strict=True)
        ]
    )
    for vp, kick in enumerate(kicks):
        attachment.set_sint_fd(vp, kick)


async def _kicked(machine: SoftMachine, vp: int, kick: int) -> None:
    """Turn the server's kicks into the interrupt that SINT 2 is programmed for."""
    while True:
        await trio.lowlevel.wait_readable(kick)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(kick)
        vector = machine.synic.registers.vps[vp].vector(2)
        if vector is not None:
            machine.interrupt(vp, vector)


async def _process(attachment: Attachment, reading: trio.CancelScope, stopped: trio.Event) -> None:
    """Handle what the server sends until the connection is over, or ``reading`` is cancelled."""
    with reading:
        while True:
            descriptor = attachment.fileno()
            if descriptor < 0:
                break
            await trio.lowlevel.wait_readable(descriptor)
            if not attachment.process():
                break
    stopped.set()
