"""One virtual processor: its registers, and the thread that runs it.

KVM does almost everything for a processor only from the thread that runs it, so other threads hand
work over with :meth:`Vcpu.call`. A processor inside KVM_RUN is fetched out by a signal; one that
is on its way in, by ``immediate_exit`` in the shared page, which makes KVM_RUN return at once. It
is set after the work is queued and cleared before the queue is looked at, so that one of the two
always sees the other.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

from vmbus.kvm import api
from vmbus.kvm.api import Exit
from vmbus.kvm.outcome import End, Outcome
from vmbus.kvm.vm import Vm
from vmbus.synic.msrs import MsrError

KICK_SIGNAL: Final = signal.SIGRTMIN
REGISTERS: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_CONTROL: Final = struct.Struct("<7Q")
_CONTROL_NAMES: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_GDT_AT: Final = len(SEGMENTS) * api.SEGMENT.size
_IDT_AT: Final = _GDT_AT + api.DTABLE.size
_CONTROL_AT: Final = _IDT_AT + api.DTABLE.size


class Segment(NamedTuple):
    """A segment register with its hidden part."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    long: int
    granularity: int
    available: int = 0


class Platform(Protocol):
    """What is around a processor. Called in the processor's thread, with the guest stopped."""

    def read_port(self, vcpu: Vcpu, port: int, size: int) -> int:
        """Carry out IN."""

    def write_port(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        """Carry out OUT."""

    def read_msr(self, vcpu: Vcpu, index: int) -> int:
        """Carry out RDMSR of an intercepted MSR. Raises MsrError for #GP."""

    def write_msr(self, vcpu: Vcpu, index: int, value: int) -> None:
        """Carry out WRMSR of an intercepted MSR. Raises MsrError for #GP."""

    def synic_written(self, vcpu: Vcpu, msr: int, control: int, siefp: int, simp: int) -> None:
        """KVM's SynIC was written to; it has these values now."""

    def hypercall(self, vcpu: Vcpu, control: int, first: int, second: int) -> int:
        """Carry out a hypercall that KVM does not know; returns RAX."""

    def ended(self, end: End) -> None:
        """The processor stops, and so should all others. May come from several."""


def ignore_kick_signal() -> None:
    """Let :data:`KICK_SIGNAL` do no more than end system calls. Only from the main thread."""
    signal.signal(KICK_SIGNAL, lambda _number, _frame: None)


class Vcpu:
    """A virtual processor.

    Until :meth:`start`, everything may be called from one thread; afterwards registers and MSRs
    only from the processor's own.

    Args:
        vm: Where it belongs.
        index: VP index, also its APIC id. To be created in this order.
        platform: What is around it.

    Raises:
        OSError: KVM would not make it.
    """

    def __init__(
        self, vm: Vm, index: int, platform: Platform, *, call: api.Ioctl = api.ioctl
    ) -> None:
        self.index = index
        self._platform = platform
        self._call = call
        self.fd = vm.call(api.CREATE_VCPU, index)
        self._run = mmap.mmap(self.fd, vm.run_size)
        self._work: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._inside = False
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name=f"vcpu{index}", daemon=True)
        self._exits: dict[int, Callable[[], None]] = {
            Exit.IO: self._on_io,
            Exit.MMIO: self._on_mmio,
            Exit.X86_RDMSR: self._on_read_msr,
            Exit.X86_WRMSR: self._on_write_msr,
            Exit.HYPERV: self._on_hyperv,
            Exit.SYSTEM_EVENT: self._on_system_event,
            Exit.SHUTDOWN: self._on_shutdown,
            Exit.FAIL_ENTRY: self._on_fail_entry,
            Exit.INTERNAL_ERROR: self._on_internal_error,
            Exit.INTR: _nothing,
            Exit.IRQ_WINDOW_OPEN: _nothing,
        }

    def call(self, request: int, arg: int | bytearray = 0) -> int:
        """Make an ioctl on the processor. Raises OSError."""
        return self._call(self.fd, request, arg)

    # --------------------------------------------------------------------------------- registers

    def registers(self) -> dict[str, int]:
        """Return the general registers."""
        data = bytearray(api.REGS.size)
        self.call(api.GET_REGS, data)
        return dict(zip(REGISTERS, api.REGS.unpack(data), strict=True))

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Set all general registers; those not given become 0."""
        data = api.REGS.pack(*(values.get(name, 0) for name in REGISTERS))
        self.call(api.SET_REGS, bytearray(data))

    def set_special(
        self,
        segments: Mapping[str, Segment],
        control: Mapping[str, int],
        *,
        gdt: tuple[int, int] | None = None,
        idt: tuple[int, int] | None = None,
    ) -> None:
        """Set segment and control registers; those not given stay as they are.

        Args:
            segments: By name.
            control: ``cr0``, ``cr3``, ``cr4``, ``efer`` and so on.
            gdt: Base and limit of the global descriptor table.
            idt: Base and limit of the interrupt descriptor table.
        """
        data = bytearray(api.SREGS_SIZE)
        self.call(api.GET_SREGS, data)
        for name, segment in segments.items():
            api.SEGMENT.pack_into(data, SEGMENTS.index(name) * api.SEGMENT.size, *segment)
        if gdt is not None:
            api.DTABLE.pack_into(data, _GDT_AT, *gdt)
        if idt is not None:
            api.DTABLE.pack_into(data, _IDT_AT, *idt)
        values = dict(zip(_CONTROL_NAMES, _CONTROL.unpack_from(data, _CONTROL_AT), strict=True))
        values.update(control)
        _CONTROL.pack_into(data, _CONTROL_AT, *(values[name] for name in _CONTROL_NAMES))
        self.call(api.SET_SREGS, data)

    def msr(self, index: int) -> int:
        """Return an MSR that KVM has."""
        data = api.pack_msrs({index: 0})
        if self.call(api.GET_MSRS, data) != 1:
            raise OSError(errno.EINVAL, f"KVM has no MSR {index:#x}")
        value: int = api.MSR_ENTRY.unpack_from(data, api.MSR_HEADER.size)[2]
        return value

    def set_msr(self, index: int, value: int) -> None:
        """Set an MSR that KVM has."""
        if self.call(api.SET_MSRS, api.pack_msrs({index: value})) != 1:
            raise OSError(errno.EINVAL, f"KVM does not set MSR {index:#x} to {value:#x}")

    def set_cpuid(self, entries: list[api.CpuidEntry]) -> None:
        """Say what the processor is."""
        self.call(api.SET_CPUID2, api.pack_cpuid(entries))

    def enable_capability(self, number: int, argument: int = 0) -> None:
        """Switch something on for this processor."""
        self.call(
            api.ENABLE_CAP_IOCTL, bytearray(api.ENABLE_CAP.pack(number, 0, argument, 0, 0, 0))
        )

    def tsc_frequency(self) -> int:
        """Return the guest's TSC frequency in Hz."""
        return self.call(api.GET_TSC_KHZ) * 1000

    # --------------------------------------------------------------------------------- the thread

    def start(self) -> None:
        """Run the guest. :func:`ignore_kick_signal` must have been called."""
        self._thread.start()

    def run_later(self, work: Callable[[], None]) -> None:
        """Have the processor's thread do something as soon as it can. Any thread; cannot block."""
        self._work.append(work)
        self._kick()

    def stop(self) -> None:
        """Have the thread end, in the middle of the guest. Any thread; cannot block."""
        self._stopping = True
        self._kick()

    def join(self) -> None:
        """Wait for the end of the thread, unless it never began."""
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        """Give up the processor; its thread must have ended. Idempotent."""
        with self._lock:
            if self.fd >= 0:
                self._run.close()
                os.close(self.fd)
                self.fd = -1

    def _kick(self) -> None:
        with self._lock:
            if self.fd < 0:
                return
            self._run[api.RUN_IMMEDIATE_EXIT] = 1
            if self._inside:
                assert self._thread.ident is not None
                signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def _main(self) -> None:
        with self._lock:
            self._inside = True
        try:
            self._loop()
        except Exception:
            self._end(Outcome.FAILURE, f"the VMM failed:\n{traceback.format_exc()}")
        finally:
            with self._lock:
                # From here on there may be no thread of this id.
                self._inside = False

    def _loop(self) -> None:
        run = self._run
        call, fd = self._call, self.fd
        work = self._work
        while True:
            run[api.RUN_IMMEDIATE_EXIT] = 0
            while work:
                work.popleft()()
            if self._stopping:
                return
            try:
                call(fd, api.RUN)
            except OSError as error:
                # EAGAIN: a processor that waits to be started was disturbed.
                if error.errno in {errno.EINTR, errno.EAGAIN}:
                    continue
                self._end(Outcome.FAILURE, f"KVM_RUN on VP {self.index}: {error.strerror}")
                return
            reason = int.from_bytes(run[api.RUN_EXIT_REASON : api.RUN_EXIT_REASON + 4], "little")
            handler = self._exits.get(reason)
            if handler is None:
                self._end(Outcome.FAILURE, f"KVM left VP {self.index} for reason {reason}")
                return
            handler()

    def _end(self, outcome: Outcome, text: str) -> None:
        self._stopping = True
        self._platform.ended(End(outcome, text))

    def _unpack(self, layout: struct.Struct, at: int = api.RUN_UNION) -> tuple[int, ...]:
        return layout.unpack_from(self._run, at)

    # -------------------------------------------------------------------------------------- exits

    def _on_io(self) -> None:
        direction, size, port, count, offset = self._unpack(api.RUN_IO)
        run = self._run
        for at in range(offset, offset + size * count, size):
            if direction == api.IO_IN:
                value = self._platform.read_port(self, port, size)
                run[at : at + size] = value.to_bytes(size, "little")
            else:
                value = int.from_bytes(run[at : at + size], "little")
                self._platform.write_port(self, port, size, value)

    def _on_mmio(self) -> None:
        """Addresses without memory read as ones, as on a bus where nobody answers."""
        _, _, length, is_write = api.RUN_MMIO.unpack_from(self._run, api.RUN_UNION)
        if not is_write:
            at = api.RUN_UNION + 8
            self._run[at : at + length] = b"\xff" * length

    def _on_read_msr(self) -> None:
        _, _, index, _ = self._unpack(api.RUN_MSR)
        try:
            value = self._platform.read_msr(self, index)
        except MsrError:
            self._run[api.RUN_MSR_ERROR] = 1
        else:
            self._run[api.RUN_MSR_ERROR] = 0
            self._run[api.RUN_MSR_DATA : api.RUN_MSR_DATA + 8] = value.to_bytes(8, "little")

    def _on_write_msr(self) -> None:
        _, _, index, value = self._unpack(api.RUN_MSR)
        try:
            self._platform.write_msr(self, index, value)
        except MsrError:
            self._run[api.RUN_MSR_ERROR] = 1
        else:
            self._run[api.RUN_MSR_ERROR] = 0

    def _on_hyperv(self) -> None:
        (kind,) = self._unpack(api.RUN_HYPERV_TYPE)
        if kind == api.HYPERV_EXIT_SYNIC:
            self._platform.synic_written(
                self, *self._unpack(api.RUN_HYPERV_SYNIC, api.RUN_HYPERV_BODY)
            )
        elif kind == api.HYPERV_EXIT_HCALL:
            control, _, first, second = self._unpack(api.RUN_HYPERV_HCALL, api.RUN_HYPERV_BODY)
            result = self._platform.hypercall(self, control, first, second)
            at = api.RUN_HYPERV_RESULT
            self._run[at : at + 8] = result.to_bytes(8, "little")

    def _on_system_event(self) -> None:
        (kind,) = self._unpack(api.RUN_SYSTEM_EVENT)
        match kind:
            case api.SYSTEM_EVENT_SHUTDOWN:
                self._end(Outcome.POWER_OFF, "")
            case api.SYSTEM_EVENT_RESET:
                self._end(Outcome.RESET, "")
            case api.SYSTEM_EVENT_CRASH:
                self._end(Outcome.PANIC, "")
            case _:
                self._end(Outcome.FAILURE, f"KVM reports system event {kind}")

    def _on_shutdown(self) -> None:
        self._end(Outcome.TRIPLE_FAULT, f"triple fault on VP {self.index}")

    def _on_fail_entry(self) -> None:
        (code,) = self._unpack(api.RUN_FAIL_ENTRY)
        self._end(Outcome.FAILURE, f"the processor refuses to enter VP {self.index}: {code:#x}")

    def _on_internal_error(self) -> None:
        (code,) = self._unpack(api.RUN_INTERNAL_ERROR)
        where = self.registers()["rip"]
        self._end(
            Outcome.FAILURE,
            f"KVM cannot emulate VP {self.index} at {where:#x} (internal error {code})",
        )


def _nothing() -> None:
    """An exit that asks for nothing."""
