"""The synthetic MSRs and CPUID leaves of a partition, as a register file.

This is the part of a hypervisor that a VMM needs when its kernel offers none of it (or when there
is no kernel at all, as in tests). It holds registers and prepares the pages that they name; what
follows from a write (an interrupt, a slot that became free) is returned as an *effect* for
:class:`vmbus.synic.Synic` to act on, so that no callback runs under a lock.

Overlay pages. TLFS makes the hypercall, SIM and SIEF pages *overlays*: pages of the hypervisor
that hide the guest's memory while they are enabled. Here they are the guest's memory. Guests
cannot tell, as long as the page holds what an overlay would hold when it appears; so

* SIMP and SIEFP pages are zeroed when they become enabled or are moved, but not when the same
  value is written again. Stale bytes would look like an occupied slot and stall the guest for
  ever. (KVM's first SynIC zeroes on every enabling write, its second leaves it to the VMM.) A
  guest that disables and re-enables its SIM page loses a message that waits there, which an
  overlay would have kept; no known guest depends on it.
* the hypercall page is filled when it becomes enabled or is moved, and stays when it is disabled.

Sources: TLFS 2.4, 3.13, 11, 12.3; linux/arch/x86/kvm/hyperv.c for behaviour guests rely on.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from vmbus.errors import ConfigError, GuestProtocolError
from vmbus.memory import GuestMemory
from vmbus.wire import synic as wire
from vmbus.wire.synic import Msr

_U64: Final = (1 << 64) - 1
SINT_RESET: Final = wire.SINT_MASKED

HYPERCALL_VMCALL: Final = bytes.fromhex("f30f1efa 0f01c1 c3")
"""Hypercall page for Intel processors: ENDBR64, VMCALL, RET. Linux gives up its indirect-branch
tracking if the page does not begin with ENDBR64."""
HYPERCALL_VMMCALL: Final = bytes.fromhex("f30f1efa 0f01d9 c3")
"""The same for AMD processors."""


class MsrError(GuestProtocolError):
    """The VMM must inject #GP: no such MSR, or a value it cannot have."""


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """What a partition is told it has, beyond hypercalls, VP index and SynIC."""

    reference_time: bool = False
    """TIME_REF_COUNT and REFERENCE_TSC work: the register file has a clock."""
    tsc_frequency: int = 0
    """Hz; 0 if unknown. Frequency MSRs exist if this and the next are known."""
    apic_frequency: int = 0
    """Hz; 0 if unknown."""
    invariant_tsc: bool = False
    """The TSC never changes its rate, so the guest may use it as its clock."""
    timers: bool = False
    """The VMM runs synthetic timers from the STIMER MSRs. They can be written in any case, but a
    guest that is told so relies on them: Linux stops if they never fire."""
    crash: bool = True
    """The guest may report a crash through the CRASH MSRs."""
    deprecate_auto_eoi: bool = True
    """Ask the guest to end interrupts itself: nothing in user space ends them for the guest."""
    version: tuple[int, int, int] = (10, 0, 14393)
    """Major, minor and build; guests show it, nothing else."""

    @property
    def frequencies(self) -> bool:
        """Whether both frequency MSRs exist."""
        return bool(self.tsc_frequency and self.apic_frequency)


def cpuid_leaves(features: Features, vp_count: int) -> dict[int, tuple[int, int, int, int]]:
    """Return the hypervisor leaves, ``leaf -> (eax, ebx, ecx, edx)``.

    They hold the smallest set with which all known guests find a VMBus, and nothing that nobody
    here implements. The VMM also has to set ECX bit 31 of leaf 1. Never claimed is the privilege
    CpuManagement, which makes Linux believe that it is the root partition.

    Args:
        features: What else is there.
        vp_count: Number of virtual processors.
    """
    privileges = wire.Privilege.HYPERCALL | wire.Privilege.VP_INDEX | wire.Privilege.SYNIC
    misc = wire.MiscFeature(0)
    if features.reference_time:
        # Without REFERENCE_TSC: its page could only say "invalid, read the MSR" here.
        privileges |= wire.Privilege.TIME_REF_COUNT
    if features.frequencies:
        privileges |= wire.Privilege.FREQUENCIES
        misc |= wire.MiscFeature.FREQUENCY_MSRS
    if features.invariant_tsc:
        privileges |= wire.Privilege.TSC_INVARIANT
    if features.timers:
        privileges |= wire.Privilege.SYNTHETIC_TIMERS
        # Timers in message mode would share the slot of SINT 2 with VMBus.
        misc |= wire.MiscFeature.DIRECT_TIMERS
    if features.crash:
        misc |= wire.MiscFeature.CRASH_MSRS
    hypercalls = wire.PartitionPrivilege.POST_MESSAGES | wire.PartitionPrivilege.SIGNAL_EVENTS
    hints = wire.Recommendation.RELAXED_TIMING
    if features.deprecate_auto_eoi:
        hints |= wire.Recommendation.DEPRECATE_AUTO_EOI
    vendor = [int.from_bytes(wire.VENDOR_MICROSOFT[at : at + 4], "little") for at in (0, 4, 8)]
    major, minor, build = features.version
    return {
        wire.CpuidLeaf.VENDOR: (wire.CpuidLeaf.LIMITS, vendor[0], vendor[1], vendor[2]),
        wire.CpuidLeaf.INTERFACE: (wire.INTERFACE_HV1, 0, 0, 0),
        wire.CpuidLeaf.VERSION: (build, major << 16 | minor, 0, 0),
        wire.CpuidLeaf.FEATURES: (int(privileges), int(hypercalls), 0, int(misc)),
        wire.CpuidLeaf.RECOMMENDATIONS: (int(hints), wire.NO_SPINLOCK_NOTIFICATION, 0, 0),
        wire.CpuidLeaf.LIMITS: (vp_count, vp_count, 0, 0),
    }


class SintUnmasked(NamedTuple):
    """Effect: an interrupt was lost while this SINT was masked and is due now."""

    vector: int


class EndOfMessage(NamedTuple):
    """Effect: the guest has freed a slot that had the pending flag."""


class CrashReported(NamedTuple):
    """Effect: the guest reports its crash."""

    parameters: tuple[int, ...]
    """P0 to P4; if :data:`~vmbus.wire.synic.CRASH_CTL_MESSAGE` is set in ``control``, P3 is the
    address and P4 the length of a text."""
    control: int


Effect = SintUnmasked | EndOfMessage | CrashReported | None


class VpRegisters:
    """The registers of one VP. ``lock`` guards them and the VP's SIM and SIEF pages."""

    __slots__ = ("lock", "lost", "scontrol", "siefp", "simp", "sints", "stimers", "vp_assist")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Return to the state after power-on."""
        # TLFS says 0, but UEFI firmware never writes it and relies on 1, which is what KVM has.
        self.scontrol = wire.SCONTROL_ENABLE
        self.simp = 0
        self.siefp = 0
        self.sints = [SINT_RESET] * wire.SINT_COUNT
        self.stimers = [0] * wire.STIMER_MSR_COUNT
        self.vp_assist = 0
        self.lost = 0
        """Bit mask of SINTs whose interrupt was lost because they were masked."""

    def delivers(self, page_register: int) -> bool:
        """Whether the SynIC and the page in ``page_register`` are enabled."""
        return bool(self.scontrol & wire.SCONTROL_ENABLE and page_register & wire.PAGE_ENABLE)

    def masked(self, sint: int) -> bool:
        """Whether a SINT is masked; polling counts as unmasked (TLFS 11.4.5)."""
        return self.sints[sint] & (wire.SINT_MASKED | wire.SINT_POLLING) == wire.SINT_MASKED

    def vector(self, sint: int) -> int | None:
        """The vector to interrupt with, None for a SINT that is polled."""
        value = self.sints[sint]
        return None if value & wire.SINT_POLLING else value & wire.SINT_VECTOR


class RegisterFile:
    """All synthetic MSRs of a partition. Safe to use from any number of threads.

    Args:
        memory: The guest's memory, where the pages are.
        vp_count: Number of VPs, at least 1.
        features: Which optional MSRs exist.
        hypercall_code: First bytes of the hypercall page: the instructions that reach the VMM.
        clock: Partition reference time in 100 ns ticks since power-on; must be given if, and only
            if, ``features.reference_time``.

    Raises:
        ConfigError: The arguments do not fit together.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vp_count: int,
        *,
        features: Features,
        hypercall_code: bytes,
        clock: Callable[[], int] | None,
    ) -> None:
        if vp_count < 1:
            raise ConfigError("a partition has at least one VP")
        if len(hypercall_code) > wire.PAGE_SIZE:
            raise ConfigError("the hypercall code does not fit into a page")
        if features.reference_time != (clock is not None):
            raise ConfigError("reference time and a clock need each other")
        self.vps = tuple(VpRegisters() for _ in range(vp_count))
        self._memory = memory
        self._hypercall_page = hypercall_code.ljust(wire.PAGE_SIZE, b"\0")
        self._lock = threading.Lock()
        self._constants: dict[int, int] = {Msr.SVERSION: wire.SYNIC_VERSION, Msr.EOM: 0}
        if features.frequencies:
            self._constants[Msr.TSC_FREQUENCY] = features.tsc_frequency
            self._constants[Msr.APIC_FREQUENCY] = features.apic_frequency
        self._clock = clock
        self._features = features
        self._reset_partition()

    def _reset_partition(self) -> None:
        self.guest_os_id = 0
        self.hypercall = 0
        self.reference_tsc = 0
        self.tsc_invariant = 0
        self.crash = [0] * wire.CRASH_PARAMETER_COUNT

    def reset(self) -> None:
        """Put every register back to its power-on value; guest memory is not touched."""
        with self._lock:
            self._reset_partition()
        for registers in self.vps:
            with registers.lock:
                registers.reset()

    def read(self, vp: int, index: int) -> int:
        """Read an MSR.

        Raises:
            MsrError: There is no such MSR.
        """
        constant = self._constants.get(index)
        if constant is not None:
            return constant
        registers = self.vps[vp]
        sint = index - Msr.SINT0
        if 0 <= sint < wire.SINT_COUNT:
            return registers.sints[sint]
        timer = index - Msr.STIMER0_CONFIG
        if 0 <= timer < wire.STIMER_MSR_COUNT:
            return registers.stimers[timer]
        match index:
            case Msr.VP_INDEX:
                return vp
            case Msr.GUEST_OS_ID:
                return self.guest_os_id
            case Msr.HYPERCALL:
                return self.hypercall
            case Msr.SCONTROL:
                return registers.scontrol
            case Msr.SIMP:
                return registers.simp
            case Msr.SIEFP:
                return registers.siefp
            case Msr.VP_ASSIST_PAGE:
                return registers.vp_assist
            case Msr.TIME_REF_COUNT if self._clock is not None:
                return self._clock() & _U64
            case Msr.REFERENCE_TSC if self._clock is not None:
                return self.reference_tsc
            case Msr.TSC_INVARIANT_CONTROL if self._features.invariant_tsc:
                return self.tsc_invariant
            case Msr.CRASH_CTL if self._features.crash:
                return wire.CRASH_CTL_NOTIFY | wire.CRASH_CTL_MESSAGE
            case _ if self._features.crash and Msr.CRASH_P0 <= index <= Msr.CRASH_P4:
                return self.crash[index - Msr.CRASH_P0]
        raise MsrError(f"MSR {index:#x} cannot be read", field="msr")

    def write(self, vp: int, index: int, value: int) -> Effect:
        """Write an MSR and return what follows from it.

        Args:
            vp: VP index.
            index: MSR number, chosen by the guest.
            value: 64 bits, chosen by the guest.

        Raises:
            MsrError: There is no such MSR, it is read-only, or it cannot have this value; nothing
                has changed.
        """
        sint = index - Msr.SINT0
        if 0 <= sint < wire.SINT_COUNT:
            return self._write_sint(self.vps[vp], sint, value)
        match index:
            case Msr.EOM:
                return EndOfMessage()
            case Msr.GUEST_OS_ID | Msr.HYPERCALL | Msr.REFERENCE_TSC | Msr.TSC_INVARIANT_CONTROL:
                with self._lock:
                    self._write_partition(index, value)
                return None
            case Msr.CRASH_CTL if self._features.crash:
                with self._lock:
                    parameters = tuple(self.crash)
                return CrashReported(parameters, value) if value & wire.CRASH_CTL_NOTIFY else None
            case _ if self._features.crash and Msr.CRASH_P0 <= index <= Msr.CRASH_P4:
                with self._lock:
                    self.crash[index - Msr.CRASH_P0] = value
                return None
        with self.vps[vp].lock:
            self._write_vp(self.vps[vp], index, value)
        return None

    def _write_sint(self, registers: VpRegisters, sint: int, value: int) -> Effect:
        if not value & wire.SINT_MASKED and value & wire.SINT_VECTOR < wire.SINT_FIRST_VECTOR:
            raise MsrError(f"SINT{sint}: vector {value & 0xFF} is an exception's", field="vector")
        with registers.lock:
            registers.sints[sint] = value
            if registers.masked(sint) or not registers.lost >> sint & 1:
                return None
            registers.lost &= ~(1 << sint)
            vector = registers.vector(sint)
        return None if vector is None else SintUnmasked(vector)

    def _write_vp(self, registers: VpRegisters, index: int, value: int) -> None:
        timer = index - Msr.STIMER0_CONFIG
        if 0 <= timer < wire.STIMER_MSR_COUNT:
            registers.stimers[timer] = value
            return
        match index:
            case Msr.SCONTROL:
                registers.scontrol = value
            case Msr.SIMP:
                if self._appears(registers.simp, value):
                    self._fill(value, bytes(wire.PAGE_SIZE))
                    registers.lost = 0
                registers.simp = value
            case Msr.SIEFP:
                if self._appears(registers.siefp, value):
                    self._fill(value, bytes(wire.PAGE_SIZE))
                registers.siefp = value
            case Msr.VP_ASSIST_PAGE:
                registers.vp_assist = value
            case _:
                raise MsrError(f"MSR {index:#x} cannot be written", field="msr")

    def _write_partition(self, index: int, value: int) -> None:
        match index:
            case Msr.GUEST_OS_ID:
                self.guest_os_id = value
                if not value:
                    self.hypercall &= ~wire.PAGE_ENABLE
            case Msr.HYPERCALL:
                if self.hypercall & wire.HYPERCALL_LOCKED:
                    return
                if not self.guest_os_id:
                    # The bit cannot be set before the guest has said what it is (TLFS 3.13).
                    value &= ~wire.PAGE_ENABLE
                if self._appears(self.hypercall, value):
                    self._fill(value, self._hypercall_page)
                self.hypercall = value
            case Msr.REFERENCE_TSC if self._clock is not None:
                if self._appears(self.reference_tsc, value):
                    # Sequence 0: the page is invalid, the guest reads TIME_REF_COUNT instead.
                    self._fill(value, bytes(wire.PAGE_SIZE))
                self.reference_tsc = value
            case Msr.TSC_INVARIANT_CONTROL if self._features.invariant_tsc and value <= 1:
                self.tsc_invariant = value
            case _:
                raise MsrError(f"MSR {index:#x} cannot be {value:#x}", field="msr")

    @staticmethod
    def _appears(old: int, new: int) -> bool:
        """Whether a page register goes from not having this page to having it."""
        if not new & wire.PAGE_ENABLE:
            return False
        return not old & wire.PAGE_ENABLE or old >> wire.PAGE_SHIFT != new >> wire.PAGE_SHIFT

    def _fill(self, register: int, content: bytes) -> None:
        try:
            self._memory.page(register >> wire.PAGE_SHIFT)[:] = content
        except GuestProtocolError as error:
            raise MsrError(f"the page of register value {register:#x}: {error}") from error
