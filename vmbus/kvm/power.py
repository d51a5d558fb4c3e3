"""ACPI's fixed hardware: power off, the power button, the PM timer.

Source: ACPI 6.4, 4.8.3 (PM1 event and control blocks, PM timer). There is no system management
mode to take the machine over from, so it is in ACPI mode from the start.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable

PM_PORT = 0x600
PM_PORT_COUNT = 12
PM1_EVENT_OFFSET = 0
PM1_EVENT_SIZE = 4
"""Status u16, enable u16."""
PM1_CONTROL_OFFSET = 4
PM1_CONTROL_SIZE = 2
PM_TIMER_OFFSET = 8
PM_TIMER_SIZE = 4

POWER_BUTTON = 1 << 8
"""In the status and the enable register."""
ENABLE_MASK = 0x0721
"""Bits that exist: TMR, GBL, PWRBTN, SLPBTN, RTC."""

CONTROL_SCI_ENABLE = 1 << 0
CONTROL_SLEEP_TYPE_SHIFT = 10
CONTROL_SLEEP_ENABLE = 1 << 13
S5_SLEEP_TYPE = 5
"""What \\_S5 tells the guest to put into SLP_TYP for powering off."""

PM_TIMER_HZ = 3_579_545
_NS_PER_SECOND = 1_000_000_000


class Request(enum.Enum):
    """What a guest asks its machine for by writing to a port."""

    POWER_OFF = "power off"
    RESET = "reset"
    DEBUG_EXIT = "debug exit"


RequestCallback = Callable[[Request, int], None]
"""Takes the request and the value of a debug exit (else 0) on the thread of the vCPU that made
it, which should then not enter the guest again."""


class PowerManagement:
    """PM1a event block, PM1a control block and PM timer, one after the other.

    Args:
        request: Told of ``Request.POWER_OFF``.
        sci: Takes the level of the system control interrupt whenever it changes. Called with the
            lock held; must not call back.
        clock: Nanoseconds since some start, monotonic.
    """

    width = 4

    def __init__(
        self,
        request: RequestCallback,
        sci: Callable[[bool], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._request = request
        self._sci = sci
        self._clock = clock
        self._lock = threading.Lock()
        self._line = False
        self._status = 0
        self._enable = 0
        self._sleep_type = 0

    def press_button(self) -> bool:
        """Press the power button: the guest is asked to shut down.

        Returns:
            Whether the guest listens. One that has not enabled the button yet finds it pressed
            when it does.
        """
        with self._lock:
            self._status |= POWER_BUTTON
            self._update()
            return bool(self._enable & POWER_BUTTON)

    def reset(self) -> None:
        """Return to the power-on state."""
        with self._lock:
            self._status = self._enable = self._sleep_type = 0
            self._update()

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes of the registers at ``offset``."""
        ticks = self._clock() * PM_TIMER_HZ // _NS_PER_SECOND
        with self._lock:
            control = CONTROL_SCI_ENABLE | self._sleep_type << CONTROL_SLEEP_TYPE_SHIFT
            registers = self._status | self._enable << 16 | control << 32 | ticks << 64
        return registers >> (8 * offset) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Store into the registers: ones clear status bits, the timer cannot be set."""
        written = value << (8 * offset)
        touched = ((1 << 8 * size) - 1) << (8 * offset)
        with self._lock:
            self._status &= ~written
            kept = self._enable & ~(touched >> 16)
            self._enable = (kept | written >> 16) & ENABLE_MASK
            self._update()
            control = written >> 32
            if touched >> 40 & 0xFF:  # the byte with the sleep bits
                self._sleep_type = control >> CONTROL_SLEEP_TYPE_SHIFT & 7
            off = control & CONTROL_SLEEP_ENABLE and self._sleep_type == S5_SLEEP_TYPE
        if off:
            self._request(Request.POWER_OFF, 0)

    def _update(self) -> None:
        line = bool(self._status & self._enable)
        if line != self._line:
            self._line = line
            self._sci(line)
