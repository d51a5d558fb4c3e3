"""The processor's loop, on a KVM that plays scripts."""

from __future__ import annotations

import errno
import threading
from contextlib import closing

import pytest

from tests.support.kvm_fakes import FakeKvm, FakePlatform, exits
from tests.support.patience import PATIENCE
from vmbus.kvm import api
from vmbus.kvm.api import Exit
from vmbus.kvm.outcome import Outcome
from vmbus.kvm.vcpu import Segment, Vcpu, ignore_kick_signal
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory


class Rig:
    def __init__(self, *steps) -> None:
        ignore_kick_signal()
        self.kvm = FakeKvm()
        self.platform = FakePlatform()
        self.vm = Vm(GuestMemory(), path="/dev/null", call=self.kvm)
        self.vcpu = Vcpu(self.vm, 0, self.platform, call=self.kvm)
        self.kvm.scripts[0].extend(steps)

    @property
    def page(self):
        return self.kvm.pages[0]

    def run(self) -> None:
        """Run the script to its end."""
        self.vcpu.start()
        assert self.kvm.idle.wait(PATIENCE)

    def run_to_end(self) -> None:
        self.vcpu.start()
        self.vcpu.join()

    def close(self) -> None:
        self.vcpu.stop()
        self.vcpu.join()
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()


@pytest.fixture
def rig():
    with closing(Rig()) as made:
        yield made


def io(direction: int, size: int, port: int, count: int = 1) -> bytes:
    return api.RUN_IO.pack(direction, size, port, count, 0x1000)


def test_an_in_gets_the_platforms_value(rig):
    rig.kvm.scripts[0].append(exits(Exit.IO, io(api.IO_IN, 2, 0x3F8)))

    rig.run()

    assert rig.platform.calls == [("in", 0x3F8, 2)]
    assert rig.page[0x1000:0x1002] == b"\x44\x33"


def test_a_string_out_is_taken_item_by_item(rig):
    def step(page) -> None:
        page[0x1000:0x1006] = bytes(range(1, 7))
        exits(Exit.IO, io(1, 2, 0x80, 3))(page)

    rig.kvm.scripts[0].append(step)
    rig.run()

    assert rig.platform.calls == [("out", 0x80, 2, value) for value in (0x201, 0x403, 0x605)]


def test_reading_where_no_memory_is_gives_ones(rig):
    rig.kvm.scripts[0].append(exits(Exit.MMIO, api.RUN_MMIO.pack(0xD0000000, bytes(8), 4, 0)))

    rig.run()

    assert rig.page[api.RUN_UNION + 8 :][:8] == b"\xff" * 4 + bytes(4)


def test_writing_where_no_memory_is_does_nothing(rig):
    rig.kvm.scripts[0].append(exits(Exit.MMIO, api.RUN_MMIO.pack(0xD0000000, b"\1" * 8, 4, 1)))

    rig.run()

    assert rig.page[api.RUN_UNION + 8 :][:8] == b"\1" * 8


@pytest.mark.parametrize("refuse", [False, True])
def test_msr_exits_return_a_value_or_a_fault(rig, refuse):
    rig.platform.refuse = refuse
    rig.kvm.scripts[0].append(exits(Exit.X86_RDMSR, api.RUN_MSR.pack(7, 2, 0x40000002, 0)))

    rig.run()

    error, _, _, value = api.RUN_MSR.unpack_from(rig.page, api.RUN_UNION)
    assert (error, value) == ((1, 0) if refuse else (0, 0x1122334455667788))


@pytest.mark.parametrize("refuse", [False, True])
def test_msr_writes_are_taken_or_refused(rig, refuse):
    rig.platform.refuse = refuse
    rig.kvm.scripts[0].append(exits(Exit.X86_WRMSR, api.RUN_MSR.pack(7, 2, 0x40000092, 0xF3)))

    rig.run()

    assert rig.platform.calls == [("wrmsr", 0x40000092, 0xF3)]
    assert rig.page[api.RUN_MSR_ERROR] == int(refuse)


def test_a_hypercall_gets_its_result_before_the_guest_goes_on(rig):
    body = api.RUN_HYPERV_TYPE.pack(api.HYPERV_EXIT_HCALL) + bytes(4)
    rig.kvm.scripts[0].append(exits(Exit.HYPERV, body + api.RUN_HYPERV_HCALL.pack(0x5C, 0, 8, 9)))

    rig.run()

    assert rig.platform.calls == [("hypercall", 0x5C, 8, 9)]
    assert rig.page[api.RUN_HYPERV_RESULT : api.RUN_HYPERV_RESULT + 8] == b"\x12" + bytes(7)


def test_writes_to_kvms_synic_are_told(rig):
    body = api.RUN_HYPERV_TYPE.pack(api.HYPERV_EXIT_SYNIC) + bytes(4)
    body += api.RUN_HYPERV_SYNIC.pack(0x40000083, 1, 0x32001, 0x31001)
    rig.kvm.scripts[0].append(exits(Exit.HYPERV, body))

    rig.run()

    assert rig.platform.calls == [("synic", 0x40000083, 1, 0x32001, 0x31001)]


def test_other_hyper_v_exits_are_nobodys(rig):
    rig.kvm.scripts[0].append(exits(Exit.HYPERV, api.RUN_HYPERV_TYPE.pack(3)))

    rig.run()

    assert rig.platform.calls == []


@pytest.mark.parametrize(
    ("reason", "body", "outcome", "text"),
    [
        (Exit.SHUTDOWN, b"", Outcome.TRIPLE_FAULT, "triple fault on VP 0"),
        (Exit.FAIL_ENTRY, api.RUN_FAIL_ENTRY.pack(0x80000021), Outcome.FAILURE, "0x80000021"),
        (Exit.INTERNAL_ERROR, api.RUN_INTERNAL_ERROR.pack(1), Outcome.FAILURE, "at 0x1234"),
        (Exit.SYSTEM_EVENT, api.RUN_SYSTEM_EVENT.pack(1), Outcome.POWER_OFF, ""),
        (Exit.SYSTEM_EVENT, api.RUN_SYSTEM_EVENT.pack(2), Outcome.RESET, ""),
        (Exit.SYSTEM_EVENT, api.RUN_SYSTEM_EVENT.pack(3), Outcome.PANIC, ""),
        (Exit.SYSTEM_EVENT, api.RUN_SYSTEM_EVENT.pack(9), Outcome.FAILURE, "system event 9"),
        (99, b"", Outcome.FAILURE, "reason 99"),
    ],
)
def test_exits_that_end_the_guest(rig, reason, body, outcome, text):
    rig.kvm.registers["rip"] = 0x1234
    rig.kvm.scripts[0].append(exits(reason, body))

    rig.run_to_end()

    (end,) = rig.platform.ends
    assert end.outcome is outcome
    assert text in end.text


def test_exits_that_ask_for_nothing_go_on(rig):
    rig.kvm.scripts[0] += [exits(Exit.INTR), exits(Exit.IRQ_WINDOW_OPEN)]

    rig.run()

    assert not rig.platform.ends


def test_a_failing_run_ends_the_guest(rig):
    rig.kvm.failures[api.RUN] = errno.EFAULT

    rig.run_to_end()

    assert rig.platform.ends[0].outcome is Outcome.FAILURE
    assert "KVM_RUN on VP 0" in rig.platform.ends[0].text


def test_a_bug_of_the_vmm_ends_the_guest_with_a_traceback(rig):
    rig.platform.write_port = None
    rig.kvm.scripts[0].append(exits(Exit.IO, io(1, 1, 0x80)))

    rig.run_to_end()

    assert rig.platform.ends[0].outcome is Outcome.FAILURE
    assert "TypeError" in rig.platform.ends[0].text


def test_work_for_a_processor_is_done_in_its_thread_and_in_order(rig):
    done = []
    finished = threading.Event()
    rig.run()

    rig.vcpu.run_later(lambda: done.append(threading.current_thread().name))
    rig.vcpu.run_later(lambda: done.append("second"))
    rig.vcpu.run_later(finished.set)

    assert finished.wait(PATIENCE)
    assert done == ["vcpu0", "second"]


def test_work_that_waits_when_the_processor_starts_is_done_first(rig):
    done = []
    rig.vcpu.run_later(lambda: done.append(list(rig.platform.calls)))
    rig.kvm.scripts[0].append(exits(Exit.IO, io(1, 1, 0x80)))

    rig.run()

    assert done == [[]]
    assert rig.platform.calls


def test_stopping_is_for_good_and_stopping_twice_is_fine(rig):
    rig.run()

    rig.vcpu.stop()
    rig.vcpu.join()
    rig.vcpu.stop()
    rig.vcpu.run_later(lambda: None)
    rig.vcpu.close()
    rig.vcpu.close()

    assert not rig.platform.ends


def test_msrs_that_kvm_does_not_have_are_an_error(rig):
    rig.kvm.msrs[0x10] = 5

    assert rig.vcpu.msr(0x10) == 5
    rig.vcpu.set_msr(0x10, 6)
    assert rig.kvm.msrs[0x10] == 6
    with pytest.raises(OSError, match="no MSR 0x11"):
        rig.vcpu.msr(0x11)
    with pytest.raises(OSError, match="does not set MSR 0x11"):
        rig.vcpu.set_msr(0x11, 1)


def test_registers_go_to_their_places(rig):
    rig.vcpu.set_registers({"rip": 0x100, "rsi": 7})
    rig.vcpu.set_special(
        {"cs": Segment(0, 0xFFFFFFFF, 0x10, 11, 1, 0, 0, 1, 1, 1)},
        {"cr3": 0x9000, "efer": 0x500},
        gdt=(0x500, 31),
        idt=(0x600, 15),
    )

    registers = api.REGS.unpack(rig.kvm.named(api.SET_REGS)[0])
    assert registers[16] == 0x100
    assert registers[4] == 7
    special = rig.kvm.named(api.SET_SREGS)[0]
    assert special[:16] == bytes.fromhex("0000000000000000 ffffffff 1000 0b 01")
    assert api.DTABLE.unpack_from(special, 192) == (0x500, 31)
    assert api.DTABLE.unpack_from(special, 208) == (0x600, 15)
    assert special[240:248] == (0x9000).to_bytes(8, "little")
    assert special[264:272] == (0x500).to_bytes(8, "little")


def test_frequency_and_capabilities(rig):
    assert rig.vcpu.tsc_frequency() == 2_000_000_000
    rig.vcpu.enable_capability(148, 3)
    assert rig.kvm.named(api.ENABLE_CAP_IOCTL)[0][:16] == bytes([148, *[0] * 7, 3, *[0] * 7])
