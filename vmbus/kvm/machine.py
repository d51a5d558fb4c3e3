"""The machine: memory, serial port, attachment, and one life after the other."""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Callable
from typing import Final
from uuid import UUID

from vmbus.attach.client import Region
from vmbus.attach.client.connect import Target
from vmbus.attach.protocol.limits import ALL_FEATURES, Feature, GoodbyeReason
from vmbus.errors import AttachError, ConfigError
from vmbus.kvm.acpi import SCI_IRQ, SERIAL_IRQ
from vmbus.kvm.bzimage import EntryState
from vmbus.kvm.chipset import Chipset
from vmbus.kvm.life import Life, SynicMode
from vmbus.kvm.link import ServerLink
from vmbus.kvm.outcome import End, Outcome
from vmbus.kvm.power import Request
from vmbus.kvm.serial import Uart
from vmbus.kvm.vcpu import ignore_kick_signal
from vmbus.memory import PAGE_SIZE, GuestMemory, create_memfd

_log = logging.getLogger("vmbus.kvm")

LOW_MEMORY_LIMIT: Final = 3 << 30
"""Memory below 4 GiB ends here at the latest; the rest of the 4 GiB is for devices."""
FOUR_GIB: Final = 1 << 32
MIN_MEMORY: Final = 2 << 20

Loader = Callable[[GuestMemory], EntryState]
"""Puts what the guest starts with into its memory, for each life; returns how it starts."""


def ram_regions(size: int) -> list[tuple[int, int]]:
    """Return ``(gpa, bytes)`` of the pieces of memory of a machine.

    Raises:
        ConfigError: Too little, or not whole pages.
    """
    if size < MIN_MEMORY or size % PAGE_SIZE:
        raise ConfigError(
            f"memory of {size} bytes: whole pages are needed, and {MIN_MEMORY >> 20}M at least"
        )
    low = min(size, LOW_MEMORY_LIMIT)
    return [(0, low)] + ([(FOUR_GIB, size - low)] if size > low else [])


class Machine:
    """A machine, switched off. Its methods are for the main thread unless they say otherwise.

    Args:
        memory_size: Bytes.
        vp_count: Processors.
        load: Called before each life.
        transmit: Takes what the guest writes to its serial port; see
            :class:`vmbus.kvm.serial.Uart`.
        drained: See :class:`vmbus.kvm.serial.Uart`.
        panicked: See :class:`vmbus.kvm.life.Life`.
        mode: Who has the SynIC.
        kvm: KVM's device.

    Raises:
        ConfigError: The numbers are impossible.
        OSError: No memory.
    """

    def __init__(
        self,
        memory_size: int,
        vp_count: int,
        load: Loader,
        transmit: Callable[[bytes], None],
        *,
        drained: Callable[[], None] | None = None,
        panicked: Callable[[str], None] | None = None,
        mode: SynicMode = SynicMode.AUTO,
        kvm: str = "/dev/kvm",
    ) -> None:
        self.vp_count = vp_count
        self.resets = 0
        """How many times the guest has started again."""
        self._load = load
        self._panicked = panicked
        self._mode = mode
        self._kvm = kvm
        self._ends: queue.SimpleQueue[End] = queue.SimpleQueue()
        self._life: Life | None = None
        self.uart = Uart(transmit, lambda level: self._set_line(SERIAL_IRQ, level), drained=drained)
        self.chipset = Chipset(
            self.uart, self._requested, lambda level: self._set_line(SCI_IRQ, level)
        )
        self._link = ServerLink(self._lost)
        self.memory = GuestMemory()
        self._regions: list[Region] = []
        try:
            for gpa, size in ram_regions(memory_size):
                fd = create_memfd("vmbus-boot", size)
                self._regions.append(Region(gpa, size, fd))
                self.memory.add_region(gpa, size, fd)
        except BaseException:
            self.close()
            raise

    def run(
        self,
        target: Target,
        *,
        name: str = "guest",
        vm_id: UUID | None = None,
        features: Feature = ALL_FEATURES,
        timeout: float = 10.0,
    ) -> End:
        """Attach to a server and run the guest until it ends; resets are not the end.

        Args:
            target: Socket path, or a connected descriptor, which changes owner.
            name: For the server's logs and listings.
            vm_id: Identity of the VM.
            features: What to offer to the server.
            timeout: Seconds for the server to answer.

        Raises:
            ConfigError: KVM, the kernel or the machine do not fit together.
            AttachError: No server, or it refused.
            OSError: KVM would not do it.
        """
        ignore_kick_signal()
        self._link.connect(
            target, self._regions, self.vp_count,
            name=name, vm_id=vm_id, features=features, timeout=timeout,
        )  # fmt: skip
        end = End(Outcome.FAILURE)
        try:
            while True:
                end = self._live()
                if end.outcome is not Outcome.RESET:
                    return end
                self.resets += 1
                _log.info("the guest starts again")
        finally:
            failed = end.outcome in {Outcome.FAILURE, Outcome.TRIPLE_FAULT}
            self._link.goodbye(GoodbyeReason.FAILURE if failed else GoodbyeReason.SHUTDOWN)

    def _live(self) -> End:
        """Live one life."""
        life = Life(
            self.memory, self.vp_count, self.chipset.bus, self._ends.put,
            panicked=self._panicked, mode=self._mode, path=self._kvm,
        )  # fmt: skip
        _log.info("the SynIC is the %s's", life.synic.name)
        try:
            self.chipset.reset()
            entry = self._load(self.memory)
            self._life = life
            self._link.begin(life.synic)
            life.start(entry)
            end = self._ends.get()
            life.stop()
            self.uart.flush()
            if end.outcome is Outcome.RESET:
                try:
                    self._link.reset()
                except AttachError as error:
                    return End(Outcome.FAILURE, f"the server cannot reset the guest: {error}")
            return end
        finally:
            self._life = None
            self._link.finish()
            life.close()

    def end(self, end: End) -> None:
        """End the guest's life from outside. Any thread; cannot block."""
        life = self._life
        if life is not None:
            life.ended(end)
        else:
            self._ends.put(end)

    def _lost(self, reason: str) -> None:
        self.end(End(Outcome.FAILURE, f"the server is gone: {reason}"))

    def _requested(self, request: Request, value: int) -> None:
        match request:
            case Request.POWER_OFF:
                self.end(End(Outcome.POWER_OFF))
            case Request.RESET:
                self.end(End(Outcome.RESET))
            case Request.DEBUG_EXIT:
                outcome = Outcome.FAILURE if value else Outcome.POWER_OFF
                self.end(End(outcome, f"debug exit with {value:#x}"))

    def _set_line(self, gsi: int, level: bool) -> None:
        life = self._life
        if life is not None:
            life.vm.set_line(gsi, int(level))

    def close(self) -> None:
        """Give the memory back; the machine must not be running. Idempotent."""
        self._link.close()
        self.memory.close()
        while self._regions:
            os.close(self._regions.pop().fd)
