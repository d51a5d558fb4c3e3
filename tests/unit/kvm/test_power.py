"""Power management: sleep, the power button, the timer."""

from tests.support.chipset import SECOND
from vmbus.kvm import power
from vmbus.kvm.power import PowerManagement, Request


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
