"""The two rings of a channel, from the host's side. No I/O, no waiting.

A ring is one control page and any number of data pages in guest memory, shared with a guest that
may lie. Its writer owns the write index, its reader the read index; equal indices mean empty, so a
full ring still has 8 free bytes. The host reads the *incoming* ring (guest to host) with a
:class:`RingReader` and writes the *outgoing* one with a :class:`RingWriter`.

How lies are dealt with: the host keeps its own index to itself and never reads it back; the
guest's index is read once per batch and checked; packet bytes are copied once, in one piece per
batch, and parsed from the copy. Whatever is wrong is a :class:`~vmbus.errors.RingError`, after
which the ring is of no use.

Who must be signalled (linux/drivers/hv/ring_buffer.c: hv_signal_on_write, hv_pkt_iter_close):

* A writer signals the reader if the ring was empty before its packets and the reader has not
  masked interrupts. Store index, *fence*, read mask: without the fence both sides can miss each
  other and sleep for ever.
* A reader that wants to sleep unmasks, *fences*, and looks again.
* A writer that found no room may leave the size it waits for in ``pending_send_size``, *fence*,
  and look again; the reader signals when the free space passes it. Not every driver does that for
  us (OpenBSD, macOS and NetBSD never do), so whoever waits for room also polls.

Indices are read and written as aligned 32-bit items of a ``memoryview``; see
:mod:`vmbus.memory` for why nothing else will do.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from vmbus.errors import GuestProtocolError, RingError
from vmbus.memory import GuestMemory, full_fence
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.packets import (
    COMPLETION,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    FLAG_COMPLETION_REQUESTED,
    MAX_PACKET,
    TRAILER,
    TRAILER_SIZE,
)
from vmbus.wire.ring import (
    FEATURE_BITS,
    FEATURE_PENDING_SEND_SIZE,
    INTERRUPT_MASK,
    PENDING_SEND_SIZE,
    READ_INDEX,
    WRITE_INDEX,
)

MAX_BATCH_BYTES = 64 * 1024
"""Bytes that one batch copies out of a ring, unless a single packet is longer."""

_unpack_descriptor = DESCRIPTOR.unpack_from
_pack_descriptor = DESCRIPTOR.pack
_pack_trailer = TRAILER.pack


class Packet:
    """One packet out of a ring, in private memory.

    Attributes:
        kind: Packet type, :data:`vmbus.wire.packets.IN_BAND` and so on; any 16-bit value.
        flags: Flags as sent.
        transaction_id: 64 bits, to be echoed bit for bit.
        data: The whole packet from its descriptor on, without the trailer.
        payload_offset: Where the payload begins in ``data``, in bytes; what stands before it,
            from byte 16 on, is the type-specific header.
    """

    __slots__ = ("data", "flags", "kind", "payload_offset", "transaction_id")

    def __init__(
        self, kind: int, flags: int, transaction_id: int, data: bytes, payload_offset: int
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.transaction_id = transaction_id
        self.data = data
        self.payload_offset = payload_offset

    @property
    def payload(self) -> bytes:
        """The payload, padded to a multiple of 8 bytes by the sender."""
        return self.data[self.payload_offset :]

    @property
    def wants_completion(self) -> bool:
        """Whether exactly one completion has to be sent."""
        return bool(self.flags & FLAG_COMPLETION_REQUESTED)

    def __repr__(self) -> str:
        return (
            f"<Packet kind={self.kind} flags={self.flags:#x} "
            f"id={self.transaction_id:#x} {len(self.data)} bytes>"
        )


class RingMemory:
    """The bytes of one ring: a control page, and data pages anywhere in guest memory.

    Args:
        memory: The guest's memory.
        pfns: Page frame numbers, control page first; at least 2.

    Raises:
        GuestProtocolError: Too few pages, or pages that are not writable memory.
    """

    __slots__ = ("_flat", "_runs", "_starts", "control", "size")

    def __init__(self, memory: GuestMemory, pfns: Sequence[int]) -> None:
        if len(pfns) < 2:
            raise GuestProtocolError("a ring needs a control page and a data page", field="ring")
        self.size = (len(pfns) - 1) * PAGE_SIZE
        """Bytes of data space."""
        self.control = memory.page(pfns[0]).cast("I")
        """The control page as u32 items."""
        try:
            self._runs = memory.gather(0, self.size, pfns[1:], write=True)
        except GuestProtocolError:
            # A ring that nobody gets must not keep a page mapped.
            self.control.release()
            raise
        self._starts = [0]
        for run in self._runs:
            self._starts.append(self._starts[-1] + len(run))
        # Physically contiguous data pages, the usual case, need no look-up.
        self._flat = self._runs[0] if len(self._runs) == 1 else None

    def read(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes from ``offset`` on, around the end if need be."""
        first = min(length, self.size - offset)
        if self._flat is not None:
            if first == length:
                return bytes(self._flat[offset : offset + length])
            return b"".join((self._flat[offset:], self._flat[: length - first]))
        pieces = self._pieces(offset, first)
        if first < length:
            pieces += self._pieces(0, length - first)
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Copy ``data`` to ``offset``, around the end if need be."""
        first = min(len(data), self.size - offset)
        if self._flat is not None:
            if first == len(data):
                self._flat[offset : offset + first] = data
            else:
                self._flat[offset:] = data[:first]
                self._flat[: len(data) - first] = data[first:]
            return
        pieces = self._pieces(offset, first)
        if first < len(data):
            pieces += self._pieces(0, len(data) - first)
        position = 0
        for piece in pieces:
            piece[:] = data[position : position + len(piece)]
            position += len(piece)

    def _pieces(self, offset: int, length: int) -> list[memoryview]:
        index = bisect.bisect_right(self._starts, offset) - 1
        pieces = []
        while length:
            run = self._runs[index]
            start = offset - self._starts[index]
            piece = run[start : start + length]
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
            index += 1
        return pieces

    def release(self) -> None:
        """Give up the views, so that guest memory can be unmapped. Use nothing afterwards."""
        self.control.release()
        for run in self._runs:
            run.release()

    def index_untrusted(self, word: int) -> int:
        """Read the guest's index once and check it. Raises RingError."""
        index = self.control[word]
        if index >= self.size or index & 7:
            name = "write_index" if word == WRITE_INDEX else "read_index"
            raise RingError(
                f"ring {name} {index:#x} is not a multiple of 8 below {self.size:#x}", field=name
            )
        return index


class RingReader:
    """The incoming ring: batches out, one index store per batch.

    Args:
        ring: The ring's memory; the reader is the only one on this side to use it.

    Raises:
        RingError: The read index found there is not one.
    """

    __slots__ = ("_committed", "_masked", "_next", "ring")

    def __init__(self, ring: RingMemory) -> None:
        self.ring = ring
        self._masked = False
        self._next = self._committed = ring.index_untrusted(READ_INDEX)

    def available(self) -> int:
        """Bytes of packets and trailers in the ring, for people; 0 if the index is corrupt."""
        try:
            return (self.ring.index_untrusted(WRITE_INDEX) - self._next) % self.ring.size
        except RingError:
            return 0

    def has_data(self) -> bool:
        """Whether the guest's write index differs from where we are. Never raises."""
        return self.ring.control[WRITE_INDEX] != self._next

    def look_for_data(self, times: int) -> bool:
        """Look for packets, several times in a row, until there are any. Never raises."""
        control, position = self.ring.control, self._next
        for _ in range(times):  # noqa: SIM110 - a generator would take twice as long
            if control[WRITE_INDEX] != position:
                return True
        return False

    def read_batch_untrusted(self, max_packets: int = 256) -> list[Packet]:
        """Take packets out of the ring, in order, without telling the guest yet.

        Args:
            max_packets: Stop after this many.

        Returns:
            Packets; an empty list if the ring is empty.

        Raises:
            RingError: The write index or a packet's lengths are impossible. Packets before the
                bad one are lost with the ring.
        """
        ring = self.ring
        start = self._next
        available = (ring.index_untrusted(WRITE_INDEX) - start) % ring.size
        if not available:
            return []
        copied = min(available, MAX_BATCH_BYTES)
        data = ring.read(start, copied)
        packets: list[Packet] = []
        position = 0
        while position < copied and len(packets) < max_packets:
            if copied - position < DESCRIPTOR_SIZE:
                if copied == available:
                    raise RingError(
                        f"ring: {available - position} stray bytes behind the last packet",
                        field="write_index",
                    )
                break
            kind, offset8, length8, flags, transaction_id = _unpack_descriptor(data, position)
            end = position + length8 * 8
            if not 2 <= offset8 <= length8:
                raise RingError(
                    f"ring packet: data_offset8 {offset8} is not between 2 and length8 {length8}",
                    field="data_offset8",
                )
            if end + TRAILER_SIZE > copied:
                if end + TRAILER_SIZE > available:
                    raise RingError(
                        f"ring packet: {end - position} bytes and trailer, "
                        f"{available - position} are in the ring",
                        field="length8",
                    )
                if packets:
                    break
                # A single packet longer than a batch: only what is behind the part that is
                # already copied is fetched, so that nothing is read twice.
                data += ring.read((start + copied) % ring.size, end + TRAILER_SIZE - copied)
                copied = end + TRAILER_SIZE
            packets.append(Packet(kind, flags, transaction_id, data[position:end], offset8 * 8))
            position = end + TRAILER_SIZE
        self._next = (start + position) % ring.size
        return packets

    def commit(self) -> bool:
        """Publish how far we have read: one store. Returns whether the guest must be signalled.

        The guest must be if it waits for room (``pending_send_size``) and the free space has
        passed what it waits for just now.
        """
        if self._next == self._committed:
            return False
        ring = self.ring
        freed = (self._next - self._committed) % ring.size
        self._committed = ring.control[READ_INDEX] = self._next
        full_fence()
        # Some guests store the size they need less one: the low bits say nothing.
        wanted = ring.control[PENDING_SEND_SIZE] & ~7
        if not wanted:
            return False
        used = (ring.control[WRITE_INDEX] - self._next) % ring.size
        free = ring.size - used
        return free >= wanted >= free - freed

    def mask(self) -> None:
        """Tell the guest not to signal new packets; it may do so all the same."""
        if not self._masked:
            self.ring.control[INTERRUPT_MASK] = 1
            self._masked = True

    def unmask(self) -> bool:
        """Ask for signals again. Returns True if there are packets already: do not sleep."""
        self.ring.control[INTERRUPT_MASK] = 0
        self._masked = False
        full_fence()
        return self.has_data()


class RingWriter:
    """The outgoing ring: many packets, one copy, one index store, at most one signal.

    Args:
        ring: The ring's memory; the writer is the only one on this side to use it.

    Raises:
        RingError: An index found there is not one.
    """

    __slots__ = ("_next", "ring")

    def __init__(self, ring: RingMemory) -> None:
        self.ring = ring
        self._next = ring.index_untrusted(WRITE_INDEX)
        ring.index_untrusted(READ_INDEX)
        # We understand pending_send_size when we read; and we use it when we write.
        ring.control[FEATURE_BITS] = ring.control[FEATURE_BITS] | FEATURE_PENDING_SEND_SIZE

    @property
    def capacity(self) -> int:
        """Longest packet (without trailer) that an empty ring takes, in bytes."""
        return min(self.ring.size - TRAILER_SIZE - 8, MAX_PACKET)

    def free_untrusted(self) -> int:
        """Bytes that can be written now, trailers included. Raises RingError."""
        used = (self._next - self.ring.index_untrusted(READ_INDEX)) % self.ring.size
        return self.ring.size - used - 8

    def occupied(self) -> int:
        """Bytes the guest has not read yet, for people; 0 if its index is corrupt."""
        try:
            return self.ring.size - 8 - self.free_untrusted()
        except RingError:
            return 0

    def write_batch_untrusted(self, packets: Sequence[bytes]) -> tuple[int, bool]:
        """Append as many whole packets as fit, in order, with one commit.

        Args:
            packets: Built packets, each a multiple of 8 bytes long, without trailer.

        Returns:
            How many were written, and whether the guest must be signalled.

        Raises:
            RingError: The guest's read index is corrupt.
        """
        ring = self.ring
        room = self.free_untrusted()
        start = position = self._next
        pieces: list[bytes] = []
        count = 0
        for packet in packets:
            total = len(packet) + TRAILER_SIZE
            if total > room:
                break
            room -= total
            # The trailer names where its packet began; no guest looks at it.
            pieces += (packet, _pack_trailer(position << 32))
            position = (position + total) % ring.size
            count += 1
        if not count:
            return 0, False
        ring.write(start, b"".join(pieces))
        self._next = ring.control[WRITE_INDEX] = position
        full_fence()
        # The mask before the index: the guest stores them in the opposite order.
        if ring.control[INTERRUPT_MASK]:
            return count, False
        return count, ring.control[READ_INDEX] == start

    def wait_for_room(self, size: int) -> bool:
        """Ask the guest to signal when ``size`` bytes are free. Raises RingError.

        Returns:
            True if they are free by now: do not sleep. Otherwise sleep, but not for long: not
            every guest signals.
        """
        self.ring.control[PENDING_SEND_SIZE] = size
        full_fence()
        return self.free_untrusted() >= size

    def stop_waiting(self) -> None:
        """Take the request of :meth:`wait_for_room` back."""
        self.ring.control[PENDING_SEND_SIZE] = 0


def completion(transaction_id: int, payload: bytes) -> bytes:
    """Build a completion packet, the answer to a packet that asked for one.

    Args:
        transaction_id: That of the request, bit for bit.
        payload: At most :data:`~vmbus.wire.packets.MAX_PACKET` - 16 bytes; may be empty.
    """
    size = len(payload)
    if size & 7:
        payload += bytes(-size & 7)
        size = len(payload)
    return _pack_descriptor(COMPLETION, 2, (size >> 3) + 2, 0, transaction_id) + payload
