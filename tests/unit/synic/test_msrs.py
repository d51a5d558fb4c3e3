"""Synthetic MSRs and CPUID leaves."""

from __future__ import annotations

import itertools
import os

import pytest

from tests.support.synic import CODE, SIEFP, SIMP, Guest, Partition
from vmbus.errors import ConfigError
from vmbus.memory import allocate_memory, create_memfd
from vmbus.synic import Features, Synic
from vmbus.synic.model import HYPERCALL_VMCALL, MsrError, cpuid_leaves
from vmbus.wire import synic as wire
from vmbus.wire.synic import CpuidLeaf, Msr

EVERYTHING = Features(
    reference_time=True,
    tsc_frequency=2_500_000_000,
    apic_frequency=1_000_000_000,
    invariant_tsc=True,
    timers=True,
    crash=True,
)
NOTHING = Features(crash=False, deprecate_auto_eoi=False)
OUTSIDE = 0x7000_0000


def full_partition() -> Partition:
    return Partition(2, features=EVERYTHING, clock=itertools.count(1000).__next__)


def test_registers_have_their_power_on_values():
    synic = Partition().synic
    for msr in (Msr.GUEST_OS_ID, Msr.HYPERCALL, Msr.SIMP, Msr.SIEFP, Msr.EOM, Msr.VP_ASSIST_PAGE):
        assert synic.read_msr(0, msr) == 0
    assert synic.read_msr(0, Msr.SVERSION) == 1
    assert [synic.read_msr(0, Msr.SINT0 + sint) for sint in range(16)] == [0x10000] * 16


def test_the_synic_comes_out_of_reset_enabled():
    """Checklist row 35: UEFI never writes SCONTROL."""
    partition = Partition()
    assert partition.synic.read_msr(0, Msr.SCONTROL) == 1
    partition.synic.write_msr(0, Msr.SCONTROL, 0)
    assert partition.synic.read_msr(0, Msr.SCONTROL) == 0
    partition.synic.reset()
    assert partition.synic.read_msr(0, Msr.SCONTROL) == 1


def test_timer_registers_can_be_written_and_read_back():
    """Checklist row 35: UEFI clears all of them when it leaves."""
    synic = Partition(features=NOTHING).synic
    for index in range(Msr.STIMER0_CONFIG, Msr.STIMER3_COUNT + 1):
        synic.write_msr(0, index, index * 3)
        assert synic.read_msr(0, index) == index * 3
        synic.write_msr(0, index, 0)
        assert synic.read_msr(0, index) == 0
    for index in (Msr.STIMER0_CONFIG - 1, Msr.STIMER3_COUNT + 1):
        with pytest.raises(MsrError):
            synic.write_msr(0, index, 0)


@pytest.mark.parametrize("sint", range(16))
def test_a_masked_sint_may_have_any_vector(sint):
    """Checklist row 35: UEFI masks all SINTs with vector 0."""
    synic = Partition().synic
    for value in (0x10000, 0x1000F, 0x100F3):
        synic.write_msr(0, Msr.SINT0 + sint, value)
        assert synic.read_msr(0, Msr.SINT0 + sint) == value


@pytest.mark.parametrize("value", [0, 15, 0x2000F, 0x40000])
def test_an_unmasked_sint_cannot_have_the_vector_of_an_exception(value):
    synic = Partition().synic
    with pytest.raises(MsrError):
        synic.write_msr(0, Msr.SINT2, value)
    assert synic.read_msr(0, Msr.SINT2) == 0x10000
    synic.write_msr(0, Msr.SINT2, value | 16)
    assert synic.read_msr(0, Msr.SINT2) == value | 16


def test_every_vp_has_its_own_registers_and_index():
    synic = Partition(3).synic
    for vp in range(3):
        synic.write_msr(vp, Msr.SIMP, (vp + 1) << 12 | 1)
        synic.write_msr(vp, Msr.SINT2, 0x20 + vp)
        synic.write_msr(vp, Msr.VP_ASSIST_PAGE, vp << 12 | 1)
    for vp in range(3):
        assert synic.read_msr(vp, Msr.VP_INDEX) == vp
        assert synic.read_msr(vp, Msr.SIMP) == (vp + 1) << 12 | 1
        assert synic.read_msr(vp, Msr.SINT2) == 0x20 + vp
        assert synic.read_msr(vp, Msr.VP_ASSIST_PAGE) == vp << 12 | 1


@pytest.mark.parametrize(
    "msr", [Msr.VP_INDEX, Msr.SVERSION, Msr.TIME_REF_COUNT, Msr.TSC_FREQUENCY, Msr.APIC_FREQUENCY]
)
def test_some_registers_are_read_only(msr):
    with pytest.raises(MsrError):
        full_partition().synic.write_msr(0, msr, 0)


@pytest.mark.parametrize(
    "msr",
    [
        Msr.TIME_REF_COUNT,
        Msr.REFERENCE_TSC,
        Msr.TSC_FREQUENCY,
        Msr.APIC_FREQUENCY,
        Msr.TSC_INVARIANT_CONTROL,
        Msr.CRASH_P0,
        Msr.CRASH_P4,
        Msr.CRASH_CTL,
        0x4000_0003,
        0x4000_0070,
        0x4000_00F0,
        0,
    ],
)
def test_registers_that_are_not_advertised_do_not_exist(msr):
    synic = Partition(features=NOTHING).synic
    with pytest.raises(MsrError):
        synic.read_msr(0, msr)
    with pytest.raises(MsrError):
        synic.write_msr(0, msr, 0)


def test_reference_time_comes_from_the_clock():
    synic = full_partition().synic
    assert synic.read_msr(0, Msr.TIME_REF_COUNT) == 1000
    assert synic.read_msr(1, Msr.TIME_REF_COUNT) == 1001


def test_the_reference_tsc_page_says_that_it_is_invalid():
    partition = full_partition()
    partition.memory.write(0x5000, b"\xff" * 4096)
    partition.synic.write_msr(0, Msr.REFERENCE_TSC, 0x5001)
    assert partition.synic.read_msr(1, Msr.REFERENCE_TSC) == 0x5001
    assert partition.memory.read(0x5000, 4) == bytes(4)
    with pytest.raises(MsrError):
        partition.synic.write_msr(0, Msr.REFERENCE_TSC, OUTSIDE | 1)
    partition.synic.write_msr(0, Msr.REFERENCE_TSC, 0)
    assert partition.synic.read_msr(0, Msr.REFERENCE_TSC) == 0


def test_frequencies_are_those_of_the_features():
    synic = full_partition().synic
    assert synic.read_msr(0, Msr.TSC_FREQUENCY) == 2_500_000_000
    assert synic.read_msr(0, Msr.APIC_FREQUENCY) == 1_000_000_000


def test_the_invariant_tsc_is_switched_on_by_one():
    synic = full_partition().synic
    assert synic.read_msr(0, Msr.TSC_INVARIANT_CONTROL) == 0
    synic.write_msr(0, Msr.TSC_INVARIANT_CONTROL, 1)
    assert synic.read_msr(1, Msr.TSC_INVARIANT_CONTROL) == 1
    with pytest.raises(MsrError):
        synic.write_msr(0, Msr.TSC_INVARIANT_CONTROL, 2)


def test_a_crash_is_reported_with_its_parameters():
    partition = Partition(2)
    for number in range(5):
        partition.synic.write_msr(1, Msr.CRASH_P0 + number, 100 + number)
        assert partition.synic.read_msr(1, Msr.CRASH_P0 + number) == 100 + number
    assert partition.synic.read_msr(1, Msr.CRASH_CTL) == 3 << 62
    partition.synic.write_msr(1, Msr.CRASH_CTL, 0)
    assert partition.crashes == []
    partition.synic.write_msr(1, Msr.CRASH_CTL, 1 << 63)
    assert partition.crashes == [(1, (100, 101, 102, 103, 104), 1 << 63)]


def test_callbacks_that_nobody_asked_for_are_no_trouble():
    synic = Synic(allocate_memory(4096), 1, lambda vp, vector: None)
    synic.write_msr(0, Msr.EOM, 0)
    synic.write_msr(0, Msr.CRASH_CTL, 1 << 63)


def test_the_hypercall_page_appears_once_the_guest_has_said_what_it_is():
    partition = Partition()
    synic = partition.synic
    synic.write_msr(0, Msr.HYPERCALL, CODE | 1)
    assert synic.read_msr(0, Msr.HYPERCALL) == CODE
    assert not synic.hypercall_enabled
    assert partition.memory.read(CODE, 4) == bytes(4)
    synic.write_msr(0, Msr.GUEST_OS_ID, 0x8100 << 48)
    assert synic.read_msr(0, Msr.GUEST_OS_ID) == 0x8100 << 48
    synic.write_msr(0, Msr.HYPERCALL, CODE | 1)
    assert synic.read_msr(0, Msr.HYPERCALL) == CODE | 1
    assert synic.hypercall_enabled
    assert partition.memory.read(CODE, 4096) == HYPERCALL_VMCALL.ljust(4096, b"\0")
    assert HYPERCALL_VMCALL.startswith(bytes.fromhex("f30f1efa"))  # ENDBR64


def test_a_guest_without_identity_has_no_hypercall_page():
    synic = Partition().synic
    synic.write_msr(0, Msr.GUEST_OS_ID, 1)
    synic.write_msr(0, Msr.HYPERCALL, CODE | 1)
    synic.write_msr(0, Msr.GUEST_OS_ID, 0)
    assert synic.read_msr(0, Msr.HYPERCALL) == CODE
    assert not synic.hypercall_enabled


def test_a_locked_hypercall_page_stays_where_it_is_until_reset():
    synic = Partition().synic
    synic.write_msr(0, Msr.GUEST_OS_ID, 1)
    synic.write_msr(0, Msr.HYPERCALL, CODE | 3)
    synic.write_msr(0, Msr.HYPERCALL, 0)
    assert synic.read_msr(0, Msr.HYPERCALL) == CODE | 3
    synic.reset()
    synic.write_msr(0, Msr.GUEST_OS_ID, 1)
    synic.write_msr(0, Msr.HYPERCALL, SIMP | 1)
    assert synic.read_msr(0, Msr.HYPERCALL) == SIMP | 1


def test_the_vmm_chooses_the_hypercall_code():
    partition = Partition(hypercall_code=b"\xe5\x30\xc3")
    partition.synic.write_msr(0, Msr.GUEST_OS_ID, 1)
    partition.synic.write_msr(0, Msr.HYPERCALL, CODE | 1)
    assert partition.memory.read(CODE, 3) == b"\xe5\x30\xc3"


@pytest.mark.parametrize("msr", [Msr.SIMP, Msr.SIEFP])
def test_a_page_is_zeroed_when_it_appears_or_moves_but_not_in_between(msr):
    partition = Partition()
    for page in (SIMP, SIEFP):
        partition.memory.write(page, b"\xff" * 4096)
    synic = partition.synic
    synic.write_msr(0, msr, SIMP)
    assert partition.memory.read(SIMP, 1) == b"\xff"
    synic.write_msr(0, msr, SIMP | 1)
    assert partition.memory.read(SIMP, 4096) == bytes(4096)
    partition.memory.write(SIMP, b"\x01")
    synic.write_msr(0, msr, SIMP | 1)
    assert partition.memory.read(SIMP, 1) == b"\x01"
    synic.write_msr(0, msr, SIEFP | 1)
    assert partition.memory.read(SIEFP, 4096) == bytes(4096)
    synic.write_msr(0, msr, SIEFP)
    partition.memory.write(SIEFP, b"\x01")
    synic.write_msr(0, msr, SIEFP | 1)
    assert partition.memory.read(SIEFP, 1) == b"\0"


@pytest.mark.parametrize("msr", [Msr.SIMP, Msr.SIEFP, Msr.HYPERCALL])
@pytest.mark.parametrize("value", [OUTSIDE | 1, 0xFFFF_FFFF_FFFF_F001])
def test_a_page_must_be_memory(msr, value):
    synic = Partition().synic
    synic.write_msr(0, Msr.GUEST_OS_ID, 1)
    with pytest.raises(MsrError):
        synic.write_msr(0, msr, value)
    assert synic.read_msr(0, msr) == 0
    synic.write_msr(0, msr, value & ~1)
    assert synic.read_msr(0, msr) == value & ~1


def test_a_page_must_be_writable_memory():
    partition = Partition()
    rom = create_memfd("rom", 4096)
    partition.memory.add_region(0x10_0000, 4096, rom, read_only=True)
    os.close(rom)
    with pytest.raises(MsrError):
        partition.synic.write_msr(0, Msr.SIMP, 0x10_0001)


def test_writing_eom_tells_that_a_slot_is_free():
    partition = Partition(2)
    partition.synic.write_msr(1, Msr.EOM, 0)
    assert partition.freed == [1]


def test_a_guest_can_tear_everything_down_and_start_again():
    partition = Partition()
    for _ in range(2):
        synic = partition.synic
        synic.write_msr(0, Msr.GUEST_OS_ID, 0x8100 << 48)
        synic.write_msr(0, Msr.HYPERCALL, CODE | 1)
        guest = Guest(synic).enable()
        assert synic.deliver_message(0, 2, 1, b"hello").name == "DELIVERED"
        assert guest.slot().payload == b"hello"
        for msr, value in (
            (Msr.SINT2, 0x10000),
            (Msr.SIMP, 0),
            (Msr.SIEFP, 0),
            (Msr.SCONTROL, 0),
            (Msr.HYPERCALL, 0),
            (Msr.GUEST_OS_ID, 0),
        ):
            synic.write_msr(0, msr, value)
        assert synic.deliver_message(0, 2, 1, b"late").name == "DROPPED"
        synic.write_msr(0, Msr.SCONTROL, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"vp_count": 0},
        {"hypercall_code": bytes(4097)},
        {"clock": lambda: 0},
        {"features": Features(reference_time=True)},
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(options):
    with pytest.raises(ConfigError):
        Partition(**options)


def test_the_cpuid_leaves_let_every_known_guest_find_its_bus():
    """Checklist row 37."""
    for features in (NOTHING, Features(), EVERYTHING):
        leaves = cpuid_leaves(features, vp_count=4)
        eax, *vendor = leaves[0x4000_0000]
        assert b"".join(word.to_bytes(4, "little") for word in vendor) == b"Microsoft Hv"
        assert eax >= 0x4000_0005
        assert all(leaf in leaves for leaf in range(0x4000_0000, eax + 1))
        assert leaves[0x4000_0001][0].to_bytes(4, "little") == b"Hv#1"
        privileges, hypercalls, _, _ = leaves[0x4000_0003]
        assert privileges >> 5 & 1  # HYPERCALL
        assert privileges >> 6 & 1  # VP_INDEX
        assert privileges >> 2 & 1  # SYNIC
        assert hypercalls == 0x30  # PostMessages and SignalEvents; never CpuManagement, bit 12
        assert leaves[0x4000_0005][:2] == (4, 4)


def test_nothing_is_advertised_that_does_not_exist():
    leaves = cpuid_leaves(NOTHING, vp_count=1)
    assert leaves[CpuidLeaf.FEATURES] == (0x64, 0x30, 0, 0)
    assert leaves[CpuidLeaf.RECOMMENDATIONS] == (0x20, 0xFFFF_FFFF, 0, 0)


def test_what_exists_is_advertised():
    partition = full_partition()
    leaves = partition.synic.cpuid_leaves()
    assert leaves[CpuidLeaf.FEATURES] == (0x6E | 1 << 11 | 1 << 15, 0x30, 0, 0x500 | 1 << 19)
    assert leaves[CpuidLeaf.RECOMMENDATIONS][0] == 0x220
    assert leaves[CpuidLeaf.VERSION] == (14393, 10 << 16, 0, 0)


def test_unknown_frequencies_are_not_advertised():
    features = Features(tsc_frequency=1)
    assert not features.frequencies
    assert not cpuid_leaves(features, 1)[CpuidLeaf.FEATURES][0] & wire.Privilege.FREQUENCIES
