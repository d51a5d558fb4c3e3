"""The clock that keeps the time, and its memory."""

from tests.support.chipset import SECOND
from vmbus.kvm import cmos
from vmbus.kvm.cmos import Cmos


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
