"""A KVM that does nothing but note what it was asked for, where there is none or to look closely.

Descriptors are real, so that they can be mapped and closed. A processor's KVM_RUN takes the next
step of its script: a function that gets the shared page and writes an exit into it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.patience import LOOK
from vmbus.kvm import api
from vmbus.kvm.outcome import End
from vmbus.kvm.vcpu import Vcpu
from vmbus.synic.msrs import MsrError

RUN_SIZE = 3 * mmap.PAGESIZE
Step = Callable[[mmap.mmap], None]


class FakeKvm:
    """Answers ioctls.

    Args:
        capabilities: Those it has.
        cpuid: Leaves it supports.
        hv_cpuid: Hyper-V leaves it supports.
    """

    def __init__(
        self,
        capabilities: Iterable[int] = (),
        *,
        cpuid: Iterable[api.CpuidEntry] = (),
        hv_cpuid: Iterable[api.CpuidEntry] = (),
    ) -> None:
        self.capabilities = set(capabilities)
        self.cpuid = list(cpuid)
        self.hv_cpuid = list(hv_cpuid)
        self.calls: list[tuple[int, bytes | int]] = []
        self.msrs: dict[int, int] = {}
        self.registers: dict[str, int] = {}
        self.failures: dict[int, int] = {}
        """Request to errno."""
        self.scripts: dict[int, deque[Step]] = {}
        """Processor to what its next KVM_RUNs do."""
        self.pages: dict[int, mmap.mmap] = {}
        self._vcpus: dict[int, int] = {}
        self.version = api.API_VERSION
        self.idle = threading.Event()
        """Set when a processor has nothing more to do."""

    def __call__(self, fd: int, request: int, arg: int | bytearray = 0, /) -> int:
        if request in self.failures:
            raise OSError(self.failures[request], os.strerror(self.failures[request]))
        if request == api.RUN:
            return self._enter(self._vcpus[fd])
        self.calls.append((request, bytes(arg) if isinstance(arg, bytearray) else arg))
        answer = self._answers().get(request)
        return answer(fd, arg) if answer is not None else 0

    def _answers(self) -> dict[int, Callable[[int, Any], int]]:
        return {
            api.GET_API_VERSION: lambda fd, arg: self.version,
            api.CHECK_EXTENSION: lambda fd, arg: int(arg in self.capabilities),
            api.CREATE_VM: lambda fd, arg: os.open(os.devnull, os.O_RDWR),
            api.GET_VCPU_MMAP_SIZE: lambda fd, arg: RUN_SIZE,
            api.GET_SUPPORTED_CPUID: lambda fd, arg: self._leaves(self.cpuid, arg),
            api.GET_SUPPORTED_HV_CPUID: lambda fd, arg: self._leaves(self.hv_cpuid, arg),
            api.CREATE_VCPU: self._create_vcpu,
            api.GET_TSC_KHZ: lambda fd, arg: 2_000_000,
            api.GET_REGS: self._get_registers,
            api.SET_MSRS: self._set_msrs,
            api.GET_MSRS: self._get_msrs,
        }

    def _leaves(self, leaves: list[api.CpuidEntry], arg: bytearray) -> int:
        room, _ = api.CPUID_HEADER.unpack_from(arg)
        if room < len(leaves):
            raise OSError(errno.E2BIG, "too many")
        data = api.pack_cpuid(leaves)
        arg[: len(data)] = data
        return 0

    def _create_vcpu(self, fd: int, index: int) -> int:
        made = os.memfd_create("vcpu")
        os.ftruncate(made, RUN_SIZE)
        self._vcpus[made] = index
        self.pages[index] = mmap.mmap(made, RUN_SIZE)
        self.scripts.setdefault(index, deque())
        return made

    def _get_registers(self, fd: int, arg: bytearray) -> int:
        from vmbus.kvm.vcpu import REGISTERS

        api.REGS.pack_into(arg, 0, *(self.registers.get(name, 0) for name in REGISTERS))
        return 0

    def _set_msrs(self, fd: int, arg: bytearray) -> int:
        index, _, value = api.MSR_ENTRY.unpack_from(arg, api.MSR_HEADER.size)
        if index not in self.msrs:
            return 0
        self.msrs[index] = value
        return 1

    def _get_msrs(self, fd: int, arg: bytearray) -> int:
        index, _, _ = api.MSR_ENTRY.unpack_from(arg, api.MSR_HEADER.size)
        if index not in self.msrs:
            return 0
        api.MSR_ENTRY.pack_into(arg, api.MSR_HEADER.size, index, 0, self.msrs[index])
        return 1

    def _enter(self, index: int) -> int:
        page = self.pages[index]
        if page[api.RUN_IMMEDIATE_EXIT]:
            raise InterruptedError(errno.EINTR, "kicked")
        script = self.scripts[index]
        if not script:
            self.idle.set()
            # The signal does not reach a thread that waits in Python.
            while not page[api.RUN_IMMEDIATE_EXIT]:
                threading.Event().wait(LOOK)
            raise InterruptedError(errno.EINTR, "kicked")
        script.popleft()(page)
        return 0

    def named(self, request: int) -> list[bytes | int]:
        """Return the arguments of all calls of one kind."""
        return [arg for each, arg in self.calls if each == request]

    def close(self) -> None:
        """Unmap the processors' pages."""
        for page in self.pages.values():
            page.close()


def exits(reason: int, body: bytes = b"", at: int = api.RUN_UNION) -> Step:
    """Return a step that leaves the guest for a reason."""

    def step(page: mmap.mmap) -> None:
        page[api.RUN_EXIT_REASON : api.RUN_EXIT_REASON + 4] = reason.to_bytes(4, "little")
        page[at : at + len(body)] = body

    return step


class FakePlatform:
    """Notes what a processor asks for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ends: list[End] = []
        self.ended_event = threading.Event()
        self.refuse = False

    def read_port(self, vcpu: Vcpu, port: int, size: int) -> int:
        self.calls.append(("in", port, size))
        return 0x11223344 & (1 << 8 * size) - 1

    def write_port(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        self.calls.append(("out", port, size, value))

    def read_msr(self, vcpu: Vcpu, index: int) -> int:
        self.calls.append(("rdmsr", index))
        if self.refuse:
            raise MsrError("no")
        return 0x1122334455667788

    def write_msr(self, vcpu: Vcpu, index: int, value: int) -> None:
        self.calls.append(("wrmsr", index, value))
        if self.refuse:
            raise MsrError("no")

    def synic_written(self, vcpu: Vcpu, msr: int, control: int, siefp: int, simp: int) -> None:
        self.calls.append(("synic", msr, control, siefp, simp))

    def hypercall(self, vcpu: Vcpu, control: int, first: int, second: int) -> int:
        self.calls.append(("hypercall", control, first, second))
        return 0x12

    def ended(self, end: End) -> None:
        self.ends.append(end)
        self.ended_event.set()
