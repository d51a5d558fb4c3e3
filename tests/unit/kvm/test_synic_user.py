"""The SynIC in this process: hypercalls by a port, event flags by a line."""

from __future__ import annotations

from contextlib import closing

from tests.support.kvm_life import USER, LifeRig
from vmbus.kvm import api
from vmbus.kvm.synic_user import HYPERCALL_PORT
from vmbus.wire.synic import HvStatus, Msr


def test_the_hypercall_port_takes_calls_of_an_enabled_page_only():
    with closing(LifeRig(USER)) as rig:
        life, vcpu = rig.life, rig.life.vcpus[0]
        rig.kvm.registers = {"rcx": 0x99}

        assert life.read_port(vcpu, HYPERCALL_PORT, 4) == HvStatus.INVALID_PARTITION_STATE
        life.write_msr(vcpu, Msr.GUEST_OS_ID, 1)
        life.write_msr(vcpu, Msr.HYPERCALL, 0x4001)
        assert life.read_port(vcpu, HYPERCALL_PORT, 4) == HvStatus.INVALID_HYPERCALL_CODE
        assert life.read_port(vcpu, HYPERCALL_PORT, 1) == 0xFF
        assert rig.memory.read(0x4000, 7) == bytes.fromhex("f30f1efa e5e4 c3")


def test_the_line_of_event_flags_follows_the_vector_of_sint_2():
    with closing(LifeRig(USER)) as rig:
        life, vcpu = rig.life, rig.life.vcpus[1]
        for value in (0xF3, 0xF3, 0x10000, 0xF4):
            life.write_msr(vcpu, Msr.SINT2, value)

        tables = rig.kvm.named(api.SET_GSI_ROUTING)
        last = tables[-1]
        assert isinstance(last, bytes)
        assert api.ROUTE_MSI.pack(0xFEE01000, 0, 0xF4) in last
        assert len(tables) == 3, "the controllers', and one for each new vector"
        assert life.read_msr(vcpu, Msr.SINT2) == 0xF4
