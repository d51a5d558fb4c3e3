"""One life of a guest: KVM's machine and its processors, from power-on to the end.

A reset makes everything anew but memory, serial port and attachment. It costs a few milliseconds,
and no register of the old life can be forgotten.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from vmbus.errors import ConfigError
from vmbus.kvm import api
from vmbus.kvm.bzimage import EntryState
from vmbus.kvm.cpuid import has_invariant_tsc, processor_leaves
from vmbus.kvm.outcome import End, Outcome
from vmbus.kvm.ports import PortBus
from vmbus.kvm.synic import SynicBackend
from vmbus.kvm.synic_kernel import KernelSynic, is_possible
from vmbus.kvm.synic_user import HYPERCALL_PORT, UserSynic
from vmbus.kvm.vcpu import Segment, Vcpu
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory

_CODE_TYPE = 11
"""Execute, read, accessed."""
_DATA_TYPE = 3
"""Read, write, accessed."""
_FLAT = 0xFFFF_FFFF
MAX_PANICS = 16
"""Crash reports of one life: a kernel's, its crash kernel's, and some more."""


class SynicMode(enum.Enum):
    """Who has the guest's SynIC."""

    AUTO = "auto"
    """KVM if it can, else the VMM."""
    KERNEL = "kernel"
    USER = "user"


def set_entry(vcpu: Vcpu, entry: EntryState, *, idt: tuple[int, int] | None = None) -> None:
    """Let a processor that does not run yet begin in 64-bit mode.

    Args:
        vcpu: Has not started.
        entry: Where and how.
        idt: Base and limit of an interrupt descriptor table; by default there is none.

    Raises:
        OSError: KVM would not do it.
    """
    code = Segment(0, _FLAT, entry.code_selector, _CODE_TYPE, 1, 0, 0, 1, 1, 1)
    data = Segment(0, _FLAT, entry.data_selector, _DATA_TYPE, 1, 0, 1, 1, 0, 1)
    vcpu.set_special(
        {"cs": code, "ds": data, "es": data, "fs": data, "gs": data, "ss": data},
        {"cr0": entry.cr0, "cr3": entry.cr3, "cr4": entry.cr4, "efer": entry.efer},
        gdt=(entry.gdt_base, entry.gdt_limit),
        idt=idt,
    )
    vcpu.set_registers(
        {"rip": entry.rip, "rsi": entry.rsi, "rsp": entry.rsp, "rflags": entry.rflags}
    )


class Life:
    """See the module. It is the processors' :class:`vmbus.kvm.vcpu.Platform`.

    Args:
        memory: The guest's; borrowed.
        vp_count: Processors.
        bus: What is at the I/O ports.
        ended: Called once, with the first end that a processor comes to, in its thread. All
            processors are stopping by then.
        panicked: Told of the guest's last words, in a processor's thread, and the guest goes on;
            if None, a crash report is the end. A guest that makes more of them than MAX_PANICS is
            not heard any more.
        mode: Who has the SynIC.
        path: KVM's device.
        call: Makes ioctls.

    Raises:
        ConfigError: KVM cannot do it.
        OSError: KVM would not do it.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vp_count: int,
        bus: PortBus,
        ended: Callable[[End], None],
        *,
        panicked: Callable[[str], None] | None = None,
        mode: SynicMode = SynicMode.AUTO,
        path: str = "/dev/kvm",
        call: api.Ioctl = api.ioctl,
    ) -> None:
        self._bus = bus
        self._ended = ended
        self._panicked = panicked
        self._panics = 0
        self._lock = threading.Lock()
        self._end: End | None = None
        self.vcpus: list[Vcpu] = []
        self._user: UserSynic | None = None
        self._synic: SynicBackend | None = None
        self._call = call
        self.vm = Vm(memory, path=path, call=call)
        try:
            self._set_up(memory, vp_count, mode)
        except BaseException:
            self.close()
            raise

    @property
    def synic(self) -> SynicBackend:
        """The guest's SynIC."""
        assert self._synic is not None
        return self._synic

    def _set_up(self, memory: GuestMemory, vp_count: int, mode: SynicMode) -> None:
        vm = self.vm
        vm.create_interrupt_controllers()
        for index in range(vp_count):
            self.vcpus.append(Vcpu(vm, index, self, call=self._call))
        supported = vm.cpuid(api.GET_SUPPORTED_CPUID)
        possible = is_possible(vm)
        if mode is SynicMode.KERNEL and not possible:
            raise ConfigError(
                "this machine's KVM has no SynIC for guests; use --synic user, and see vmbus doctor"
            )
        synic: SynicBackend
        if possible and mode is not SynicMode.USER:
            synic = KernelSynic(vm, memory, vp_count, crashed=self._crashed)
        else:
            synic = self._user = UserSynic(
                vm,
                memory,
                vp_count,
                tsc_frequency=self.vcpus[0].tsc_frequency(),
                invariant_tsc=has_invariant_tsc(supported),
                crashed=self._crashed,
            )
        self._synic = synic
        hypervisor = synic.leaves()
        tsc_deadline = vm.capability(api.CAP_TSC_DEADLINE_TIMER) > 0
        for vcpu in self.vcpus:
            vcpu.set_cpuid(
                processor_leaves(supported, hypervisor, vcpu.index, tsc_deadline=tsc_deadline)
            )
        synic.add_processors(self.vcpus)

    def start(self, entry: EntryState) -> None:
        """Let the first processor run; the others wait to be started by it."""
        set_entry(self.vcpus[0], entry)
        for vcpu in self.vcpus:
            vcpu.start()

    def stop(self) -> None:
        """Stop all processors and wait until they have. Idempotent."""
        for vcpu in self.vcpus:
            vcpu.stop()
        for vcpu in self.vcpus:
            vcpu.join()

    def close(self) -> None:
        """Stop, and give everything back. Idempotent."""
        self.stop()
        if self._synic is not None:
            self._synic.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()

    # ------------------------------------------------------------------- vmbus.kvm.vcpu.Platform

    def read_port(self, vcpu: Vcpu, port: int, size: int) -> int:
        """See :meth:`vmbus.kvm.vcpu.Platform.read_port`."""
        if port == HYPERCALL_PORT and size == 4 and self._user is not None:
            return self._user.hypercall_page_called(vcpu)
        return self._bus.read(port, size)

    def write_port(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        """See :meth:`vmbus.kvm.vcpu.Platform.write_port`."""
        self._bus.write(port, size, value)

    def read_msr(self, vcpu: Vcpu, index: int) -> int:
        """See :meth:`vmbus.kvm.vcpu.Platform.read_msr`."""
        return self.synic.read_msr(vcpu, index)

    def write_msr(self, vcpu: Vcpu, index: int, value: int) -> None:
        """See :meth:`vmbus.kvm.vcpu.Platform.write_msr`."""
        self.synic.write_msr(vcpu, index, value)

    def synic_written(self, vcpu: Vcpu, msr: int, control: int, siefp: int, simp: int) -> None:
        """See :meth:`vmbus.kvm.vcpu.Platform.synic_written`."""
        self.synic.synic_written(vcpu, msr, control, siefp, simp)

    def hypercall(self, vcpu: Vcpu, control: int, first: int, second: int) -> int:
        """See :meth:`vmbus.kvm.vcpu.Platform.hypercall`."""
        return self.synic.hypercall(vcpu, control, first, second)

    def ended(self, end: End) -> None:
        """See :meth:`vmbus.kvm.vcpu.Platform.ended`. Any thread; cannot block."""
        with self._lock:
            if self._end is not None:
                return
            self._end = end
        for vcpu in self.vcpus:
            vcpu.stop()
        self._ended(end)

    def _crashed(self, text: str) -> None:
        if self._panicked is None:
            self.ended(End(Outcome.PANIC, text))
            return
        with self._lock:
            self._panics += 1
            heard = self._panics <= MAX_PANICS
        if heard:
            self._panicked(text)
