"""What ``vmbus doctor`` says of KVM."""

import errno
import os
import stat

import pytest

from tests.support.checks import outcome
from vmbus.cli.checks import Outcome
from vmbus.cli.kvm_checks import CAPABILITIES, KVM_GET_API_VERSION, SynicMode, check_kvm


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
