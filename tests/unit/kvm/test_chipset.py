"""The chipset: resets, and what else there is on a PC."""

import pytest

from vmbus.kvm import chipset
from vmbus.kvm.power import Request

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
