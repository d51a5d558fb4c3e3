"""What a VM asks of KVM."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import closing

import pytest

from tests.support.kvm_fakes import FakeKvm
from tests.support.leaks import open_descriptors
from vmbus.errors import ConfigError
from vmbus.kvm import api
from vmbus.kvm.vm import FIRST_FREE_GSI, Vm
from vmbus.memory import GuestMemory, allocate_memory


@pytest.fixture
def kvm():
    return FakeKvm({api.CAP_X86_USER_SPACE_MSR, api.CAP_X86_MSR_FILTER})


@pytest.fixture
def vm(kvm):
    with closing(Vm(GuestMemory(), path=os.devnull, call=kvm)) as made:
        yield made


def routes(kvm: FakeKvm) -> dict[int, list[tuple[int, bytes]]]:
    """Return the table last given: gsi to (type, body)."""
    data = kvm.named(api.SET_GSI_ROUTING)[-1]
    assert isinstance(data, bytes)
    count, flags = api.ROUTING_HEADER.unpack_from(data)
    assert flags == 0
    assert len(data) == api.ROUTING_HEADER.size + count * api.ROUTING_ENTRY.size
    table: dict[int, list[tuple[int, bytes]]] = {}
    for gsi, kind, _, _, body in api.ROUTING_ENTRY.iter_unpack(data[api.ROUTING_HEADER.size :]):
        table.setdefault(gsi, []).append((kind, body))
    return table


def test_all_memory_is_mapped_where_python_has_it(kvm):
    with closing(allocate_memory(0x2000, 0x1000)) as memory:
        memory.write(0x2000, b"second")
        Vm(memory, path=os.devnull, call=kvm).close()

        first, second = (
            api.MEMORY_REGION.unpack(arg) for arg in kvm.named(api.SET_USER_MEMORY_REGION)
        )
        assert first[:4] == (0, 0, 0, 0x2000)
        assert second[:4] == (1, 0, 0x2000, 0x1000)
        assert ctypes.string_at(second[4], 6) == b"second"


def test_a_vm_that_cannot_be_made_leaves_nothing_open(kvm):
    before = open_descriptors(collect=True)
    kvm.failures[api.GET_VCPU_MMAP_SIZE] = errno.EINVAL

    with pytest.raises(OSError, match="Invalid argument"):
        Vm(GuestMemory(), path=os.devnull, call=kvm)

    assert open_descriptors() == before


def test_the_timer_goes_to_pin_2_and_every_line_has_its_place(vm, kvm):
    vm.create_interrupt_controllers()

    table = routes(kvm)
    assert set(table) == set(range(24))
    chips = {gsi: [api.ROUTE_IRQCHIP.unpack_from(body) for _, body in table[gsi]] for gsi in table}
    assert chips[0] == [(api.CHIP_PIC_MASTER, 0), (api.CHIP_IOAPIC, 2)]
    assert chips[2] == [(api.CHIP_PIC_MASTER, 2)]
    assert chips[4] == [(api.CHIP_PIC_MASTER, 4), (api.CHIP_IOAPIC, 4)]
    assert chips[9] == [(api.CHIP_PIC_SLAVE, 1), (api.CHIP_IOAPIC, 9)]
    assert chips[23] == [(api.CHIP_IOAPIC, 23)]


def test_another_route_keeps_those_that_were_there(vm, kvm):
    vm.create_interrupt_controllers()
    first, second = vm.new_gsi(), vm.new_gsi()

    vm.route_msi(first, 3, 0xF3)
    vm.route_sint(second, 1, 2)
    vm.route_msi(first, 3, 0xF4)

    table = routes(kvm)
    assert (first, second) == (FIRST_FREE_GSI, FIRST_FREE_GSI + 1)
    assert len(table) == 26
    ((kind, body),) = table[first]
    assert kind == api.ROUTING_MSI
    assert api.ROUTE_MSI.unpack_from(body) == (0xFEE03000, 0, 0xF4)
    ((kind, body),) = table[second]
    assert kind == api.ROUTING_HV_SINT
    assert api.ROUTE_HV_SINT.unpack_from(body) == (1, 2)


def test_irqfds_may_have_a_second_eventfd_for_the_end_of_the_interrupt(vm, kvm):
    vm.add_irqfd(24, 7)
    vm.add_irqfd(25, 8, resample=9)

    plain, resampled = (api.IRQFD.unpack(arg) for arg in kvm.named(api.IRQFD_IOCTL))
    assert plain == (7, 24, 0, 0)
    assert resampled == (8, 25, api.IRQFD_RESAMPLE, 9)


def test_lines_and_messages_reach_kvm(vm, kvm):
    vm.set_line(4, 1)
    vm.send_msi(2, 0xF3)

    assert kvm.named(api.IRQ_LINE) == [api.IRQ_LEVEL.pack(4, 1)]
    (message,) = kvm.named(api.SIGNAL_MSI_IOCTL)
    assert api.SIGNAL_MSI.unpack(message) == (0xFEE02000, 0, 0xF3, 0, 0)


def test_doorbells_are_given_and_taken_back(vm, kvm):
    vm.add_hyperv_eventfd(0x2003, 11)
    vm.remove_hyperv_eventfd(0x2003)

    given, taken = (api.HYPERV_EVENTFD.unpack(a) for a in kvm.named(api.HYPERV_EVENTFD_IOCTL))
    assert given == (0x2003, 11, 0)
    assert taken == (0x2003, -1, api.HYPERV_EVENTFD_DEASSIGN)


def test_intercepting_msrs_needs_a_kvm_that_can(vm, kvm):
    vm.intercept_msrs([api.FilterRange(0x40000000, 8, 3)])
    assert len(kvm.named(api.X86_SET_MSR_FILTER)) == 1

    kvm.capabilities.remove(api.CAP_X86_MSR_FILTER)
    with pytest.raises(ConfigError, match=r"Linux 5\.10"):
        vm.intercept_msrs([])


def test_closing_twice_is_fine(vm):
    vm.close()
    vm.close()
    assert vm.fd == -1
