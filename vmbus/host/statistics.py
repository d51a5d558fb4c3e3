"""What a channel counts."""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.ring import Packet


class Statistics:
    """Counters of one channel; plain integers, read by whoever computes rates."""

    __slots__ = (
        "batches",
        "bytes_in",
        "bytes_out",
        "complaints",
        "packets_in",
        "packets_out",
        "polled",
        "ring_full",
        "signals_in",
        "signals_out",
    )

    def __init__(self) -> None:
        self.batches = 0
        self.packets_in = self.packets_out = 0
        self.bytes_in = self.bytes_out = 0
        self.signals_in = self.signals_out = 0
        self.ring_full = 0
        self.complaints = 0
        """Rules that the guest broke here, as far as the device said so."""
        self.polled = 0
        """Waits for packets that ended without a sleep; see :mod:`vmbus.host.lookout`."""

    def count_in(self, packets: Sequence[Packet]) -> None:
        """Count a batch of packets that came in."""
        self.batches += 1
        self.packets_in += len(packets)
        for packet in packets:
            self.bytes_in += len(packet.data)

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}
