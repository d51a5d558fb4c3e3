"""The rest of a PC that a guest pokes at, and the port bus with everything on it.

Sources: linux/arch/x86/kernel/reboot.c (how guests reset), linux/arch/x86/pci/direct.c (how they
look for PCI), linux/arch/x86/kernel/tsc.c (port 0x61).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vmbus.kvm.cmos import INDEX_PORT as CMOS_PORT, PORT_COUNT as CMOS_PORT_COUNT, Cmos
from vmbus.kvm.ports import PortBus
from vmbus.kvm.power import PM_PORT, PM_PORT_COUNT, PowerManagement, Request, RequestCallback
from vmbus.kvm.serial import PORT_COUNT as SERIAL_PORT_COUNT, Uart

SERIAL_PORT = 0x3F8
SYSTEM_CONTROL_PORT = 0x61
KEYBOARD_PORT = 0x64
POST_PORT = 0x80
DEBUG_EXIT_PORT = 0xF4
PCI_PORT = 0xCF8
PCI_PORT_COUNT = 8
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
"""What the FADT tells the guest to write to :data:`RESET_PORT`: full reset, now."""

_REFRESH = 0x10
_COUNTER_2_OUT = 0x20
_GATE_BITS = 0x0F
_RESET_CPU = 0x04
_PULSE = 0xF0
_PULSE_RESET_LINE = 0x01


class SystemControl:
    """Port 0x61, NMI and speaker control, for a VMM without KVM's timer chip.

    With one (``KVM_CREATE_PIT2``) and its flag ``KVM_PIT_SPEAKER_DUMMY`` the kernel answers here,
    truthfully. Without, the refresh bit toggles, as delay loops expect, and counter 2 has always
    run out: guests that measure with it find it useless instead of waiting forever.
    """

    width = 1

    def __init__(self) -> None:
        self._gate = 0
        self._refresh = 0

    def read(self, offset: int, size: int) -> int:
        """Return the gate bits as written, and the two status bits."""
        self._refresh ^= _REFRESH
        return self._gate | self._refresh | _COUNTER_2_OUT

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the gate bits."""
        self._gate = value & _GATE_BITS


class KeyboardController:
    """Port 0x64: no keyboard, but its line to the processor's reset pin."""

    width = 1

    def __init__(self, request: RequestCallback) -> None:
        self._request = request

    def read(self, offset: int, size: int) -> int:
        """Return 0: nothing to read, ready for a command. Guests wait for that before a reset."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Pulse output lines (0xF0 to 0xFF; a zero bit pulses): bit 0 is the reset line."""
        if value & (_PULSE | _PULSE_RESET_LINE) == _PULSE:
            self._request(Request.RESET, 0)


class PciPorts:
    """Ports 0xCF8 to 0xCFF: no PCI, but the reset register in the middle of them, at 0xCF9.

    A guest addresses PCI with four bytes at 0xCF8. They must not be taken apart: the second one,
    the device number, could look like a reset.
    """

    width = 4

    def __init__(self, request: RequestCallback) -> None:
        self._request = request
        self._control = 0

    def read(self, offset: int, size: int) -> int:
        """Return all ones, or what the reset register holds."""
        if offset == RESET_PORT - PCI_PORT and size == 1:
            return self._control
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset when bit 2 of the reset register goes from 0 to 1."""
        if offset == RESET_PORT - PCI_PORT and size == 1:
            rising = value & ~self._control & _RESET_CPU
            self._control = value & ~_RESET_CPU
            if rising:
                self._request(Request.RESET, 0)


class PostCode:
    """Port 0x80: progress codes of firmware, and what Linux writes to when it wants a pause."""

    width = 1

    def __init__(self) -> None:
        self.last = 0xFF
        """The code written last: for a report on a guest that hangs early."""

    def read(self, offset: int, size: int) -> int:
        """Return the last code."""
        return self.last

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the code."""
        self.last = value


class DebugExit:
    """Port 0xF4: tests of a few instructions end with a number here."""

    width = 4

    def __init__(self, request: RequestCallback) -> None:
        self._request = request

    def read(self, offset: int, size: int) -> int:
        """Return all ones."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Ask for the end of the machine, with the value."""
        self._request(Request.DEBUG_EXIT, value)


class Chipset:
    """All port devices on their bus.

    Args:
        uart: COM1.
        request: Told when the guest wants to power off, reset or exit.
        sci: Takes the level of interrupt 9, ACPI's own (level triggered, active high).
        clock: Nanoseconds since some start, monotonic.
        time_of_day: Nanoseconds since 1970, UTC.

    Attributes:
        bus: Where vCPU threads take their port accesses.
        power: The power button.
        post: The last progress code.
    """

    def __init__(
        self,
        uart: Uart,
        request: RequestCallback,
        sci: Callable[[bool], None],
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        time_of_day: Callable[[], int] = time.time_ns,
    ) -> None:
        self.bus = PortBus()
        self.power = PowerManagement(request, sci, clock)
        self.post = PostCode()
        self._uart = uart
        attach = self.bus.attach
        attach(SERIAL_PORT, SERIAL_PORT_COUNT, uart)
        attach(SYSTEM_CONTROL_PORT, 1, SystemControl())
        attach(KEYBOARD_PORT, 1, KeyboardController(request))
        attach(CMOS_PORT, CMOS_PORT_COUNT, Cmos(time_of_day))
        attach(POST_PORT, 1, self.post)
        attach(DEBUG_EXIT_PORT, 4, DebugExit(request))
        attach(PM_PORT, PM_PORT_COUNT, self.power)
        attach(PCI_PORT, PCI_PORT_COUNT, PciPorts(request))

    def reset(self) -> None:
        """Put the devices that hold interrupt lines back to their power-on state."""
        self._uart.reset()
        self.power.reset()
