"""User mode: the VMM has the guest's SynIC, KVM needs to know nothing of Hyper-V.

* The synthetic MSRs exit to the VMM. A kernel without Hyper-V support does not know them; one with
  it would carry them out, so all of them are filtered.
* The hypercall page reads a port: ``in`` from :data:`HYPERCALL_PORT` exits to the VMM, which takes
  the input from the registers and returns the status as the port's value. ``in eax, imm8`` leaves
  all other registers alone and clears the upper half of RAX, as the calling convention wants it.
  User programs of the guest cannot use it: ports are the kernel's.
* Interrupts are messages to the local APICs. The eventfd that the server gets for event flags is
  tied to such a message, whose vector follows SINT 2.

There are no synthetic timers and no reference clock; guests use their local APIC and TSC, whose
frequencies they are told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmbus.attach.client import Done
from vmbus.kvm import api
from vmbus.kvm.synic import CrashCallback, Leaves, SynicBackend
from vmbus.kvm.vcpu import Vcpu
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory
from vmbus.synic import Features
from vmbus.synic.model import cpuid_leaves
from vmbus.wire import synic as wire
from vmbus.wire.synic import HvStatus, Msr

HYPERCALL_PORT = 0xE4
"""Nothing on a PC is at this port."""
HYPERCALL_IN = bytes.fromhex("f30f1efa e5") + bytes([HYPERCALL_PORT]) + bytes.fromhex("c3")
"""ENDBR64; in eax, HYPERCALL_PORT; ret. Linux gives up its indirect-branch tracking if the page
does not begin with ENDBR64."""
APIC_FREQUENCY = 1_000_000_000
"""Hz of KVM's local APIC timer (linux/arch/x86/kvm/lapic.h, APIC_BUS_FREQUENCY)."""
SYNTHETIC_MSRS = api.FilterRange(0x4000_0000, 0x200, api.MSR_FILTER_READ | api.MSR_FILTER_WRITE)


class UserSynic(SynicBackend):
    """See the module. Args as :class:`SynicBackend`.

    Args:
        vm: With interrupt controllers, without processors.
        memory: The guest's.
        vp_count: Processors.
        tsc_frequency: Hz of the guest's TSC.
        invariant_tsc: Whether it never changes its rate.
        crashed: Told when the guest reports its crash.

    Raises:
        ConfigError: KVM cannot do it.
    """

    name = "user"

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        vp_count: int,
        *,
        tsc_frequency: int,
        invariant_tsc: bool,
        crashed: CrashCallback,
    ) -> None:
        self._features = Features(
            tsc_frequency=tsc_frequency,
            apic_frequency=APIC_FREQUENCY,
            invariant_tsc=invariant_tsc,
        )
        super().__init__(
            vm,
            memory,
            vp_count,
            features=self._features,
            hypercall_code=HYPERCALL_IN,
            crashed=crashed,
        )
        self.model.slot_free = self.attached.queue.retry
        vm.intercept_msrs([SYNTHETIC_MSRS])
        self._lines: list[tuple[int, int]] = []
        """By VP: eventfd, owned, and the line it raises."""
        self._vectors: list[int] = [0] * vp_count
        for _ in range(vp_count):
            eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            gsi = vm.new_gsi()
            self._lines.append((eventfd, gsi))
            vm.add_irqfd(gsi, eventfd)

    def leaves(self) -> Leaves:
        """See :meth:`SynicBackend.leaves`."""
        return cpuid_leaves(self._features, self.vp_count)

    def add_processors(self, vcpus: Sequence[Vcpu]) -> None:
        """Nothing: KVM's processors have no part in it."""

    def sint_eventfd(self, vp: int) -> int:
        """See :meth:`SynicBackend.sint_eventfd`."""
        return self._lines[vp][0]

    def interrupt(self, vp: int, vector: int) -> None:
        """See :meth:`SynicBackend.interrupt`."""
        self.vm.send_msi(vp, vector)

    def deliver(self, vp: int, sint: int, message_type: int, payload: bytes, done: Done) -> None:
        """Deliver in any thread: nobody but the VMM writes message slots."""
        self.attached.deliver(vp, sint, message_type, payload, done)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """Nothing: hypercalls come to the attachment, which has the eventfd."""

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """Nothing, as :meth:`event_port_added`."""

    def read_msr(self, vcpu: Vcpu, index: int) -> int:
        """See :meth:`SynicBackend.read_msr`."""
        return self.model.read_msr(vcpu.index, index)

    def write_msr(self, vcpu: Vcpu, index: int, value: int) -> None:
        """See :meth:`SynicBackend.write_msr`."""
        self.model.write_msr(vcpu.index, index, value)
        if index == Msr.SINT2:
            self._aim(vcpu.index, value & wire.SINT_VECTOR)
        self.attached.register_written(vcpu.index, index)

    def synic_written(self, vcpu: Vcpu, msr: int, control: int, siefp: int, simp: int) -> None:
        """Cannot happen: KVM's SynIC is not active."""
        raise AssertionError(f"KVM has a SynIC for VP {vcpu.index}: MSR {msr:#x}")

    def _aim(self, vp: int, vector: int) -> None:
        """Have the server's eventfd raise the vector that SINT 2 has now."""
        if vector >= wire.SINT_FIRST_VECTOR and vector != self._vectors[vp]:
            self._vectors[vp] = vector
            self.vm.route_msi(self._lines[vp][1], vp, vector)

    def hypercall_page_called(self, vcpu: Vcpu) -> int:
        """Carry out the hypercall that the hypercall page makes."""
        if not self.model.hypercall_enabled:
            return HvStatus.INVALID_PARTITION_STATE
        registers = vcpu.registers()
        return self.hypercall(vcpu, registers["rcx"], registers["rdx"], registers["r8"])

    def close(self) -> None:
        """See :meth:`SynicBackend.close`."""
        while self._lines:
            os.close(self._lines.pop()[0])
