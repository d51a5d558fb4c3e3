"""Kernel mode: KVM has the guest's SynIC.

KVM keeps the registers, raises the interrupts, and carries out HvSignalEvent by writing the
server's eventfd: on the data path neither processors nor server meet the VMM. What is left is

* messages. HvPostMessage leaves the guest; a message to the guest is written into its slot by the
  processor's own thread, while the processor is stopped: KVM writes slots too, when a synthetic
  timer is used with messages, and does so without locked instructions
  (linux/arch/x86/kvm/hyperv.c, synic_deliver_msg). Guests are offered timers that interrupt
  directly, but nobody can stop them from using the others.
* the end of a message. KVM shows EOM to nobody, but signals the *resample* eventfd of a SINT's
  irqfd when the guest writes EOM or ends the SINT's interrupt. It is looked at only while a
  message waits, because every interrupt of the data path writes it.
* following the registers. KVM exits after writes to SCONTROL, SIEFP and SIMP. Of SINTs it says
  nothing, so writes to them are filtered, and done here on the guest's behalf.
* the end of an interrupt, if the guest writes EOI: an exit, unless the VP assist page saves it, and
  KVM has to look there. KVM can end the interrupt by itself (AutoEOI), but then does without
  APICv and AVIC, which save more where there are any.
* crashes. KVM keeps no address of a text (it clears the bit that offers it), so these MSRs are
  filtered, and those of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vmbus.attach.client import Done
from vmbus.kvm import api
from vmbus.kvm.synic import CrashCallback, Leaves, SynicBackend
from vmbus.kvm.vcpu import Vcpu
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory
from vmbus.synic import Features
from vmbus.synic.model import HYPERCALL_VMCALL, MsrError, cpuid_leaves
from vmbus.wire import synic as wire
from vmbus.wire.synic import (
    CpuidLeaf,
    HypercallCode,
    MiscFeature,
    Msr,
    Privilege,
    Recommendation,
)

_log = logging.getLogger("vmbus.kvm")

CAPABILITIES = (
    api.CAP_HYPERV_SYNIC2,
    api.CAP_HYPERV_EVENTFD,
    api.CAP_IRQFD_RESAMPLE,
    api.CAP_X86_USER_SPACE_MSR,
    api.CAP_X86_MSR_FILTER,
)
"""What it takes; the last two are in Linux 5.10."""
SINT_MSRS = api.FilterRange(Msr.SINT0, wire.SINT_COUNT, api.MSR_FILTER_WRITE)
CRASH_MSRS = api.FilterRange(
    Msr.CRASH_P0,
    Msr.CRASH_CTL - Msr.CRASH_P0 + 1,
    api.MSR_FILTER_READ | api.MSR_FILTER_WRITE,
)
KERNEL_FEATURES = Features(
    reference_time=True,
    timers=True,
    # The values do not matter: these MSRs are KVM's.
    tsc_frequency=1,
    apic_frequency=1,
    invariant_tsc=True,
)
VIRTUAL_APICS = ("kvm_intel/parameters/enable_apicv", "kvm_amd/parameters/avic")


def has_virtual_apic(modules: Path = Path("/sys/module")) -> bool:
    """Whether KVM has the processor take care of interrupts, without exits (APICv, AVIC)."""
    for name in VIRTUAL_APICS:
        with contextlib.suppress(OSError):
            if (modules / name).read_text().strip() in ("Y", "1"):
                return True
    return False


def is_possible(vm: Vm) -> bool:
    """Whether this machine's KVM can do all that is needed."""
    return all(vm.capability(number) > 0 for number in CAPABILITIES)


class _EomWatch:
    """A thread that waits for the end of a message, for those VPs that have another one.

    Args:
        retry: Called with the VP, in the watch's own thread.
    """

    def __init__(self, retry: Callable[[int], None]) -> None:
        self._retry = retry
        self._vps: dict[int, int] = {}
        """Resample eventfd to VP."""
        self._epoll = select.epoll()
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._end, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="eom", daemon=True)
        self._thread.start()

    def add(self, eventfd: int, vp: int) -> None:
        """Know an eventfd, without waiting for it yet."""
        self._vps[eventfd] = vp
        self._epoll.register(eventfd, select.EPOLLONESHOT)

    def arm(self, vp: int) -> None:
        """Call ``retry`` once after the next end of a message; it may have come already.

        Any thread. The eventfd counts, so what came since the last call is not missed, and an
        older one costs no more than a retry in vain.
        """
        for eventfd, owner in tuple(self._vps.items()):
            if owner == vp:
                self._epoll.modify(eventfd, select.EPOLLIN | select.EPOLLONESHOT)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._end:
                    return
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                self._retry(self._vps[fd])

    def close(self) -> None:
        """End the thread."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._end)


class _Line(NamedTuple):
    """How a SINT of a processor is raised, and how its end is heard of."""

    raise_: int
    """Eventfd, owned."""
    resample: int
    """Eventfd, owned."""


class KernelSynic(SynicBackend):
    """See the module.

    Args:
        vm: With interrupt controllers, without processors.
        memory: The guest's.
        vp_count: Processors.
        crashed: Told when the guest reports its crash.
        virtual_apic: Whether the processor takes care of interrupts; asked of KVM if None.

    Raises:
        ConfigError: KVM cannot do it.
    """

    name = "kernel"

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        vp_count: int,
        *,
        crashed: CrashCallback,
        virtual_apic: bool | None = None,
    ) -> None:
        super().__init__(
            vm,
            memory,
            vp_count,
            features=Features(),
            hypercall_code=HYPERCALL_VMCALL,
            crashed=crashed,
        )
        self._virtual_apic = has_virtual_apic() if virtual_apic is None else virtual_apic
        vm.intercept_msrs([SINT_MSRS, CRASH_MSRS])
        self._vcpus: Sequence[Vcpu] = ()
        self._lines: dict[tuple[int, int], _Line] = {}
        self._watch = _EomWatch(self._eom)
        self._closed = False

    def leaves(self) -> Leaves:
        """See :meth:`SynicBackend.leaves`: what KVM has of what guests of VMBus want.

        APIC_MSRS makes Linux take note in its VP assist page of interrupts that need no EOI
        (hv_apic_eoi_write, linux/arch/x86/hyperv/hv_apic.c): one exit less for most interrupts.
        Without DEPRECATE_AUTO_EOI it has those of its SINTs ended for it, as have BSD and Windows.
        """
        features = dataclasses.replace(KERNEL_FEATURES, deprecate_auto_eoi=self._virtual_apic)
        ours = dict(cpuid_leaves(features, self.vp_count))
        eax, ebx, ecx, edx = ours[CpuidLeaf.FEATURES]
        hints, spin, _, _ = ours[CpuidLeaf.RECOMMENDATIONS]
        eax |= Privilege.REFERENCE_TSC | Privilege.APIC
        for entry in self._supported():
            if entry.function == CpuidLeaf.FEATURES:
                # The crash MSRs are the model's.
                eax &= entry.eax
                edx &= entry.edx | MiscFeature.CRASH_MSRS
            if entry.function == CpuidLeaf.RECOMMENDATIONS:
                hints |= entry.eax & Recommendation.APIC_MSRS
        ours[CpuidLeaf.FEATURES] = (eax, ebx, ecx, edx)
        ours[CpuidLeaf.RECOMMENDATIONS] = (hints, spin, 0, 0)
        return ours

    def _supported(self) -> list[api.CpuidEntry]:
        if not self.vm.capability(api.CAP_SYS_HYPERV_CPUID):
            return []
        return self.vm.cpuid(api.GET_SUPPORTED_HV_CPUID)

    def add_processors(self, vcpus: Sequence[Vcpu]) -> None:
        """Activate the SynICs. A route to a SINT can be made only then."""
        self._vcpus = vcpus
        for vcpu in vcpus:
            vcpu.enable_capability(api.CAP_HYPERV_SYNIC2)
        for vcpu in vcpus:
            self._line(vcpu.index, wire.VMBUS_SINT)

    def _line(self, vp: int, sint: int) -> _Line:
        line = self._lines.get((vp, sint))
        if line is None:
            flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
            line = self._lines[vp, sint] = _Line(os.eventfd(0, flags), os.eventfd(0, flags))
            gsi = self.vm.new_gsi()
            self.vm.route_sint(gsi, vp, sint)
            self.vm.add_irqfd(gsi, line.raise_, resample=line.resample)
            self._watch.add(line.resample, vp)
        return line

    def sint_eventfd(self, vp: int) -> int:
        """See :meth:`SynicBackend.sint_eventfd`."""
        return self._lines[vp, wire.VMBUS_SINT].raise_

    # ------------------------------------------------------------------------ for the attachment

    def interrupt(self, vp: int, vector: int) -> None:
        """Raise the SINT that has this vector. If several have, one is as good as another."""
        registers = self.model.registers.vps[vp]
        for (owner, sint), line in tuple(self._lines.items()):
            if owner == vp and not registers.masked(sint) and registers.vector(sint) == vector:
                os.eventfd_write(line.raise_, 1)
                return

    def deliver(self, vp: int, sint: int, message_type: int, payload: bytes, done: Done) -> None:
        """Deliver in the processor's thread, see the module."""

        def work() -> None:
            self.attached.deliver(vp, sint, message_type, payload, done)
            self._wait_if_busy(vp)

        self._vcpus[vp].run_later(work)

    def _eom(self, vp: int) -> None:
        def work() -> None:
            self.attached.queue.retry(vp)
            self._wait_if_busy(vp)

        self._vcpus[vp].run_later(work)

    def _wait_if_busy(self, vp: int) -> None:
        if len(self.attached.queue):
            self._watch.arm(vp)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """Have KVM carry out HvSignalEvent. KVM knows flag 0 only; others leave the guest."""
        if not flag:
            self.vm.add_hyperv_eventfd(connection_id, eventfd)

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """See :meth:`event_port_added`."""
        if not flag:
            self.vm.remove_hyperv_eventfd(connection_id)

    # -------------------------------------------------------------- in the processors' own threads

    def read_msr(self, vcpu: Vcpu, index: int) -> int:
        """Read a crash MSR; SINTs are read without an exit."""
        return self.model.read_msr(vcpu.index, index)

    def write_msr(self, vcpu: Vcpu, index: int, value: int) -> None:
        """Write a SINT, in KVM and the model, or a crash MSR."""
        sint = index - Msr.SINT0
        if not 0 <= sint < wire.SINT_COUNT:
            self.model.write_msr(vcpu.index, index, value)
            return
        if not value & wire.SINT_MASKED:
            self._line(vcpu.index, sint)
        before = self.model.read_msr(vcpu.index, index)
        # KVM first: the model raises an interrupt that was lost while the SINT was masked.
        vcpu.set_msr(index, value)
        try:
            self.model.write_msr(vcpu.index, index, value)
        except MsrError:
            vcpu.set_msr(index, before)
            raise
        self.attached.register_written(vcpu.index, index)

    def synic_written(self, vcpu: Vcpu, msr: int, control: int, siefp: int, simp: int) -> None:
        """Follow KVM's registers. The guest's write is done, but the guest has not gone on."""
        vp = vcpu.index
        for index, value in ((Msr.SCONTROL, control), (Msr.SIEFP, siefp), (Msr.SIMP, simp)):
            if index != msr:
                continue
            try:
                self.model.write_msr(vp, index, value)
            except MsrError as error:
                # KVM has taken it, so #GP comes too late; a page that is no memory is none.
                _log.warning("VP %d: %s", vp, error)
                self.model.write_msr(vp, index, 0)
            self.attached.register_written(vp, index)

    def hypercall(self, vcpu: Vcpu, control: int, first: int, second: int) -> int:
        """See :meth:`SynicBackend.hypercall`.

        Of HvSignalEvent KVM passes the parameter itself, whether it was in memory or not, and
        leaves the bit in the input value that says so as it was (kvm_hvcall_signal_event).
        """
        if control & 0xFFFF == HypercallCode.SIGNAL_EVENT:
            control |= wire.INPUT_FAST
        return self.model.hypercall(vcpu.index, control, first, second)

    def close(self) -> None:
        """See :meth:`SynicBackend.close`."""
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        for line in self._lines.values():
            os.close(line.raise_)
            os.close(line.resample)
        self._lines.clear()
