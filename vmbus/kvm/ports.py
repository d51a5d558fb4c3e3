"""Port I/O: who answers at which port.

A guest's ``in`` and ``out`` arrive here as (port, size, value). A device claims a run of ports and
says how wide it is; wider accesses are halved until they fit, as the ISA bus does, and what nobody
claims reads as all ones and ignores writes.
"""

from __future__ import annotations

from typing import Protocol

from vmbus.errors import ConfigError

PORT_COUNT = 0x10000
ALL_ONES = 0xFF


class PortDevice(Protocol):
    """What stands behind a run of ports. Called from vCPU threads, several at a time."""

    @property
    def width(self) -> int:
        """Widest access in bytes that arrives in one piece: 1, 2 or 4."""

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads: ``size`` bytes at ``offset`` from the first port."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest wrote; ``value`` is unsigned and fits ``size`` bytes."""


class PortBus:
    """The 65536 ports. Devices are attached before the guest runs; then nothing changes."""

    def __init__(self) -> None:
        self._ports: dict[int, tuple[PortDevice, int, int]] = {}

    def attach(self, first: int, count: int, device: PortDevice) -> None:
        """Let ``device`` answer at ports ``first`` to ``first + count - 1``.

        Raises:
            ConfigError: A port does not exist or belongs to another device already.
        """
        if first < 0 or count <= 0 or first + count > PORT_COUNT:
            raise ConfigError(f"ports {first:#x}+{count} do not exist")
        for port in range(first, first + count):
            if port in self._ports:
                raise ConfigError(f"port {port:#x} belongs to another device")
        for port in range(first, first + count):
            self._ports[port] = (device, port - first, first + count - port)

    def _find(self, port: int, size: int) -> tuple[PortDevice, int] | None:
        """Return the device that takes this access in one piece, and the offset in it."""
        found = self._ports.get(port)
        if found is None:
            return None
        device, offset, room = found
        return (device, offset) if size <= device.width and size <= room else None

    def read(self, port: int, size: int) -> int:
        """Return what an ``in`` of 1, 2 or 4 bytes gives."""
        found = self._find(port, size)
        if found is not None:
            device, offset = found
            return device.read(offset, size)
        if size == 1:
            return ALL_ONES
        half = size // 2
        low = self.read(port, half)
        return low | self.read((port + half) % PORT_COUNT, half) << (8 * half)

    def write(self, port: int, size: int, value: int) -> None:
        """Take an ``out`` of 1, 2 or 4 bytes."""
        found = self._find(port, size)
        if found is not None:
            device, offset = found
            device.write(offset, size, value)
        elif size > 1:
            half = size // 2
            bits = 8 * half
            self.write(port, half, value & (1 << bits) - 1)
            self.write((port + half) % PORT_COUNT, half, value >> bits)
