"""What KVM on this machine offers to a VMM whose guest speaks VMBus.

Numbers are from linux/include/uapi/linux/kvm.h. Since Linux 6.8 Hyper-V support is an option of
the kernel's configuration (CONFIG_KVM_HYPERV), so it is asked for and never assumed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from enum import StrEnum

from vmbus.cli.checks import Check, Outcome
from vmbus.errors import VMBusError
from vmbus.kvm.trial import STEPS, Trial, try_guest

KVM_GET_API_VERSION = 0xAE00
KVM_CHECK_EXTENSION = 0xAE03
KVM_API_VERSION = 12

CAPABILITIES = {
    "KVM_CAP_IRQCHIP": 0,
    "KVM_CAP_IRQFD": 32,
    "KVM_CAP_HYPERV": 44,
    "KVM_CAP_MAX_VCPUS": 66,
    "KVM_CAP_HYPERV_SYNIC": 123,
    "KVM_CAP_HYPERV_SYNIC2": 148,
    "KVM_CAP_HYPERV_VP_INDEX": 149,
    "KVM_CAP_HYPERV_EVENTFD": 154,
    "KVM_CAP_HYPERV_CPUID": 167,
    "KVM_CAP_X86_USER_SPACE_MSR": 188,
    "KVM_CAP_X86_MSR_FILTER": 189,
    "KVM_CAP_SYS_HYPERV_CPUID": 191,
    "KVM_CAP_HYPERV_ENFORCE_CPUID": 199,
}

BASIC = ("KVM_CAP_IRQCHIP", "KVM_CAP_IRQFD")
KERNEL_SYNIC = (
    "KVM_CAP_HYPERV",
    "KVM_CAP_HYPERV_SYNIC2",
    "KVM_CAP_HYPERV_VP_INDEX",
    "KVM_CAP_HYPERV_EVENTFD",
)
USER_SYNIC = ("KVM_CAP_X86_USER_SPACE_MSR",)

GROUP = "virtual machines (KVM)"

TRIAL_SECONDS = 1.0
"""For a guest of our own; it needs some milliseconds where all is well."""
SLOWEST = 20e6
"""Instructions per second. Processors do a hundred times that; what is below is no processor."""

Ioctl = Callable[[int, int, int], int]


class SynicMode(StrEnum):
    """Who carries out the guest's synthetic interrupt controller."""

    KERNEL = "kernel"
    USER = "user"
    NONE = "none"


MODE_TEXT = {
    SynicMode.KERNEL: "kernel: KVM has the guest's SynIC, doorbells are eventfds",
    SynicMode.USER: "user: the VMM carries out the guest's SynIC (vmbus.synic.model)",
    SynicMode.NONE: "none: no virtual machines here, only guests in Python",
}


def check_kvm(
    path: str = "/dev/kvm", ioctl: Ioctl = fcntl.ioctl
) -> tuple[list[Check], SynicMode, dict[str, int]]:
    """Look at KVM.

    Args:
        path: The device.
        ioctl: Called with descriptor, number and argument.

    Returns:
        The checks, the SynIC mode that a VMM gets, and the capabilities by name.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        advice = (
            "switch virtualization on in the firmware and load it: sudo modprobe kvm-intel, or "
            "kvm-amd; in a virtual machine, its host has to allow nesting"
        )
        return [_device(path, "not there", advice)], SynicMode.NONE, {}
    except PermissionError as error:
        advice = "join its group and log in again: sudo usermod -aG kvm $USER"
        return [_device(path, str(error.strerror), advice)], SynicMode.NONE, {}
    except OSError as error:
        advice = "look into the kernel's log: dmesg | grep -i kvm"
        return [_device(path, str(error.strerror), advice)], SynicMode.NONE, {}
    try:
        version = ioctl(fd, KVM_GET_API_VERSION, 0)
        found = {name: ioctl(fd, KVM_CHECK_EXTENSION, n) for name, n in CAPABILITIES.items()}
    except OSError as error:
        advice = "another driver has its place; look at it with: ls -l /dev/kvm"
        return [_device(path, f"not KVM: {error.strerror}", advice)], SynicMode.NONE, {}
    finally:
        os.close(fd)
    if version != KVM_API_VERSION:
        advice = "a newer Linux kernel is needed"
        return [_device(path, f"API version {version}", advice)], SynicMode.NONE, found
    return _judge(path, found)


def check_guest(trial: Callable[[float], Trial] = try_guest) -> Check:
    """Run a guest of our own and judge what it does. KVM has to be usable. Takes up to a second."""
    name = "a guest of our own"
    elsewhere = "kernels will not boot here in useful time; use another machine, or an emulated one"
    try:
        seen = trial(TRIAL_SECONDS)
    except (OSError, VMBusError) as error:
        return _row(name, Outcome.LIMITED, f"cannot be made: {error}", elsewhere)
    speed, exit_seconds = seen.instructions, seen.exit_seconds
    words = []
    if speed is not None:
        words.append(f"{speed / 1e6:,.3g} million instructions/s")
    if exit_seconds is not None:
        words.append(f"{exit_seconds * 1e6:,.3g} us for an exit")
    figures = ", ".join(words)
    if seen.problem:
        step = STEPS[len(seen.seconds)] if not seen.complete else "end"
        text = f"does not {step}: {seen.problem}"
        return _row(name, Outcome.LIMITED, text, elsewhere)
    if speed is not None and speed < SLOWEST:
        text = f"is interpreted: {figures}"
        return _row(name, Outcome.LIMITED, text, elsewhere)
    if not seen.complete:
        text = f"does not {STEPS[len(seen.seconds)]} in {TRIAL_SECONDS:g} s"
        return _row(name, Outcome.LIMITED, f"{text}; {figures}" if figures else text, elsewhere)
    return _row(name, Outcome.OK, f"works: {figures}", "")


def _device(path: str, found: str, advice: str) -> Check:
    outcome = Outcome.MISSING if advice else Outcome.OK
    return Check(group=GROUP, name=path, outcome=outcome, found=found, advice=advice)


def _judge(path: str, found: dict[str, int]) -> tuple[list[Check], SynicMode, dict[str, int]]:
    def lacking(names: tuple[str, ...]) -> str:
        return ", ".join(name for name in names if not found[name])

    checks = [_device(path, f"works, up to {found['KVM_CAP_MAX_VCPUS']} VPs", "")]
    mode = SynicMode.NONE
    if lack := lacking(BASIC):
        checks.append(_row("interrupts", Outcome.MISSING, f"without {lack}", "a newer kernel"))
        return checks, mode, found
    checks.append(_row("interrupts", Outcome.OK, "irqchip and irqfd", ""))
    if lack := lacking(USER_SYNIC):
        advice = "Linux 5.10 or newer has it"
        checks.append(_row("SynIC in user space", Outcome.MISSING, f"without {lack}", advice))
    else:
        mode = SynicMode.USER
        checks.append(_row("SynIC in user space", Outcome.OK, "MSR exits", ""))
    if lack := lacking(KERNEL_SYNIC):
        advice = "optional, faster: a kernel with CONFIG_KVM_HYPERV=y"
        checks.append(_row("SynIC in the kernel", Outcome.MISSING, f"without {lack}", advice))
    else:
        mode = SynicMode.KERNEL
        checks.append(_row("SynIC in the kernel", Outcome.OK, "SYNIC2, eventfd, VP index", ""))
        if not (found["KVM_CAP_HYPERV_CPUID"] or found["KVM_CAP_SYS_HYPERV_CPUID"]):
            advice = "the VMM has to know the leaves by itself"
            checks.append(_row("Hyper-V CPUID leaves", Outcome.LIMITED, "not told", advice))
    return checks, mode, found


def _row(name: str, outcome: Outcome, found: str, advice: str) -> Check:
    return Check(group=GROUP, name=name, outcome=outcome, found=found, advice=advice)
