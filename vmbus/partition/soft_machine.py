"""A machine without processors, for guests written in Python.

:class:`SoftMachine` is RAM in memfds and the SynIC model: all that a guest's
:class:`~vmbus.guest.machine.Machine` has to be. It meets a bus in one of two ways:

* in the same process, through a :class:`vmbus.partition.loopback.LoopbackTransport` on its
  ``synic``;
* as a VMM of its own, attached to a server over a ``vmbus-user`` socket, through
  :func:`vmbus.attach.client.machine.attach_machine`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence

import trio

from vmbus.errors import GuestProtocolError
from vmbus.guest.machine import Interrupt, Region
from vmbus.memory import GuestMemory, create_memfd
from vmbus.synic.model import Features, Synic

HYPERVISOR_PRESENT = 1 << 31
"""ECX of CPUID leaf 1."""


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
        """True once another process sets event flags itself: attached with the direct tier."""
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


def _reference_time() -> int:
    return time.monotonic_ns() // 100
