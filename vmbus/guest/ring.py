"""The guest's ends of a channel's two rings; written apart from the host's on purpose.

Each ring is a control page (:mod:`vmbus.wire.ring`) and data pages, in memory that need not be
contiguous. The guest writes packets into the outgoing ring and reads them from the incoming one.
Whoever reads can set the interrupt mask of a ring; whoever writes signals only if the ring was
empty and the mask is 0. Source: linux/drivers/hv/ring_buffer.c.

What the host writes into the control pages is checked as an oracle: an index outside the ring, one
that goes backwards, or a packet that does not add up crashes the guest.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from vmbus.guest.machine import Panic
from vmbus.guest.personality import FeatureBits, Masking, Personality
from vmbus.wire.packets import DESCRIPTOR, DESCRIPTOR_SIZE, PACKET_NAMES, TRAILER, TRAILER_SIZE
from vmbus.wire.ring import (
    FEATURE_BITS,
    FEATURE_PENDING_SEND_SIZE,
    INTERRUPT_MASK,
    PENDING_SEND_SIZE,
    READ_INDEX,
    WRITE_INDEX,
)

_SIGNAL_COUNTER = 511
"""Index of the u64 at the end of the control page in which some guests count their signals."""

_lock = threading.Lock()


def fence() -> None:
    """Order all earlier stores before all later loads. Cannot block.

    An x86-64 processor may let a load overtake an earlier store to another address; taking a
    lock executes a locked instruction, which it may not pass.
    """
    with _lock:
        pass


class Span:
    """Data pages of a ring as one run of bytes that wraps around.

    Args:
        views: Their bytes (format ``"B"``) in order; kept, not copied.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = list(views)
        self._starts: list[int] = []
        self.size = 0
        for view in views:
            self._starts.append(self.size)
            self.size += len(view)
        self._only = self._views[0] if len(self._views) == 1 else None

    def read(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes from ``offset`` on, at most the whole ring. Cannot block."""
        if self._only is not None and offset + length <= self.size:
            return bytes(self._only[offset : offset + length])
        return b"".join(self._pieces(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data`` from ``offset`` on. Cannot block."""
        end = offset + len(data)
        if self._only is not None and end <= self.size:
            self._only[offset:end] = data
            return
        done = 0
        for piece in self._pieces(offset, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def _pieces(self, offset: int, length: int) -> list[memoryview]:
        pieces = []
        while length:
            index = bisect_right(self._starts, offset) - 1
            start = offset - self._starts[index]
            piece = self._views[index][start : start + length]
            pieces.append(piece)
            length -= len(piece)
            offset = (offset + len(piece)) % self.size
        return pieces


class OutRing:
    """The guest-to-host ring; the guest is its writer.

    Args:
        control: Bytes of the control page.
        data: The data pages.
        personality: Whose habits to follow.
        panic: Called when the host breaks a rule.
    """

    def __init__(
        self, control: memoryview, data: Span, personality: Personality, panic: Panic
    ) -> None:
        self._words = control.cast("I")
        self._counter = control.cast("Q") if personality.counts_signals else None
        self._data = data
        self._panic = panic
        self._write = 0
        self._committed = 0
        self._read = 0
        if personality.feature_bits is not FeatureBits.NONE:
            self._words[FEATURE_BITS] = FEATURE_PENDING_SEND_SIZE

    def _room(self) -> int:
        """Free bytes, by a fresh look at the host's read index."""
        read = self._words[READ_INDEX]
        if read != self._read:
            size = self._data.size
            if read >= size or read % 8:
                self._panic(f"ring: the host's read index {read} is not inside {size} bytes")
            if (self._committed - read) % size > (self._committed - self._read) % size:
                self._panic(f"ring: the host has read past the write index, to {read}")
            self._read = read
        return self._data.size - (self._write - self._read) % self._data.size

    @property
    def empty(self) -> bool:
        """Whether the host has read everything."""
        self._room()
        return self._read == self._committed

    def append(self, packet: bytes) -> bool:
        """Write a packet behind the last one, invisible until :meth:`commit`. Cannot block.

        Args:
            packet: Descriptor and all, a multiple of 8 bytes.

        Returns:
            False if there is no room; at least one byte has to stay free.
        """
        need = len(packet) + TRAILER_SIZE
        if self._room() <= need:
            return False
        self._data.write(self._write, packet + TRAILER.pack(self._write << 32))
        self._write = (self._write + need) % self._data.size
        return True

    def commit(self) -> bool:
        """Show the host what was appended. Cannot block.

        Returns:
            Whether the host has to be signalled: the ring was empty and its mask is 0.
        """
        before = self._committed
        if self._write == before:
            return False
        words = self._words
        self._committed = words[WRITE_INDEX] = self._write
        fence()
        if words[INTERRUPT_MASK]:
            return False
        self._room()
        # Empty before this commit: the host had read all of it, or has read on since then. Linux
        # looks for equality only, because a reader that went on needs no signal.
        return self._read == before

    def want_room(self, size: int) -> None:
        """Ask to be interrupted once more than ``size`` bytes are free; 0 takes it back."""
        self._words[PENDING_SEND_SIZE] = size
        fence()

    def count_signal(self) -> None:
        """Note that the host is being signalled, where the personality does."""
        if self._counter is not None:
            self._counter[_SIGNAL_COUNTER] = self._counter[_SIGNAL_COUNTER] + 1 & (1 << 64) - 1


class Incoming(NamedTuple):
    """A packet from the host."""

    kind: int
    flags: int
    transaction_id: int
    payload_offset: int
    """Bytes from the start of ``data``; between 16 and it are type-specific headers."""
    data: bytes
    """The whole packet, descriptor included, trailer not."""

    @property
    def payload(self) -> bytes:
        """What follows the headers, padding included."""
        return self.data[self.payload_offset :]


class InRing:
    """The host-to-guest ring; the guest is its reader.

    Args:
        control: Bytes of the control page.
        data: The data pages.
        personality: Whose habits to follow.
        panic: Called when the host breaks a rule.
        max_packet: Largest packet in bytes that the driver's buffer holds; None: any.
    """

    def __init__(
        self,
        control: memoryview,
        data: Span,
        personality: Personality,
        panic: Panic,
        *,
        max_packet: int | None,
    ) -> None:
        self._words = control.cast("I")
        self._data = data
        self._panic = panic
        self._max_packet = data.size if max_packet is None else max_packet
        self._too_large = personality.too_large
        self._read = 0
        self._signals_free_space = personality.signals_free_space
        self._masks = personality.masking is Masking.WHILE_READING
        if personality.feature_bits is FeatureBits.BOTH:
            self._words[FEATURE_BITS] = FEATURE_PENDING_SEND_SIZE
        if personality.masking is Masking.ALWAYS:
            self._words[INTERRUPT_MASK] = 1

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read."""
        return self._words[WRITE_INDEX] == self._read

    def mask(self) -> None:
        """Begin reading: no interrupts for this ring, if the personality masks at all."""
        if self._masks:
            self._words[INTERRUPT_MASK] = 1
            fence()

    def unmask(self) -> bool:
        """End reading. Returns whether packets have arrived meanwhile: then read again."""
        if self._masks:
            self._words[INTERRUPT_MASK] = 0
            fence()
        return not self.empty

    def read_batch(self) -> tuple[list[Incoming], bool]:
        """Take all packets that are there. Cannot block.

        Returns:
            The packets (private copies), and whether the host waits for the room this has made
            and has to be signalled.

        Raises:
            GuestPanic: Index or framing broken, or a packet larger than the driver's buffer.
        """
        write = self._words[WRITE_INDEX]
        if write == self._read:
            return [], False
        size = self._data.size
        if write >= size or write % 8:
            self._panic(f"ring: the host's write index {write} is not inside {size} bytes")
        used = (write - self._read) % size
        data = self._data.read(self._read, used)
        packets: list[Incoming] = []
        position = 0
        while position < used:
            if used - position < DESCRIPTOR_SIZE + TRAILER_SIZE:
                self._panic(f"ring: {used - position} bytes are too few for a packet")
            kind, offset8, length8, flags, transaction_id = DESCRIPTOR.unpack_from(data, position)
            length = length8 * 8
            after = position + length + TRAILER_SIZE
            if not 2 <= offset8 <= length8 or after > used:
                self._panic(f"ring: packet with data_offset8 {offset8} and length8 {length8}")
            if length > self._max_packet:
                self._panic(
                    f"ring: {PACKET_NAMES.get(kind, kind)} packet of {length} bytes; the driver "
                    f"has room for {self._max_packet}: {self._too_large}"
                )
            packet = data[position : position + length]
            packets.append(Incoming(kind, flags, transaction_id, offset8 * 8, packet))
            position = after
        self._read = self._words[READ_INDEX] = write
        return packets, self._signals_free_space and self._crossed(size - used, size)

    def _crossed(self, before: int, after: int) -> bool:
        """Whether reading has brought the free bytes over what the host is waiting for."""
        fence()
        wanted = self._words[PENDING_SEND_SIZE]
        return bool(wanted) and before <= wanted < after
