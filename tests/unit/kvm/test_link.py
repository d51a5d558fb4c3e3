"""The link between lives, and lives that cannot begin."""

from __future__ import annotations

import errno
import os
from contextlib import closing

import pytest

from tests.support.kvm_fakes import FakeKvm
from vmbus.errors import ConfigError
from vmbus.kvm import api
from vmbus.kvm.bzimage import EntryState
from vmbus.kvm.life import Life, SynicMode
from vmbus.kvm.link import ServerLink
from vmbus.kvm.machine import FOUR_GIB, LOW_MEMORY_LIMIT, Machine, ram_regions
from vmbus.kvm.outcome import End, Outcome
from vmbus.kvm.ports import PortBus
from vmbus.kvm.synic_kernel import CAPABILITIES, KernelSynic
from vmbus.kvm.synic_user import HYPERCALL_PORT, UserSynic
from vmbus.memory import GuestMemory, allocate_memory
from vmbus.wire.synic import HvStatus, Msr


class FakeSynic:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


@pytest.fixture
def link():
    made = ServerLink(lambda reason: None)
    made._attachment = object()  # type: ignore[assignment]
    yield made
    made._attachment = None


def test_between_lives_messages_are_dropped_and_flags_forgotten(link):
    codes: list[int] = []
    link.deliver_message(0, 2, 1, b"x", codes.append)
    link.set_flag(0, 2, 5)

    assert codes == [errno.ENXIO]


def test_a_new_life_gets_the_doorbells_that_are_still_there(link):
    first, second = FakeSynic(), FakeSynic()
    link.begin(first)
    link.event_port_added(0x11, 0, 5)
    link.event_port_added(0x12, 0, 6)
    link.event_port_removed(0x11, 0)
    link.finish()
    link.begin(second)

    assert [call[0] for call in first.calls] == [
        "attach", "event_port_added", "event_port_added", "event_port_removed",
    ]  # fmt: skip
    assert second.calls == [("attach", link.attachment), ("event_port_added", 0x12, 0, 6)]


def test_during_a_life_its_synic_gets_everything(link):
    synic = FakeSynic()
    link.begin(synic)
    link.deliver_message(0, 2, 1, b"x", None)
    link.set_flag(0, 2, 5)

    assert synic.calls[1:] == [("deliver", 0, 2, 1, b"x", None), ("set_flag", 0, 2, 5)]
    assert link.call_fd(1, 0, 2, 5, None) is False


def test_the_end_of_the_connection_is_told_unless_it_was_meant():
    reasons: list[str] = []
    link = ServerLink(reasons.append)
    link.closed("gone")
    link.close()
    link.closed("goodbye")

    assert reasons == ["gone"]


def test_memory_is_below_3_gib_and_above_4():
    assert ram_regions(1 << 30) == [(0, 1 << 30)]
    assert ram_regions(5 << 30) == [(0, LOW_MEMORY_LIMIT), (FOUR_GIB, 2 << 30)]


def load_nothing(memory: GuestMemory) -> EntryState:
    raise AssertionError("this machine never runs")


@pytest.mark.parametrize("size", [0, 1 << 20, (4 << 20) + 1])
def test_too_little_memory_or_half_a_page_is_refused(size):
    with pytest.raises(ConfigError, match="2M at least"):
        Machine(size, 1, load_nothing, lambda data: None)


class LifeRig:
    def __init__(self, capabilities=(), mode=SynicMode.AUTO) -> None:
        self.kvm = FakeKvm(capabilities)
        self.memory = allocate_memory(0x10000)
        self.ends: list[End] = []
        try:
            self.life = Life(
                self.memory, 2, PortBus(), self.ends.append,
                mode=mode, path=os.devnull, call=self.kvm,
            )  # fmt: skip
        except BaseException:
            self.memory.close()
            self.kvm.close()
            raise

    def close(self) -> None:
        self.life.close()
        self.life.close()
        self.memory.close()
        self.kvm.close()


USER = (api.CAP_X86_USER_SPACE_MSR, api.CAP_X86_MSR_FILTER)


def test_kvm_has_the_synic_if_it_can():
    with closing(LifeRig(CAPABILITIES)) as rig:
        assert isinstance(rig.life.synic, KernelSynic)
    with closing(LifeRig(USER)) as rig:
        assert isinstance(rig.life.synic, UserSynic)
    with closing(LifeRig(CAPABILITIES, SynicMode.USER)) as rig:
        assert isinstance(rig.life.synic, UserSynic)


def test_what_kvm_cannot_do_is_said_and_nothing_stays_open():
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(ConfigError, match="--synic user"):
        LifeRig(USER, SynicMode.KERNEL)
    with pytest.raises(ConfigError, match=r"Linux 5\.10"):
        LifeRig()

    assert set(os.listdir("/proc/self/fd")) == before


def test_only_the_first_end_counts():
    with closing(LifeRig(USER)) as rig:
        rig.life.ended(End(Outcome.PANIC, "first"))
        rig.life.ended(End(Outcome.TRIPLE_FAULT, "second"))

    assert rig.ends == [End(Outcome.PANIC, "first")]


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
