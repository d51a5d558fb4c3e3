"""Kernel mode on a KVM that plays scripts: what is KVM's, what is followed, who writes slots."""

from __future__ import annotations

import errno
import os
import queue
from contextlib import closing

import pytest

from tests.support.kvm_fakes import FakeKvm, FakePlatform
from tests.support.patience import PATIENCE
from vmbus.kvm import api
from vmbus.kvm.synic_kernel import CAPABILITIES, KernelSynic, has_virtual_apic, is_possible
from vmbus.kvm.vcpu import Vcpu, ignore_kick_signal
from vmbus.kvm.vm import Vm
from vmbus.memory import allocate_memory
from vmbus.synic.model import MsrError
from vmbus.wire import synic as wire
from vmbus.wire.synic import CpuidLeaf, HvStatus, MiscFeature, Msr, Privilege, Recommendation

SIMP, SIEFP = 0x4000, 0x5000
VECTOR = 0xF3


class Done:
    """Stands for a delivery of the attachment's."""

    def __init__(self) -> None:
        self.codes: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.pending = True

    def __call__(self, code: int = 0) -> None:
        self.pending = False
        self.codes.put(code)

    def wait(self) -> int:
        return self.codes.get(timeout=PATIENCE)


class Ports:
    def __init__(self) -> None:
        self.signals: list[tuple[int, int]] = []

    def post_message(self, connection_id, message_type, vp, payload):
        return HvStatus.SUCCESS

    def signal_event(self, connection_id, flag):
        self.signals.append((connection_id, flag))
        return HvStatus.SUCCESS


class Rig:
    def __init__(self, vp_count: int = 1, *, virtual_apic: bool = False, **options) -> None:
        ignore_kick_signal()
        self.kvm = FakeKvm(CAPABILITIES, **options)
        self.kvm.msrs = {Msr.SINT0 + sint: wire.SINT_MASKED for sint in range(16)}
        self.memory = allocate_memory(0x10000)
        self.vm = Vm(self.memory, path=os.devnull, call=self.kvm)
        self.crashes: list[str] = []
        self.synic = KernelSynic(
            self.vm, self.memory, vp_count,
            crashed=self.crashes.append, virtual_apic=virtual_apic,
        )  # fmt: skip
        self.ports = self.synic.model.ports = Ports()
        self.vcpus = [
            Vcpu(self.vm, index, FakePlatform(), call=self.kvm) for index in range(vp_count)
        ]
        self.synic.add_processors(self.vcpus)

    def enable(self) -> None:
        """Do what Linux does, and what KVM tells of it."""
        vcpu = self.vcpus[0]
        self.synic.synic_written(vcpu, Msr.SIMP, 1, 0, SIMP | 1)
        self.synic.synic_written(vcpu, Msr.SIEFP, 1, SIEFP | 1, SIMP | 1)
        self.synic.write_msr(vcpu, Msr.SINT2, VECTOR)

    def irqfd(self, number: int = 0) -> tuple[int, int]:
        """Return (raise, resample) of the irqfd that was made as number so and so."""
        arg = self.kvm.named(api.IRQFD_IOCTL)[number]
        assert isinstance(arg, bytes)
        fd, _, flags, resample = api.IRQFD.unpack(arg)
        assert flags == api.IRQFD_RESAMPLE
        return fd, resample

    def raised(self, number: int = 0) -> int:
        """Return how often a SINT was raised since the last look."""
        try:
            return os.eventfd_read(self.irqfd(number)[0])
        except BlockingIOError:
            return 0

    def slot(self) -> wire.SlotMessage:
        data = self.memory.read(SIMP + 2 * wire.MESSAGE_SIZE, wire.MESSAGE_SIZE)
        return wire.parse_message_slot_untrusted(data)

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.stop()
        for vcpu in self.vcpus:
            vcpu.join()
        self.synic.close()
        self.synic.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.kvm.close()
        self.memory.close()


@pytest.fixture
def rig():
    with closing(Rig()) as made:
        yield made


def test_it_takes_all_the_capabilities(rig):
    assert is_possible(rig.vm)
    rig.kvm.capabilities.discard(api.CAP_X86_MSR_FILTER)
    assert not is_possible(rig.vm)


def test_synics_are_activated_before_routes_are_made():
    with closing(Rig(2)) as rig:
        order = [
            request
            for request, arg in rig.kvm.calls
            if request == api.SET_GSI_ROUTING
            or (
                request == api.ENABLE_CAP_IOCTL
                and isinstance(arg, bytes)
                and arg[0] == api.CAP_HYPERV_SYNIC2
            )
        ]
        assert order == [api.ENABLE_CAP_IOCTL] * 2 + [api.SET_GSI_ROUTING] * 2
        assert rig.synic.sint_eventfd(1) == rig.irqfd(1)[0]


def test_a_message_goes_into_the_slot_and_raises_the_sint(rig):
    rig.enable()
    rig.vcpus[0].start()
    done = Done()

    rig.synic.deliver(0, 2, 1, b"hello", done)

    assert done.wait() == 0
    assert rig.slot() == wire.SlotMessage(1, False, 0, b"hello")
    assert rig.raised() == 1


def test_nothing_is_delivered_before_the_processor_is_out_of_the_guest(rig):
    rig.enable()
    done = Done()

    rig.synic.deliver(0, 2, 1, b"hello", done)

    assert rig.slot().message_type == 0
    rig.vcpus[0].start()
    assert done.wait() == 0


def test_a_message_that_finds_the_slot_taken_waits_for_the_end_of_the_one_before(rig):
    rig.enable()
    rig.vcpus[0].start()
    first, second = Done(), Done()
    rig.synic.deliver(0, 2, 1, b"first", first)
    rig.synic.deliver(0, 2, 1, b"second", second)
    assert first.wait() == 0
    assert rig.kvm.idle.wait(PATIENCE)

    # An interrupt that ends with the slot still taken changes nothing but the pending flag.
    resample = rig.irqfd()[1]
    os.eventfd_write(resample, 1)
    while not rig.slot().pending:
        pass
    assert second.pending
    rig.memory.write(SIMP + 2 * wire.MESSAGE_SIZE, bytes(4))
    os.eventfd_write(resample, 1)

    assert second.wait() == 0
    assert rig.slot().payload == b"second"


def test_messages_without_a_page_are_dropped(rig):
    rig.vcpus[0].start()
    done = Done()

    rig.synic.deliver(0, 2, 1, b"hello", done)

    assert done.wait() == errno.ENXIO


def test_deliveries_that_were_called_off_are_not_made(rig):
    rig.enable()
    done = Done()
    done.pending = False

    rig.synic.deliver(0, 2, 1, b"hello", done)
    rig.vcpus[0].start()

    assert rig.kvm.idle.wait(PATIENCE)
    assert rig.slot().message_type == 0


@pytest.mark.parametrize(
    ("message_type", "payload", "code"),
    [(0, b"", errno.EINVAL), (1, bytes(241), errno.EINVAL)],
)
def test_messages_that_no_slot_can_hold_are_refused(rig, message_type, payload, code):
    rig.enable()
    rig.vcpus[0].start()
    done = Done()

    rig.synic.deliver(0, 2, message_type, payload, done)

    assert done.wait() == code


def test_sints_are_written_in_kvm_and_in_the_model(rig):
    rig.synic.write_msr(rig.vcpus[0], Msr.SINT2, VECTOR)

    assert rig.kvm.msrs[Msr.SINT2] == VECTOR
    assert rig.synic.model.read_msr(0, Msr.SINT2) == VECTOR


def test_a_sint_with_an_exceptions_vector_is_refused_and_kvm_keeps_the_old(rig):
    rig.enable()

    with pytest.raises(MsrError):
        rig.synic.write_msr(rig.vcpus[0], Msr.SINT2, 5)

    assert rig.kvm.msrs[Msr.SINT2] == VECTOR


def test_other_sints_get_a_line_when_they_are_first_unmasked(rig):
    rig.enable()
    rig.synic.write_msr(rig.vcpus[0], Msr.SINT0 + 4, wire.SINT_MASKED)
    assert len(rig.kvm.named(api.IRQFD_IOCTL)) == 1

    rig.synic.write_msr(rig.vcpus[0], Msr.SINT0 + 4, 0xF4)
    rig.synic.set_flag(0, 4, 7)

    assert rig.raised(1) == 1
    assert rig.raised(0) == 0
    assert rig.memory.read(SIEFP + 4 * 256, 1) == b"\x80"


def test_an_interrupt_that_was_lost_while_masked_comes_when_it_is_unmasked(rig):
    rig.enable()
    rig.synic.write_msr(rig.vcpus[0], Msr.SINT2, VECTOR | wire.SINT_MASKED)
    rig.vcpus[0].start()
    done = Done()
    rig.synic.deliver(0, 2, 1, b"x", done)
    assert done.wait() == 0
    assert rig.raised() == 0

    rig.synic.write_msr(rig.vcpus[0], Msr.SINT2, VECTOR)

    assert rig.raised() == 1


def test_nobody_is_interrupted_for_a_vector_that_no_sint_has(rig):
    rig.enable()

    rig.synic.interrupt(0, 0x55)

    assert rig.raised() == 0


def test_flags_are_set_in_the_page_that_kvm_told_of(rig):
    rig.enable()

    rig.synic.set_flag(0, 2, 5)

    assert rig.memory.read(SIEFP + 2 * 256, 1) == b"\x20"
    assert rig.raised() == 1


def test_a_page_that_is_no_memory_is_no_page(rig):
    rig.enable()

    rig.synic.synic_written(rig.vcpus[0], Msr.SIMP, 1, SIEFP | 1, 0x1234_5000 | 1)

    assert rig.synic.model.read_msr(0, Msr.SIMP) == 0


def test_doorbells_with_flag_0_are_kvms(rig):
    rig.synic.event_port_added(0x2003, 0, 5)
    rig.synic.event_port_added(0x2003, 1, 6)
    rig.synic.event_port_removed(0x2003, 1)
    rig.synic.event_port_removed(0x2003, 0)

    calls = [api.HYPERV_EVENTFD.unpack(arg) for arg in rig.kvm.named(api.HYPERV_EVENTFD_IOCTL)]
    assert calls == [(0x2003, 5, 0), (0x2003, -1, 1)]


def test_kvm_passes_the_parameter_of_a_signal_itself_whatever_the_form(rig):
    for control in (0x5D, 0x1005D):
        assert rig.synic.hypercall(rig.vcpus[0], control, 0x0001_0000_2003, 0) == 0

    assert rig.ports.signals == [(0x2003, 1)] * 2


def test_a_posted_message_is_read_from_memory(rig):
    rig.memory.write(0x6000, wire.build_post_message(1, 1, b"hi"))

    assert rig.synic.hypercall(rig.vcpus[0], 0x5C, 0x6000, 0) == HvStatus.SUCCESS
    assert rig.synic.hypercall(rig.vcpus[0], 0x5C, 0x6001, 0) == HvStatus.INVALID_ALIGNMENT


def test_crash_registers_are_the_models(rig):
    vcpu = rig.vcpus[0]
    assert rig.synic.read_msr(vcpu, Msr.CRASH_CTL) >> 62 == 3
    rig.memory.write(0x7000, b"oops")
    rig.synic.write_msr(vcpu, Msr.CRASH_P0 + 3, 0x7000)
    rig.synic.write_msr(vcpu, Msr.CRASH_P4, 4)
    rig.synic.write_msr(vcpu, Msr.CRASH_CTL, 3 << 62)

    assert rig.crashes == ["oops"]


def test_leaves_claim_what_kvm_has():
    has = Privilege.SYNIC | Privilege.HYPERCALL | Privilege.VP_INDEX | Privilege.REFERENCE_TSC
    features = api.CpuidEntry(CpuidLeaf.FEATURES, 0, 0, has, 0, 0, MiscFeature.DIRECT_TIMERS)
    hints = Recommendation.APIC_MSRS | Recommendation.REMOTE_TLB_FLUSH
    recommended = api.CpuidEntry(CpuidLeaf.RECOMMENDATIONS, 0, 0, hints, 0, 0, 0)
    with closing(Rig(hv_cpuid=[features, recommended])) as rig:
        rig.kvm.capabilities.add(api.CAP_SYS_HYPERV_CPUID)

        leaves = rig.synic.leaves()

    assert leaves[CpuidLeaf.FEATURES][0] == has
    assert leaves[CpuidLeaf.FEATURES][1] == 0x30
    assert leaves[CpuidLeaf.FEATURES][3] == MiscFeature.DIRECT_TIMERS | MiscFeature.CRASH_MSRS
    assert leaves[CpuidLeaf.RECOMMENDATIONS][0] == (
        Recommendation.APIC_MSRS | Recommendation.RELAXED_TIMING
    )
    assert leaves[CpuidLeaf.VENDOR][1] == int.from_bytes(b"Micr", "little")


@pytest.mark.parametrize("virtual_apic", [False, True])
def test_guests_end_their_interrupts_themselves_only_where_that_needs_no_exit(virtual_apic):
    with closing(Rig(virtual_apic=virtual_apic)) as rig:
        hints = rig.synic.leaves()[CpuidLeaf.RECOMMENDATIONS][0]

    assert bool(hints & Recommendation.DEPRECATE_AUTO_EOI) is virtual_apic


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, False),
        ({"kvm_intel/parameters/enable_apicv": "Y\n"}, True),
        ({"kvm_intel/parameters/enable_apicv": "N\n"}, False),
        ({"kvm_amd/parameters/avic": "1\n"}, True),
        ({"kvm_amd/parameters/avic": "0\n", "kvm_intel/parameters/enable_apicv": "Y\n"}, True),
    ],
)
def test_a_virtual_apic_is_what_kvm_says_it_uses(tmp_path, files, found):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)

    assert has_virtual_apic(tmp_path) is found


def test_without_being_told_leaves_claim_what_every_such_kvm_has(rig):
    eax = rig.synic.leaves()[CpuidLeaf.FEATURES][0]

    assert eax & Privilege.REFERENCE_TSC
    assert eax & Privilege.SYNTHETIC_TIMERS
