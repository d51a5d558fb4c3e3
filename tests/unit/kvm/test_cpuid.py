"""What processors say of themselves."""

from __future__ import annotations

from vmbus.kvm.api import CpuidEntry
from vmbus.kvm.cpuid import has_invariant_tsc, processor_leaves

SUPPORTED = [
    CpuidEntry(0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(1, 0, 0, 0x800F12, 0xFF100800, 1, 1 << 28 | 1),
    CpuidEntry(4, 0, 1, 0xFC00C121, 0, 0, 0),
    CpuidEntry(0xB, 0, 1, 1, 2, 0x100, 9),
    CpuidEntry(0xB, 1, 1, 4, 8, 0x201, 9),
    CpuidEntry(0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
    CpuidEntry(0x80000007, 0, 0, 0, 0, 0, 1 << 8),
    CpuidEntry(0x80000008, 0, 0, 0x3030, 0, 0x4007, 0),
    CpuidEntry(0x8000001E, 0, 0, 9, 0x109, 0x100, 0),
]
HYPERVISOR = {0x40000000: (0x40000005, 1, 2, 3)}


def leaves(vp: int, *, tsc_deadline: bool = False) -> dict[tuple[int, int], CpuidEntry]:
    made = processor_leaves(SUPPORTED, HYPERVISOR, vp, tsc_deadline=tsc_deadline)
    keyed = {(entry.function, entry.subleaf): entry for entry in made}
    assert len(keyed) == len(made), "no leaf twice"
    return keyed


def test_every_processor_knows_its_own_number():
    third = leaves(3)

    assert third[1, 0].ebx >> 24 == 3
    assert [third[0xB, level].edx for level in range(3)] == [3, 3, 3]
    assert third[0x8000001E, 0].eax == 3


def test_every_processor_is_a_package_of_its_own():
    made = leaves(1)

    assert made[1, 0].ebx >> 16 & 0xFF == 1
    assert made[1, 0].ebx & 0xFFFF == 0x0800
    assert made[1, 0].edx == 1
    assert made[4, 0].eax == 0x121
    assert made[0x80000008, 0].ecx == 0
    assert [made[0xB, level][3:6] for level in range(3)] == [
        (0, 1, 0x100),
        (0, 1, 0x201),
        (0, 0, 2),
    ]


def test_the_hypervisor_is_hyper_v_and_nobody_else():
    made = leaves(0)

    assert made[1, 0].ecx >> 31
    assert made[0x40000000, 0][3:] == (0x40000005, 1, 2, 3)
    assert made[0, 0] == SUPPORTED[0]


def test_the_deadline_timer_is_there_if_kvm_has_it():
    assert not leaves(0)[1, 0].ecx >> 24 & 1
    assert leaves(0, tsc_deadline=True)[1, 0].ecx >> 24 & 1


def test_processors_without_the_topology_leaf_do_not_get_it():
    made = processor_leaves(SUPPORTED[:3], {}, 0, tsc_deadline=False)

    assert [entry.function for entry in made] == [0, 1, 4]


def test_an_invariant_tsc_is_found():
    assert has_invariant_tsc(SUPPORTED)
    assert not has_invariant_tsc(SUPPORTED[:4])
    assert not has_invariant_tsc([SUPPORTED[6]._replace(edx=0)])
