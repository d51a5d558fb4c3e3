"""Port I/O: the bus, and every device on it but the serial port."""

import calendar

import pytest

from vmbus.errors import ConfigError
from vmbus.kvm import chipset, cmos, power
from vmbus.kvm.chipset import Chipset
from vmbus.kvm.cmos import Cmos
from vmbus.kvm.ports import PortBus
from vmbus.kvm.power import PowerManagement, Request
from vmbus.kvm.serial import Uart

SECOND = 1_000_000_000


class Recorder:
    """A device that answers with its offsets and notes what it is told."""

    def __init__(self, width):
        self.width = width
        self.seen = []

    def read(self, offset, size):
        self.seen.append(("read", offset, size))
        return int.from_bytes(range(0x10 + offset, 0x10 + offset + size), "little")

    def write(self, offset, size, value):
        self.seen.append(("write", offset, size, value))


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


@pytest.fixture
def machine():
    return Machine()


# -- the bus ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_a_port_of_nobody_reads_as_all_ones_and_takes_any_write(size, ones):
    bus = PortBus()
    bus.write(0x1234, size, 0)
    assert bus.read(0x1234, size) == ones
    assert bus.read(0xFFFF, size) == ones
    bus.write(0xFFFF, size, ones)


def test_accesses_arrive_whole_if_the_device_is_wide_enough():
    bus, device = PortBus(), Recorder(4)
    bus.attach(0x100, 8, device)
    assert bus.read(0x104, 4) == 0x17161514
    bus.write(0x102, 2, 0xBEEF)
    assert device.seen == [("read", 4, 4), ("write", 2, 2, 0xBEEF)]


@pytest.mark.parametrize("width", [1, 2])
def test_wider_accesses_are_taken_apart_in_order(width):
    bus, device = PortBus(), Recorder(width)
    bus.attach(0x100, 8, device)
    assert bus.read(0x100, 4) == 0x13121110
    bus.write(0x104, 4, 0x44332211)
    assert device.seen == [("read", at, width) for at in range(0, 4, width)] + [
        ("write", 4 + at, width, 0x44332211 >> 8 * at & (1 << 8 * width) - 1)
        for at in range(0, 4, width)
    ]


def test_an_access_across_the_end_of_a_device_is_taken_apart():
    bus, device = PortBus(), Recorder(4)
    bus.attach(0x100, 3, device)
    assert bus.read(0x101, 4) == 0xFFFF1211
    bus.write(0x102, 2, 0xAABB)
    assert device.seen == [("read", 1, 2), ("write", 2, 1, 0xBB)]


def test_a_port_belongs_to_one_device():
    bus, first, second = PortBus(), Recorder(1), Recorder(1)
    bus.attach(0x100, 8, first)
    with pytest.raises(ConfigError, match="0x107 belongs to another"):
        bus.attach(0x104 + 3, 2, second)
    bus.read(0x108, 1)
    assert second.seen == []


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0xFFFF, 2), (0, 0)])
def test_ports_that_do_not_exist_cannot_be_attached(first, count):
    with pytest.raises(ConfigError, match="do not exist"):
        PortBus().attach(first, count, Recorder(1))


# -- power -----------------------------------------------------------------------------------------


def test_linux_powers_off_in_two_writes(machine):
    machine.write(0x604, 2, power.S5_SLEEP_TYPE << 10 | 1)
    assert machine.requests == []
    assert machine.read(0x604, 2) == power.S5_SLEEP_TYPE << 10 | 1
    machine.write(0x604, 2, power.S5_SLEEP_TYPE << 10 | 1 << 13)
    assert machine.requests == [(Request.POWER_OFF, 0)]


def test_power_off_works_by_the_byte_too(machine):
    machine.write(0x604, 1, 0x01)
    machine.write(0x605, 1, (power.S5_SLEEP_TYPE << 10 | 1 << 13) >> 8)
    assert machine.requests == [(Request.POWER_OFF, 0)]


def test_other_sleep_types_do_nothing(machine):
    for kind in set(range(8)) - {power.S5_SLEEP_TYPE}:
        machine.write(0x604, 2, kind << 10 | 1 << 13)
    assert machine.requests == []


def test_it_is_in_acpi_mode_from_the_start(machine):
    assert machine.read(0x604, 2) == 1
    assert machine.read(0x604, 1) == 1


def test_the_power_button_interrupts_a_guest_that_listens(machine):
    machine.write(0x602, 2, power.POWER_BUTTON)
    assert machine.read(0x602, 2) == power.POWER_BUTTON
    assert machine.chipset.power.press_button()
    assert machine.chipset.power.press_button()
    assert machine.sci == [True]
    assert machine.read(0x600, 2) == power.POWER_BUTTON
    machine.write(0x600, 2, 0x0001)  # another bit
    assert machine.sci == [True]
    machine.write(0x600, 2, power.POWER_BUTTON)
    assert machine.sci == [True, False]
    assert machine.read(0x600, 4) == power.POWER_BUTTON << 16


def test_a_guest_that_does_not_listen_finds_the_button_pressed_when_it_does(machine):
    assert not machine.chipset.power.press_button()
    assert machine.sci == []
    machine.write(0x603, 1, power.POWER_BUTTON >> 8)
    assert machine.sci == [True]


def test_writing_status_leaves_enable_alone_and_the_reverse(machine):
    machine.write(0x600, 4, 0x0721 << 16)
    machine.chipset.power.press_button()
    machine.write(0x600, 2, 0xFFFF)
    assert machine.read(0x600, 4) == 0x0721 << 16
    machine.write(0x602, 2, 0xFFFF)
    assert machine.read(0x602, 2) == power.ENABLE_MASK


def test_a_reset_lets_go_of_the_button_and_of_the_serial_port(machine):
    machine.write(0x602, 2, power.POWER_BUTTON)
    machine.write(0x604, 2, 3 << 10)
    machine.write(0x3FF, 1, 0x77)
    machine.chipset.power.press_button()
    machine.chipset.reset()
    assert machine.sci == [True, False]
    assert machine.read(0x600, 4) == 0
    assert machine.read(0x604, 2) == 1
    assert machine.read(0x3FF, 1) == 0


def test_the_timer_counts_at_its_rate_and_wraps_at_32_bits(machine):
    machine.now = 2 * SECOND
    assert machine.read(0x608, 4) == 2 * power.PM_TIMER_HZ
    assert machine.read(0x608, 2) == 2 * power.PM_TIMER_HZ & 0xFFFF
    assert machine.read(0x60B, 1) == 2 * power.PM_TIMER_HZ >> 24
    machine.now = SECOND * (1 << 32) // power.PM_TIMER_HZ + 1_000_000
    assert machine.read(0x608, 4) == machine.now * power.PM_TIMER_HZ // SECOND - (1 << 32)
    before = machine.read(0x608, 4)
    machine.write(0x608, 4, 0)
    assert machine.read(0x608, 4) == before
    assert machine.requests == []


def test_the_timer_runs_by_the_hosts_clock():
    timer = PowerManagement(lambda request, value: None, lambda level: None)
    first = timer.read(power.PM_TIMER_OFFSET, 4)
    while timer.read(power.PM_TIMER_OFFSET, 4) == first:
        pass


# -- resets ----------------------------------------------------------------------------------------


def test_the_reset_register_resets_with_what_the_fadt_says(machine):
    machine.write(chipset.RESET_PORT, 1, chipset.RESET_VALUE)
    assert machine.requests == [(Request.RESET, 0)]
    # Once per rising of the bit, which falls by itself; a guest may ask twice.
    machine.write(chipset.RESET_PORT, 1, chipset.RESET_VALUE)
    assert len(machine.requests) == 2


def test_linux_own_way_through_the_reset_register(machine):
    """linux/arch/x86/kernel/reboot.c: read, set bit 1, then bits 1 and 2."""
    value = machine.read(0xCF9, 1) & ~6
    machine.write(0xCF9, 1, value | 2)
    assert machine.requests == []
    assert machine.read(0xCF9, 1) == 2
    machine.write(0xCF9, 1, value | 6)
    assert machine.requests == [(Request.RESET, 0)]


def test_addressing_pci_does_not_reset(machine):
    machine.write(0xCF8, 4, 0x80000600)
    machine.write(0xCF8, 2, 0x0600)
    machine.write(0xCFB, 1, 1)
    assert machine.requests == []


def test_there_is_no_pci(machine):
    """linux/arch/x86/pci/direct.c: what is written to 0xCF8 does not stay."""
    machine.write(0xCFB, 1, 0x01)
    machine.write(0xCF8, 4, 0x80000000)
    assert machine.read(0xCF8, 4) == 0xFFFFFFFF
    assert machine.read(0xCFC, 2) == 0xFFFF
    assert machine.read(0xCFC, 1) == 0xFF


@pytest.mark.parametrize(
    ("command", "resets"), [(0xFE, True), (0xF0, True), (0xFF, False), (0xAA, False), (0, False)]
)
def test_the_keyboard_controller_pulses_the_reset_line(machine, command, resets):
    assert machine.read(0x64, 1) & 2 == 0  # takes commands
    machine.write(0x64, 1, command)
    assert machine.requests == ([(Request.RESET, 0)] if resets else [])
    assert machine.read(0x60, 1) == 0xFF


# -- clock and memory ------------------------------------------------------------------------------


def test_the_clock_is_the_hosts_in_utc(machine):
    registers = (cmos.CENTURY, 9, 8, 7, 4, 2, 0)
    assert [machine.cmos(each) for each in registers] == [
        0x20,
        0x26,
        0x11,
        0x21,
        0x13,
        0x45,
        0x09,
    ]
    assert machine.cmos(cmos.DAY_OF_WEEK) == 7  # Saturday
    machine.date += 24 * 3600 * SECOND
    assert machine.cmos(cmos.DAY_OF_WEEK) == 1


def test_the_clock_speaks_binary_if_the_guest_wants(machine):
    machine.write(0x70, 1, cmos.REGISTER_B)
    machine.write(0x71, 1, cmos.B_BINARY)
    assert machine.cmos(cmos.REGISTER_B) == cmos.B_BINARY | cmos.B_24_HOURS
    assert [machine.cmos(each) for each in (cmos.CENTURY, 9, 4, 2, 0)] == [20, 26, 13, 45, 9]


def test_the_clock_cannot_be_set(machine):
    for register in (0, 2, 4, 6, 7, 8, 9, 0x0C, 0x0D, cmos.CENTURY):
        before = machine.cmos(register)
        machine.write(0x71, 1, before ^ 0x55)
        assert machine.cmos(register) == before


def test_the_end_of_each_second_is_not_to_be_read(machine):
    assert machine.cmos(cmos.REGISTER_A) == cmos.A_DIVIDER
    machine.date += SECOND - cmos.UPDATE_NS
    assert machine.cmos(cmos.REGISTER_A) == cmos.A_DIVIDER | cmos.A_UPDATE_IN_PROGRESS
    machine.date += cmos.UPDATE_NS
    assert machine.cmos(cmos.REGISTER_A) == cmos.A_DIVIDER
    machine.write(0x71, 1, 0xFF)
    assert machine.cmos(cmos.REGISTER_A) == 0x7F


def test_the_chip_is_powered_and_nothing_is_pending(machine):
    assert machine.cmos(cmos.REGISTER_B) == cmos.B_24_HOURS
    assert machine.cmos(cmos.REGISTER_C) == 0
    assert machine.cmos(cmos.REGISTER_D) == cmos.D_VALID


def test_the_rest_is_memory(machine):
    machine.write(0x70, 1, 0x80 | 0x7F)  # with the NMI mask
    machine.write(0x71, 1, 0x5A)
    assert machine.cmos(0x7F) == 0x5A
    assert machine.cmos(0x0F) == 0
    assert machine.read(0x70, 1) == 0xFF


def test_the_clock_is_right_without_being_told_the_time():
    clock = Cmos()
    clock.write(0, 1, cmos.CENTURY)
    assert clock.read(1, 1) in {0x20, 0x21}


# -- odds and ends ---------------------------------------------------------------------------------


def test_port_61_refreshes_and_says_that_counter_2_ran_out(machine):
    machine.write(0x61, 1, 0xFD)
    first, second = machine.read(0x61, 1), machine.read(0x61, 1)
    assert first ^ second == 0x10
    assert first & 0x2F == 0x20 | 0x0D


def test_the_last_progress_code_is_kept(machine):
    assert machine.chipset.post.last == machine.read(0x80, 1) == 0xFF
    machine.write(0x80, 1, 0x42)
    assert machine.chipset.post.last == machine.read(0x80, 1) == 0x42


def test_a_small_guest_exits_with_a_number(machine):
    assert machine.read(0xF4, 4) == 0xFFFFFFFF
    machine.write(0xF4, 4, 0x12345678)
    machine.write(0xF4, 1, 3)
    assert machine.requests == [(Request.DEBUG_EXIT, 0x12345678), (Request.DEBUG_EXIT, 3)]


def test_the_serial_port_is_com1(machine):
    for byte in b"hi\n":
        machine.write(0x3F8, 1, byte)
    assert machine.sent == [b"hi\n"]
    assert machine.read(0x3FD, 1) == 0x60
