"""The battery-backed clock and memory behind ports 0x70 and 0x71.

Source: MC146818A data sheet (Motorola), linux/drivers/rtc/rtc-mc146818-lib.c. The clock is the
host's, in UTC: guests read it once at boot. What they write into the time registers is ignored,
and no interrupt ever comes from here (periodic, alarm or update).
"""

from __future__ import annotations

import time
from collections.abc import Callable

INDEX_PORT = 0x70
PORT_COUNT = 2
SIZE = 128

SECONDS = 0x00
MINUTES = 0x02
HOURS = 0x04
DAY_OF_WEEK = 0x06
DAY_OF_MONTH = 0x07
MONTH = 0x08
YEAR = 0x09
REGISTER_A = 0x0A
REGISTER_B = 0x0B
REGISTER_C = 0x0C
REGISTER_D = 0x0D
CENTURY = 0x32
"""Not of the original chip; the FADT tells where it is."""

A_UPDATE_IN_PROGRESS = 0x80
A_DIVIDER = 0x26
"""Time base 32.768 kHz, periodic rate 1024 Hz: what PC firmware sets."""
B_24_HOURS = 0x02
B_BINARY = 0x04
D_VALID = 0x80

UPDATE_NS = 2_200_000
"""How long before each second the registers are not to be read: 244 us notice and 1948 us of
updating. Guests wait for the end of it, so the registers they then read belong together."""
SECOND_NS = 1_000_000_000

_TIME = frozenset(
    {SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, REGISTER_C, REGISTER_D}
    | {CENTURY}
)
"""Registers that are computed; the rest is memory."""


class Cmos:
    """The clock and its memory of 128 bytes.

    Args:
        clock: Returns the time of day as nanoseconds since 1970, UTC.
    """

    width = 1

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._index = 0
        self._memory = bytearray(SIZE)
        self._memory[REGISTER_A] = A_DIVIDER
        self._memory[REGISTER_B] = B_24_HOURS

    def read(self, offset: int, size: int) -> int:
        """Return the register that was chosen; the index itself cannot be read back."""
        assert size == 1
        if offset == 0:
            return 0xFF
        if self._index in _TIME:
            return self._read_time(self._index)
        value = self._memory[self._index]
        if self._index == REGISTER_A and self._clock() % SECOND_NS >= SECOND_NS - UPDATE_NS:
            value |= A_UPDATE_IN_PROGRESS
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a register (bit 7 is the NMI mask and not kept) or store into it."""
        assert size == 1
        if offset == 0:
            self._index = value & (SIZE - 1)
        elif self._index == REGISTER_A:
            self._memory[REGISTER_A] = value & ~A_UPDATE_IN_PROGRESS
        elif self._index == REGISTER_B:
            self._memory[REGISTER_B] = value | B_24_HOURS
        elif self._index not in _TIME:
            self._memory[self._index] = value

    def _read_time(self, index: int) -> int:
        if index == REGISTER_C:
            return 0  # no interrupt is ever pending
        if index == REGISTER_D:
            return D_VALID
        now = time.gmtime(self._clock() // SECOND_NS)
        value = {
            SECONDS: now.tm_sec,
            MINUTES: now.tm_min,
            HOURS: now.tm_hour,
            DAY_OF_WEEK: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1 here; Monday is 0 there
            DAY_OF_MONTH: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100,
        }[index]
        if self._memory[REGISTER_B] & B_BINARY:
            return value
        return value // 10 << 4 | value % 10
