"""What ``vmbus doctor`` says of KVM."""

import errno
import os
import stat

import pytest

from tests.support.checks import outcome
from vmbus.cli.checks import Outcome
from vmbus.cli.kvm_checks import (
    CAPABILITIES,
    KVM_GET_API_VERSION,
    SynicMode,
    check_guest,
    check_kvm,
)
from vmbus.errors import ConfigError
from vmbus.kvm.trial import Trial


class Kvm:
    """Answers the questions of check_kvm."""

    def __init__(self, *names, version=12, error=None):
        self.capabilities = {CAPABILITIES[f"KVM_CAP_{name}"] for name in names}
        self.version = version
        self.error = error

    def __call__(self, fd, number, argument):
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        if self.error is not None:
            raise self.error
        if number == KVM_GET_API_VERSION:
            return self.version
        return 64 if argument == 66 else int(argument in self.capabilities)


IRQ = ("IRQCHIP", "IRQFD")


KERNEL = ("HYPERV", "HYPERV_SYNIC2", "HYPERV_VP_INDEX", "HYPERV_EVENTFD")


@pytest.mark.parametrize(
    ("kvm", "mode", "states"),
    [
        (Kvm(), SynicMode.NONE, "ok missing"),
        (Kvm(*IRQ), SynicMode.NONE, "ok ok missing missing"),
        (Kvm(*IRQ, "X86_USER_SPACE_MSR"), SynicMode.USER, "ok ok ok missing"),
        (
            Kvm(*IRQ, "X86_USER_SPACE_MSR", *KERNEL, "SYS_HYPERV_CPUID"),
            SynicMode.KERNEL,
            "ok ok ok ok",
        ),
        (Kvm(*IRQ, *KERNEL, "HYPERV_CPUID"), SynicMode.KERNEL, "ok ok missing ok"),
        (Kvm(*IRQ, *KERNEL), SynicMode.KERNEL, "ok ok missing ok limited"),
        (Kvm(version=11), SynicMode.NONE, "missing"),
        (Kvm(error=OSError(errno.ENOTTY, "no ioctl")), SynicMode.NONE, "missing"),
    ],
)
def test_the_synic_mode_follows_from_what_kvm_has(tmp_path, kvm, mode, states):
    node = tmp_path / "kvm"
    node.write_bytes(b"")
    found, got, capabilities = check_kvm(str(node), kvm)
    assert got is mode
    assert " ".join(outcome(check) for check in found) == states
    if kvm.error is None:
        assert capabilities.keys() == CAPABILITIES.keys()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FileNotFoundError(errno.ENOENT, "not there"), "modprobe"),
        (PermissionError(errno.EACCES, "denied"), "usermod -aG kvm"),
        (OSError(errno.ENODEV, "no device"), "dmesg"),
    ],
)
def test_without_kvm_the_way_to_get_it_is_shown(monkeypatch, error, advice):
    def no_kvm(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_kvm)
        (check,), mode, capabilities = check_kvm()
    assert outcome(check) is Outcome.MISSING
    assert advice in check.advice
    assert (mode, capabilities, check.needed) == (SynicMode.NONE, {}, False)


FAST = (0.0001,) * 6


@pytest.mark.parametrize(
    ("seen", "state", "text"),
    [
        (Trial(FAST), Outcome.OK, "works: 1e+03 million instructions/s, 0.1 us for an exit"),
        (Trial(()), Outcome.LIMITED, "does not run at all in 1 s"),
        (
            Trial(FAST[:5]),
            Outcome.LIMITED,
            "does not take 10 interrupts of a timer in 1 s; 1e+03 million",
        ),
        (Trial(FAST[:1]), Outcome.LIMITED, "does not count to 50000 in 1 s"),
        (Trial(FAST[:1], "triple fault"), Outcome.LIMITED, "does not count to 50000: triple fault"),
        (Trial((0.1, 0.2, 0.1)), Outcome.LIMITED, "is interpreted: 0.5 million instructions/s"),
        (Trial((0.1, 0.2, *FAST[:4])), Outcome.LIMITED, "is interpreted: 0.5 million"),
    ],
    ids=str,
)
def test_a_guest_of_our_own_shows_whether_kernels_will_boot(seen, state, text):
    check = check_guest(lambda seconds: seen)
    assert check.found.startswith(text)
    assert outcome(check) is state
    assert bool(check.advice) is (state is not Outcome.OK)
    assert not check.needed


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ConfigError("no KVM")])
def test_a_machine_that_cannot_be_made_is_said(error):
    def fail(seconds):
        raise error

    check = check_guest(fail)
    assert outcome(check) is Outcome.LIMITED
    assert check.found.startswith("cannot be made: ")
