"""Layer 3: a machine without processors, for guests written in Python.

:class:`SoftMachine` is RAM in memfds and the SynIC model: all that a guest's
:class:`~vmbus.guest.machine.Machine` has to be. It meets a bus in one of two ways:

* in the same process, through a :class:`vmbus.loopback.LoopbackTransport` on its ``synic``;
* as a VMM of its own, attached to a server over a ``vmbus-user`` socket, through
  :func:`attach_machine`. All three event-flag tiers can be had, so this is also an example of
  what a VMM with a user-space SynIC has to do.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from uuid import UUID

import trio

from vmbus.attach.client import Attachment
from vmbus.attach.delegate import Done, Region as AttachRegion
from vmbus.attach.limits import ALL_FEATURES, Feature
from vmbus.errors import AttachError, GuestProtocolError
from vmbus.guest.machine import Interrupt, Region
from vmbus.memory import GuestMemory
from vmbus.memory_file import create_memfd
from vmbus.synic import Delivery, Features, Synic
from vmbus.synic_queue import MessageQueue
from vmbus.wire.synic import HvStatus, Msr

_log = logging.getLogger("vmbus.machine")

HYPERVISOR_PRESENT = 1 << 31
"""ECX of CPUID leaf 1."""
SYNIC_REGISTERS = frozenset({Msr.SCONTROL, Msr.SIMP, Msr.SIEFP, Msr.SINT2})
"""What the direct event-flag tier has to know before the guest goes on."""


class SoftMachine:
    """RAM, a SynIC and interrupts; a :class:`vmbus.guest.machine.Machine`.

    Args:
        regions: ``(gpa, size)`` of each piece of RAM, in bytes, page aligned.
        vp_count: Virtual processors.
        features: Which optional MSRs exist.
    """

    def __init__(
        self,
        regions: Sequence[tuple[int, int]] = ((0, 32 << 20),),
        *,
        vp_count: int = 1,
        features: Features | None = None,
    ) -> None:
        self.vp_count = vp_count
        self.regions = [Region(gpa, size) for gpa, size in regions]
        self.memory = GuestMemory()
        self.flags_are_shared = False
        """True once another process sets event flags itself; see :func:`attach_machine`."""
        self.fds: list[int] = []
        """A memfd for each region, owned by the machine."""
        for region in self.regions:
            fd = create_memfd("vmbus-guest", region.size)
            self.fds.append(fd)
            self.memory.add_region(region.gpa, region.size, fd)
        # Firmware insists on timers; no guest in Python waits for one.
        features = features or Features(reference_time=True, timers=True)
        self.synic = Synic(
            self.memory,
            vp_count,
            self.interrupt,
            features=features,
            clock=_reference_time if features.reference_time else None,
        )
        self.msr_written: Callable[[int, int], None] | None = None
        """Called with ``(vp, index)`` after each MSR write, before the guest goes on."""
        self._leaves = {1: (0, 0, HYPERVISOR_PRESENT, 0), **self.synic.cpuid_leaves()}
        self._pending: set[Interrupt] = set()
        self._arrived = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()

    def in_trio(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the machine's trio thread: now, or soon. Cannot block."""
        if threading.get_ident() == self._thread:
            function()
        else:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function)

    def interrupt(self, vp: int, vector: int) -> None:
        """Make an interrupt pending. Cannot block; may be called in any thread."""
        self.in_trio(lambda: self._interrupt(vp, vector))

    def _interrupt(self, vp: int, vector: int) -> None:
        self._pending.add(Interrupt(vp, vector))
        self._arrived.set()

    def view(self, gpa: int, length: int) -> memoryview:
        """See :meth:`vmbus.guest.machine.Machine.view`."""
        try:
            (view,) = self.memory.views(gpa, length)
        except GuestProtocolError as error:
            raise ValueError(str(error)) from error
        return view

    def cpuid(self, leaf: int) -> tuple[int, int, int, int]:
        """See :meth:`vmbus.guest.machine.Machine.cpuid`."""
        return self._leaves.get(leaf, (0, 0, 0, 0))

    def read_msr(self, vp: int, index: int) -> int:
        """See :meth:`vmbus.guest.machine.Machine.read_msr`."""
        try:
            return self.synic.read_msr(vp, index)
        except GuestProtocolError as error:
            raise ValueError(str(error)) from error

    def write_msr(self, vp: int, index: int, value: int) -> None:
        """See :meth:`vmbus.guest.machine.Machine.write_msr`."""
        try:
            self.synic.write_msr(vp, index, value)
        except GuestProtocolError as error:
            raise ValueError(str(error)) from error
        if self.msr_written is not None:
            self.msr_written(vp, index)

    async def hypercall(self, vp: int, control: int, rdx: int, r8: int) -> int:
        """See :meth:`vmbus.guest.machine.Machine.hypercall`."""
        return self.synic.hypercall(vp, control, rdx, r8)

    async def wait_interrupt(self) -> set[Interrupt]:
        """See :meth:`vmbus.guest.machine.Machine.wait_interrupt`."""
        await trio.lowlevel.checkpoint()
        while not self._pending:
            self._arrived = trio.Event()
            await self._arrived.wait()
        pending, self._pending = self._pending, set()
        return pending

    def reset(self) -> None:
        """Put the SynIC into the state after power-on; RAM keeps its contents. Cannot block."""
        self.synic.reset()
        self._pending.clear()

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self.memory.close()
        while self.fds:
            os.close(self.fds.pop())


class MachineDelegate:
    """Does for the server what a VMM does: messages, flags and ports of one machine.

    Args:
        machine: The machine.
    """

    def __init__(self, machine: SoftMachine) -> None:
        self.machine = machine
        self.queue = MessageQueue(machine.synic)
        self.logged: list[str] = []
        """What the server said about the guest; the last 100 lines."""
        self.over = trio.Event()
        """Set when the connection has ended."""
        self.reason = ""
        machine.synic.slot_free = self.queue.retry

    def deliver_message(
        self, vp: int, sint: int, message_type: int, payload: bytes, done: Done
    ) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.deliver_message`."""

        def delivered(outcome: Delivery) -> None:
            done(0 if outcome is Delivery.DELIVERED else errno.ENXIO)

        self.queue.put(vp, sint, message_type, payload, delivered)

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.set_flag`."""
        self.machine.synic.set_flag(vp, sint, flag)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """See the protocol; a SynIC in this process asks the attachment, not the kernel."""

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """See :meth:`event_port_added`."""

    def call_fd(self, port: int, vp: int, sint: int, flag: int, fd: int | None) -> bool:
        """See :meth:`vmbus.attach.delegate.Delegate.call_fd`: the attachment may watch it."""
        return False

    def log(self, text: str) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.log`."""
        _log.info("server: %s", text)
        self.logged = [*self.logged[-99:], text]

    def closed(self, reason: str) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.closed`."""
        self.reason = reason
        self.machine.in_trio(self.over.set)


class _AttachedPorts:
    """Sends the SynIC's hypercalls through an attachment."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """See :meth:`vmbus.synic.SynicPorts.post_message`."""
        return HvStatus(self._attachment.post_message(connection_id, message_type, vp, payload))

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """See :meth:`vmbus.synic.SynicPorts.signal_event`."""
        return HvStatus(self._attachment.signal_event(connection_id, flag))


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
            machine.synic.ports = _AttachedPorts(attachment)
            if direct:
                kicks += [_eventfd() for _ in range(machine.vp_count)]
            await trio.to_thread.run_sync(_introduce, attachment, machine, vm_id, kicks)
            if direct:
                for vp, kick in enumerate(kicks):
                    nursery.start_soon(_kicked, machine, vp, kick)
                machine.msr_written = lambda vp, index: _tell(attachment, machine, vp, index)
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


def _reference_time() -> int:
    return time.monotonic_ns() // 100


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _introduce(
    attachment: Attachment, machine: SoftMachine, vm_id: UUID | None, kicks: list[int]
) -> None:
    """Tell the server all about the machine. Blocks."""
    attachment.vm_info(machine.vp_count, vm_id=vm_id)
    attachment.set_memory_table(
        [
            AttachRegion(region.gpa, region.size, fd)
            for region, fd in zip(machine.regions, machine.fds, strict=True)
        ]
    )
    for vp, kick in enumerate(kicks):
        attachment.set_sint_fd(vp, kick)


def _tell(attachment: Attachment, machine: SoftMachine, vp: int, index: int) -> None:
    if index in SYNIC_REGISTERS:
        read = machine.synic.read_msr
        with contextlib.suppress(AttachError):
            attachment.synic_state(
                vp,
                read(vp, Msr.SCONTROL),
                read(vp, Msr.SIMP),
                read(vp, Msr.SIEFP),
                read(vp, Msr.SINT2),
            )


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
