"""What the guest's processors say of themselves: CPUID.

Everything that KVM can do for a guest, with the parts that differ between processors filled in and
KVM's own paravirtual leaves replaced by those of Hyper-V: guests take the first hypervisor that
they recognize, and VMBus they look for on Hyper-V only.

Sources: Intel SDM 2A CPUID; linux/Documentation/virt/kvm/x86/cpuid.rst; TLFS 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmbus.kvm.api import CpuidEntry
from vmbus.wire import synic as wire

HYPERVISOR_LEAVES = range(0x4000_0000, 0x5000_0000)
TSC_DEADLINE = 1 << 24
"""ECX of leaf 1: the local APIC's timer can be set to a TSC value."""
_APIC_ID_SHIFT = 24
_TOPOLOGY_LEAVES = (0xB, 0x1F)
_SIGNIFICANT_INDEX = 1
"""Flag of KVM's leaves: ECX selects one of several (KVM_CPUID_FLAG_SIGNIFCANT_INDEX)."""
AMD_TOPOLOGY_LEAF = 0x8000_001E
POWER_LEAF = 0x8000_0007
INVARIANT_TSC = 1 << 8
"""EDX of leaf 0x80000007: the TSC never changes its rate."""
LEVEL_CORE = 2
"""ECX bits 15:8 of leaf 0xB: what a subleaf is about."""
LEVEL_THREAD = 1


def has_invariant_tsc(supported: Iterable[CpuidEntry]) -> bool:
    """Whether the machine's TSC never changes its rate."""
    return any(
        entry.function == POWER_LEAF and bool(entry.edx & INVARIANT_TSC) for entry in supported
    )


def processor_leaves(
    supported: Iterable[CpuidEntry],
    hypervisor: Mapping[int, tuple[int, int, int, int]],
    vp: int,
    *,
    tsc_deadline: bool,
) -> list[CpuidEntry]:
    """Return the leaves of one processor.

    Every processor is a package with one core and one thread: APIC ids are VP indices then,
    without gaps, and guests schedule as if nothing was shared.

    Args:
        supported: What KVM says it can do.
        hypervisor: Leaves from 0x40000000 on, ``leaf -> (eax, ebx, ecx, edx)``.
        vp: VP index and APIC id.
        tsc_deadline: Whether KVM's local APIC has that timer mode.
    """
    leaves = []
    topology = False
    for entry in supported:
        function = entry.function
        if function in HYPERVISOR_LEAVES or function in _TOPOLOGY_LEAVES:
            topology |= function in _TOPOLOGY_LEAVES
            continue
        if function == 1:
            ecx = entry.ecx | wire.HYPERVISOR_PRESENT | (TSC_DEADLINE if tsc_deadline else 0)
            # Bits 23:16 count the logical processors of the package, bits 31:24 are the APIC id.
            ebx = entry.ebx & 0xFFFF | 1 << 16 | vp << _APIC_ID_SHIFT
            # Bit 28 of EDX: there is more than one of them.
            entry = entry._replace(ebx=ebx, ecx=ecx, edx=entry.edx & ~(1 << 28))  # noqa: PLW2901
        elif function == 4:
            # Bits 31:26 cores of the package less one, 25:14 threads that share the cache.
            entry = entry._replace(eax=entry.eax & 0x3FFF)  # noqa: PLW2901
        elif function == 0x8000_0008:
            # ECX bits 15:12 width of APIC ids, 7:0 cores of the package less one.
            entry = entry._replace(ecx=0)  # noqa: PLW2901
        elif function == AMD_TOPOLOGY_LEAF:
            entry = entry._replace(eax=vp, ebx=vp & 0xFF, ecx=0)  # noqa: PLW2901
        leaves.append(entry)
    if topology:
        for level, kind in enumerate((LEVEL_THREAD, LEVEL_CORE, 0)):
            count = 1 if kind else 0
            leaves.append(
                CpuidEntry(0xB, level, _SIGNIFICANT_INDEX, 0, count, kind << 8 | level, vp)
            )
    leaves += [CpuidEntry(leaf, 0, 0, *values) for leaf, values in hypervisor.items()]
    return leaves
