"""A chipset with what it asked for."""

import calendar

from vmbus.kvm.chipset import Chipset
from vmbus.kvm.power import Request
from vmbus.kvm.serial import Uart

SECOND = 1_000_000_000


class Machine:
    """A chipset with what it asked for."""

    def __init__(self):
        self.requests: list[tuple[Request, int]] = []
        self.sci: list[bool] = []
        self.sent: list[bytes] = []
        self.now = 0
        self.date = calendar.timegm((2026, 11, 21, 13, 45, 9)) * SECOND
        self.uart = Uart(self.sent.append, lambda level: None)
        self.chipset = Chipset(
            self.uart,
            lambda request, value: self.requests.append((request, value)),
            self.sci.append,
            clock=lambda: self.now,
            time_of_day=lambda: self.date,
        )
        self.read = self.chipset.bus.read
        self.write = self.chipset.bus.write

    def cmos(self, register):
        self.write(0x70, 1, register)
        return self.read(0x71, 1)
