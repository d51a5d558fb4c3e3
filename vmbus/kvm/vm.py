"""One KVM virtual machine: memory, interrupt controllers, routes and eventfds.

A :class:`Vm` has no state that a reset would have to undo: for that it is closed and another is
made (:mod:`vmbus.kvm.life`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterable

from vmbus.errors import ConfigError
from vmbus.kvm import api
from vmbus.memory import GuestMemory

IOAPIC_PINS = 24
PIC_PINS = 16
TIMER_PIN = 2
"""The I/O APIC pin of the ISA timer, which is line 0 of the PIC; the MADT says the same."""
FIRST_FREE_GSI = IOAPIC_PINS
MSI_ADDRESS = 0xFEE0_0000
"""Physical destination mode, APIC id in bits 19:12 (Intel SDM 3A 11.11.1)."""
MAX_VPS = 255
"""APIC ids in MSI addresses have 8 bits, and 255 is everybody."""
IDENTITY_MAP = 0xFEFF_C000
TSS = IDENTITY_MAP + 0x1000
"""Four pages that KVM keeps for itself on some Intel processors; in no hole that is used."""


def msi_address(apic_id: int) -> int:
    """Return the address to which a device writes to interrupt one processor."""
    return MSI_ADDRESS | apic_id << 12


class Vm:
    """A virtual machine without processors. May be used from any thread.

    Args:
        memory: Mapped as it is now; borrowed, and must outlive the VM and its processors.
        path: KVM's device.
        call: Makes ioctls.

    Raises:
        ConfigError: There is no usable KVM.
        OSError: It would not make a VM.
    """

    def __init__(
        self, memory: GuestMemory, *, path: str = "/dev/kvm", call: api.Ioctl = api.ioctl
    ) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._routes: dict[int, list[bytes]] = {}
        self._next_gsi = FIRST_FREE_GSI
        self.fd = -1
        self.kvm = api.open_kvm(path, call=call)
        """The descriptor of KVM itself, for questions about the system."""
        try:
            self.fd = call(self.kvm, api.CREATE_VM, 0)
            self.run_size = call(self.kvm, api.GET_VCPU_MMAP_SIZE, 0)
            """Bytes of the page(s) shared with each processor."""
            self._prepare_real_mode()
            self._map(memory)
        except BaseException:
            self.close()
            raise

    def call(self, request: int, arg: int | bytearray = 0) -> int:
        """Make an ioctl on the VM. Raises OSError."""
        return self._call(self.fd, request, arg)

    def cpuid(self, request: int) -> list[api.CpuidEntry]:
        """Ask KVM for leaves: GET_SUPPORTED_CPUID or GET_SUPPORTED_HV_CPUID. Raises OSError."""
        return api.read_cpuid(self.kvm, request, call=self._call)

    def capability(self, number: int) -> int:
        """Return what KVM says of a capability, 0 if it does not have it."""
        return self._call(self.kvm, api.CHECK_EXTENSION, number)

    def _prepare_real_mode(self) -> None:
        """Application processors start in real mode, which old Intel processors cannot run."""
        self.call(api.SET_IDENTITY_MAP_ADDR, bytearray(IDENTITY_MAP.to_bytes(8, "little")))
        if self._call is api.ioctl:
            api.set_tss_address(self.fd, TSS)

    def _map(self, memory: GuestMemory) -> None:
        for slot, region in enumerate(memory.regions):
            address = ctypes.addressof(ctypes.c_char.from_buffer(region.view))
            self.call(
                api.SET_USER_MEMORY_REGION,
                bytearray(api.MEMORY_REGION.pack(slot, 0, region.gpa, region.size, address)),
            )

    # ------------------------------------------------------------------- interrupt controllers

    def create_interrupt_controllers(self) -> None:
        """Make PICs, I/O APIC and PIT in the kernel; to be done before the processors."""
        self.call(api.CREATE_IRQCHIP)
        self.call(api.CREATE_PIT2, bytearray(api.PIT_CONFIG.pack(api.PIT_SPEAKER_DUMMY)))
        with self._lock:
            for gsi in range(IOAPIC_PINS):
                entries = []
                if gsi < PIC_PINS:
                    chip = api.CHIP_PIC_MASTER if gsi < 8 else api.CHIP_PIC_SLAVE
                    entries.append(_irqchip_entry(gsi, chip, gsi % 8))
                if gsi != TIMER_PIN:
                    pin = TIMER_PIN if gsi == 0 else gsi
                    entries.append(_irqchip_entry(gsi, api.CHIP_IOAPIC, pin))
                self._routes[gsi] = entries
            self._commit_routes()

    def new_gsi(self) -> int:
        """Return a number for another interrupt line."""
        with self._lock:
            gsi = self._next_gsi
            self._next_gsi += 1
            return gsi

    def route_msi(self, gsi: int, apic_id: int, vector: int) -> None:
        """Have a line interrupt one processor; replaces what the line did before."""
        body = api.ROUTE_MSI.pack(msi_address(apic_id), 0, vector)
        self._route(gsi, api.ROUTING_MSI, body)

    def route_sint(self, gsi: int, vp: int, sint: int) -> None:
        """Have a line raise a SINT of a processor's SynIC, which has to be active."""
        self._route(gsi, api.ROUTING_HV_SINT, api.ROUTE_HV_SINT.pack(vp, sint))

    def _route(self, gsi: int, kind: int, body: bytes) -> None:
        with self._lock:
            self._routes[gsi] = [api.ROUTING_ENTRY.pack(gsi, kind, 0, 0, body)]
            self._commit_routes()

    def _commit_routes(self) -> None:
        # The kernel knows no way to change one route: the table is always given as a whole.
        entries = [entry for each in self._routes.values() for entry in each]
        header = api.ROUTING_HEADER.pack(len(entries), 0)
        self.call(api.SET_GSI_ROUTING, bytearray(header + b"".join(entries)))

    def set_line(self, gsi: int, level: int) -> None:
        """Set an interrupt line to 0 or 1."""
        self.call(api.IRQ_LINE, bytearray(api.IRQ_LEVEL.pack(gsi, level)))

    def send_msi(self, apic_id: int, vector: int) -> None:
        """Interrupt one processor, edge triggered."""
        message = api.SIGNAL_MSI.pack(msi_address(apic_id), 0, vector, 0, 0)
        self.call(api.SIGNAL_MSI_IOCTL, bytearray(message))

    def add_irqfd(self, gsi: int, eventfd: int, *, resample: int | None = None) -> None:
        """Have an eventfd raise a line.

        Args:
            gsi: The line.
            eventfd: May be used for one line only. KVM keeps it until the VM is gone.
            resample: Eventfd that KVM writes when the guest has ended the interrupt; for a SINT
                also when it writes EOM.
        """
        flags = 0 if resample is None else api.IRQFD_RESAMPLE
        self.call(
            api.IRQFD_IOCTL,
            bytearray(api.IRQFD.pack(eventfd, gsi, flags, resample if resample is not None else 0)),
        )

    # ----------------------------------------------------------------------------------- Hyper-V

    def add_hyperv_eventfd(self, connection_id: int, eventfd: int) -> None:
        """Have HvSignalEvent for a connection, flag 0, write an eventfd without an exit."""
        self._hyperv_eventfd(connection_id, eventfd, 0)

    def remove_hyperv_eventfd(self, connection_id: int) -> None:
        """Undo :meth:`add_hyperv_eventfd`; when it returns nobody uses the eventfd any more."""
        self._hyperv_eventfd(connection_id, -1, api.HYPERV_EVENTFD_DEASSIGN)

    def _hyperv_eventfd(self, connection_id: int, eventfd: int, flags: int) -> None:
        self.call(
            api.HYPERV_EVENTFD_IOCTL,
            bytearray(api.HYPERV_EVENTFD.pack(connection_id, eventfd, flags)),
        )

    def intercept_msrs(self, ranges: Iterable[api.FilterRange]) -> None:
        """Have accesses to these MSRs exit to user space.

        Raises:
            ConfigError: KVM cannot do that: Linux 5.10 can.
        """
        for number in (api.CAP_X86_USER_SPACE_MSR, api.CAP_X86_MSR_FILTER):
            if not self.capability(number):
                raise ConfigError(
                    f"KVM cannot pass MSRs to user space (capability {number}): Linux 5.10 can"
                )
        self.enable_capability(api.CAP_X86_USER_SPACE_MSR, api.MSR_EXIT_REASON_FILTER)
        data, keep = api.pack_msr_filter(ranges)
        self.call(api.X86_SET_MSR_FILTER, data)
        del keep

    def enable_capability(self, number: int, argument: int = 0) -> None:
        """Switch something on for the whole VM."""
        self.call(
            api.ENABLE_CAP_IOCTL, bytearray(api.ENABLE_CAP.pack(number, 0, argument, 0, 0, 0))
        )

    def close(self) -> None:
        """Let go of the VM, which ends with its last processor. Idempotent."""
        for fd in (self.fd, self.kvm):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.fd = self.kvm = -1


def _irqchip_entry(gsi: int, chip: int, pin: int) -> bytes:
    body = api.ROUTE_IRQCHIP.pack(chip, pin)
    return api.ROUTING_ENTRY.pack(gsi, api.ROUTING_IRQCHIP, 0, 0, body)
