"""The bus of ports: who is asked, and how wide."""

import pytest

from vmbus.errors import ConfigError
from vmbus.kvm.ports import PortBus


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
