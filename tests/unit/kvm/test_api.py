"""Numbers and structures of KVM's API, against the system's own header where there is one."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

from tests.support.kvm_fakes import FakeKvm
from vmbus.errors import ConfigError
from vmbus.kvm import api

NUMBERS = {
    "KVM_GET_API_VERSION": api.GET_API_VERSION,
    "KVM_CREATE_VM": api.CREATE_VM,
    "KVM_CHECK_EXTENSION": api.CHECK_EXTENSION,
    "KVM_GET_VCPU_MMAP_SIZE": api.GET_VCPU_MMAP_SIZE,
    "KVM_GET_SUPPORTED_CPUID": api.GET_SUPPORTED_CPUID,
    "KVM_CREATE_VCPU": api.CREATE_VCPU,
    "KVM_SET_USER_MEMORY_REGION": api.SET_USER_MEMORY_REGION,
    "KVM_SET_TSS_ADDR": api.SET_TSS_ADDR,
    "KVM_SET_IDENTITY_MAP_ADDR": api.SET_IDENTITY_MAP_ADDR,
    "KVM_CREATE_IRQCHIP": api.CREATE_IRQCHIP,
    "KVM_IRQ_LINE": api.IRQ_LINE,
    "KVM_SET_GSI_ROUTING": api.SET_GSI_ROUTING,
    "KVM_IRQFD": api.IRQFD_IOCTL,
    "KVM_CREATE_PIT2": api.CREATE_PIT2,
    "KVM_RUN": api.RUN,
    "KVM_GET_REGS": api.GET_REGS,
    "KVM_SET_REGS": api.SET_REGS,
    "KVM_GET_SREGS": api.GET_SREGS,
    "KVM_SET_SREGS": api.SET_SREGS,
    "KVM_GET_MSRS": api.GET_MSRS,
    "KVM_SET_MSRS": api.SET_MSRS,
    "KVM_SET_CPUID2": api.SET_CPUID2,
    "KVM_GET_TSC_KHZ": api.GET_TSC_KHZ,
    "KVM_ENABLE_CAP": api.ENABLE_CAP_IOCTL,
    "KVM_SIGNAL_MSI": api.SIGNAL_MSI_IOCTL,
    "KVM_HYPERV_EVENTFD": api.HYPERV_EVENTFD_IOCTL,
    "KVM_GET_SUPPORTED_HV_CPUID": api.GET_SUPPORTED_HV_CPUID,
    "KVM_X86_SET_MSR_FILTER": api.X86_SET_MSR_FILTER,
    "KVM_CAP_IRQCHIP": api.CAP_IRQCHIP,
    "KVM_CAP_TSC_DEADLINE_TIMER": api.CAP_TSC_DEADLINE_TIMER,
    "KVM_CAP_IRQFD_RESAMPLE": api.CAP_IRQFD_RESAMPLE,
    "KVM_CAP_HYPERV_SYNIC2": api.CAP_HYPERV_SYNIC2,
    "KVM_CAP_HYPERV_EVENTFD": api.CAP_HYPERV_EVENTFD,
    "KVM_CAP_X86_USER_SPACE_MSR": api.CAP_X86_USER_SPACE_MSR,
    "KVM_CAP_X86_MSR_FILTER": api.CAP_X86_MSR_FILTER,
    "KVM_CAP_SYS_HYPERV_CPUID": api.CAP_SYS_HYPERV_CPUID,
    "KVM_MSR_EXIT_REASON_FILTER": api.MSR_EXIT_REASON_FILTER,
    "KVM_MSR_FILTER_READ": api.MSR_FILTER_READ,
    "KVM_MSR_FILTER_WRITE": api.MSR_FILTER_WRITE,
    "KVM_IRQFD_FLAG_RESAMPLE": api.IRQFD_RESAMPLE,
    "KVM_HYPERV_EVENTFD_DEASSIGN": api.HYPERV_EVENTFD_DEASSIGN,
    "KVM_IRQ_ROUTING_IRQCHIP": api.ROUTING_IRQCHIP,
    "KVM_IRQ_ROUTING_MSI": api.ROUTING_MSI,
    "KVM_IRQ_ROUTING_HV_SINT": api.ROUTING_HV_SINT,
    "KVM_EXIT_IO": api.Exit.IO,
    "KVM_EXIT_MMIO": api.Exit.MMIO,
    "KVM_EXIT_SHUTDOWN": api.Exit.SHUTDOWN,
    "KVM_EXIT_FAIL_ENTRY": api.Exit.FAIL_ENTRY,
    "KVM_EXIT_INTERNAL_ERROR": api.Exit.INTERNAL_ERROR,
    "KVM_EXIT_SYSTEM_EVENT": api.Exit.SYSTEM_EVENT,
    "KVM_EXIT_HYPERV": api.Exit.HYPERV,
    "KVM_EXIT_X86_RDMSR": api.Exit.X86_RDMSR,
    "KVM_EXIT_X86_WRMSR": api.Exit.X86_WRMSR,
    "KVM_SYSTEM_EVENT_CRASH": api.SYSTEM_EVENT_CRASH,
    "sizeof(struct kvm_irq_routing_entry)": api.ROUTING_ENTRY.size,
    "sizeof(struct kvm_cpuid_entry2)": api.CPUID_ENTRY.size,
    "sizeof(struct kvm_msr_entry)": api.MSR_ENTRY.size,
    "sizeof(struct kvm_msr_filter_range)": api.MSR_FILTER_RANGE.size,
    "sizeof(struct kvm_segment)": api.SEGMENT.size,
    "offsetof(struct kvm_run, immediate_exit)": api.RUN_IMMEDIATE_EXIT,
    "offsetof(struct kvm_run, exit_reason)": api.RUN_EXIT_REASON,
    "offsetof(struct kvm_run, io)": api.RUN_UNION,
    "offsetof(struct kvm_run, msr.error)": api.RUN_MSR_ERROR,
    "offsetof(struct kvm_run, msr.data)": api.RUN_MSR_DATA,
    "offsetof(struct kvm_run, hyperv.u)": api.RUN_HYPERV_BODY,
    "offsetof(struct kvm_run, hyperv.u.hcall.result)": api.RUN_HYPERV_RESULT,
    "offsetof(struct kvm_sregs, gdt)": 8 * api.SEGMENT.size,
}


def test_every_number_is_that_of_the_systems_header(tmp_path):
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n"
    for text in NUMBERS:
        source += f'    printf("%lu\\n", (unsigned long)({text}));\n'
    (tmp_path / "probe.c").write_text(source + "}\n")
    subprocess.run(["cc", "-o", tmp_path / "probe", tmp_path / "probe.c"], check=True)

    made = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True)

    assert dict(zip(NUMBERS, map(int, made.stdout.split()), strict=True)) == NUMBERS


def leaf(number: int) -> api.CpuidEntry:
    return api.CpuidEntry(number, 0, 0, number + 1, number + 2, number + 3, number + 4)


def test_leaves_are_asked_for_with_more_room_until_they_fit():
    leaves = [leaf(number) for number in range(200)]

    assert api.read_cpuid(0, api.GET_SUPPORTED_CPUID, call=FakeKvm(cpuid=leaves)) == leaves


def test_any_other_error_is_not_about_room():
    kvm = FakeKvm()
    kvm.failures[api.GET_SUPPORTED_HV_CPUID] = errno.EINVAL

    with pytest.raises(OSError, match="Invalid argument"):
        api.read_cpuid(0, api.GET_SUPPORTED_HV_CPUID, call=kvm)


def test_leaves_without_end_are_an_error():
    kvm = FakeKvm()
    kvm.failures[api.GET_SUPPORTED_CPUID] = errno.E2BIG

    with pytest.raises(OSError, match="too long"):
        api.read_cpuid(0, api.GET_SUPPORTED_CPUID, call=kvm)


def test_leaves_are_the_same_after_packing():
    leaves = [leaf(1), leaf(0x40000000)]

    assert api.unpack_cpuid(api.pack_cpuid(leaves)) == leaves


def test_an_msr_filter_denies_its_ranges_only():
    data, keep = api.pack_msr_filter([api.FilterRange(0x40000090, 16, api.MSR_FILTER_WRITE)])

    flags, _, ranges = api.MSR_FILTER.unpack(data)
    what, count, first, _, address = api.MSR_FILTER_RANGE.unpack_from(ranges)
    assert flags == 0, "allowed unless denied"
    assert (what, count, first) == (api.MSR_FILTER_WRITE, 16, 0x40000090)
    assert address
    assert keep[0].raw == bytes(2)
    assert not any(ranges[api.MSR_FILTER_RANGE.size :])


def test_a_filter_has_room_for_sixteen_ranges():
    with pytest.raises(ValueError, match="16 ranges"):
        api.pack_msr_filter([api.FilterRange(each, 1, 1) for each in range(17)])


def test_a_machine_without_kvm_is_told_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="vmbus doctor"):
        api.open_kvm(str(tmp_path / "kvm"))


def test_something_else_in_kvms_place_is_not_kvm():
    with pytest.raises(ConfigError, match="is not KVM"):
        api.open_kvm(os.devnull)


def test_another_version_of_the_api_is_refused():
    kvm = FakeKvm()
    kvm.version = 13

    with pytest.raises(ConfigError, match="version 13"):
        api.open_kvm(os.devnull, call=kvm)


def test_the_tss_address_goes_to_the_kernel():
    with pytest.raises(OSError, match="KVM_SET_TSS_ADDR"):
        api.set_tss_address(-1, 0xFFFBD000)
