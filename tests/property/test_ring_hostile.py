"""Rings whose other side writes anything at any time: only RingError, and every byte read once."""

from __future__ import annotations

import random
from typing import Any, cast

from hypothesis import given, settings, strategies as st

from tests.support.ring_peer import IN_BAND, PENDING, READ, WRITE, packet
from vmbus.errors import RingError
from vmbus.memory import PAGE_SIZE, allocate_memory
from vmbus.ring import MAX_BATCH_BYTES, Packet, RingMemory, RingReader, RingWriter

u32 = st.integers(0, 0xFFFF_FFFF)
index = st.integers(0, 2 * 512).map(lambda n: n * 8)
any_index = index | u32
words = st.integers(0, 6).map(lambda n: n.to_bytes(2, "little"))
descriptors = st.builds(
    lambda kind, offset, length, rest: kind + offset + length + rest,
    words,
    words,
    words,
    st.binary(min_size=10, max_size=34),
)
contents = st.lists(descriptors | st.binary(max_size=40), max_size=30).map(b"".join)

MEMORY = allocate_memory(40 * PAGE_SIZE)
PFNS = (0, 3, 1)
SIZE = 2 * PAGE_SIZE


def fill(content: bytes, write: int, read: int) -> None:
    """Put ``content`` where ``write`` and ``read`` make it a ring's, or nearly."""
    flat = (content + bytes(SIZE))[:SIZE]
    for position, pfn in enumerate(PFNS[1:]):
        MEMORY.write(pfn * PAGE_SIZE, flat[position * PAGE_SIZE : (position + 1) * PAGE_SIZE])
    control = MEMORY.page(0).cast("I")
    control[WRITE], control[READ], control[PENDING] = write, read, 0
    control.release()


@given(contents, any_index, any_index, st.integers(0, 50), u32)
@settings(max_examples=400)
def test_any_ring_is_read_or_refused_with_ring_error(content, write, read, limit, pending):
    fill(content, write, read)
    try:
        reader = RingReader(RingMemory(MEMORY, PFNS))
    except RingError:
        assert read >= SIZE or read % 8
        return
    reader.ring.control[PENDING] = pending
    taken = 0
    try:
        for _ in range(3):
            before = reader.available()
            packets = reader.read_batch_untrusted(limit)
            assert len(packets) <= limit
            for each in packets:
                assert 16 <= each.payload_offset <= len(each.data)
                assert len(each.data) % 8 == 0
                taken += len(each.data) + 8
            assert before - reader.available() == sum(len(each.data) + 8 for each in packets)
            reader.commit()
            reader.unmask()
    except RingError:
        assert reader.has_data()
    assert reader.ring.control[READ] % 8 == 0
    assert reader.ring.control[READ] < SIZE
    assert taken <= (write - read) % SIZE


@given(any_index, any_index, st.lists(st.integers(0, 3000), max_size=6), any_index, u32)
@settings(max_examples=300)
def test_any_outgoing_ring_is_written_in_bounds_or_refused(write, read, lengths, later, mask):
    fill(b"", write, read)
    MEMORY.write(2 * PAGE_SIZE, b"\xa5" * PAGE_SIZE)
    try:
        writer = RingWriter(RingMemory(MEMORY, PFNS))
    except RingError:
        assert write >= SIZE or write % 8 or read >= SIZE or read % 8
        return
    writer.ring.control[2] = mask
    packets = [packet(IN_BAND, bytes(length)) for length in lengths]
    try:
        for position in (read, later):
            writer.ring.control[READ] = position
            room = writer.free_untrusted()
            count, signal = writer.write_batch_untrusted(packets)
            assert sum(len(each) + 8 for each in packets[:count]) <= room
            assert not (signal and mask)
            writer.wait_for_room(64)
            writer.stop_waiting()
    except RingError:
        assert later >= SIZE or later % 8
    assert writer.ring.control[WRITE] % 8 == 0
    assert writer.ring.control[WRITE] < SIZE
    assert MEMORY.read(2 * PAGE_SIZE, PAGE_SIZE) == b"\xa5" * PAGE_SIZE, "not a page of the ring"


# -- one fetch -------------------------------------------------------------------------------------


class ChangingWords:
    """A control page of which every word changes as soon as it has been read."""

    def __init__(self, real: memoryview, rng: random.Random) -> None:
        self.real = real
        self.rng = rng
        self.reads: list[int] = []

    def __getitem__(self, word: int) -> int:
        value = self.real[word]
        self.reads.append(word)
        self.real[word] = self.rng.choice(
            (0, 1, 8, 64, 4096, 0xFFFF_FFFF, self.rng.getrandbits(32))
        )
        return value

    def __setitem__(self, word: int, value: int) -> None:
        self.real[word] = value


class ChangingRing(RingMemory):
    """A ring whose bytes are overwritten by the guest as soon as they have been copied."""

    __slots__ = ("fetched", "rng")

    def __init__(self, pfns: tuple[int, ...] | range, seed: int) -> None:
        super().__init__(MEMORY, pfns)
        self.rng = random.Random(seed)
        self.fetched: list[tuple[int, int]] = []

    def start_changing(self) -> ChangingWords:
        changing = ChangingWords(self.control, self.rng)
        self.control = cast("Any", changing)
        return changing

    def read(self, offset: int, length: int) -> bytes:
        found = super().read(offset, length)
        self.fetched.append((offset, length))
        super().write(offset, self.rng.randbytes(length))
        return found


def put_packets(ring: RingMemory, start: int, packets: list[bytes]) -> int:
    data = b"".join(each + bytes(8) for each in packets)
    ring.write(start, data)
    end = (start + len(data)) % ring.size
    ring.control[READ], ring.control[WRITE] = start, end
    return len(data)


bodies = st.lists(st.integers(0, 900), min_size=1, max_size=8)


@given(bodies, st.integers(0, 1023), st.integers(0, 1 << 32))
def test_packets_are_those_of_the_one_fetch_whatever_the_guest_does_afterwards(
    lengths, start, seed
):
    """Checklist row 40."""
    ring = ChangingRing(PFNS, seed)
    packets = [packet(IN_BAND, ring.rng.randbytes(n), ident=n, flags=n & 1) for n in lengths]
    total = put_packets(ring, start * 8, packets)
    reader = RingReader(ring)
    control = ring.start_changing()
    got = reader.read_batch_untrusted()
    assert [each.data for each in got] == packets
    assert [each.transaction_id for each in got] == lengths
    assert control.reads == [WRITE]
    assert ring.fetched == [(start * 8, total)]
    # What is committed does not depend on what the words say by now.
    reader.commit()
    assert control.real[READ] == (start * 8 + total) % ring.size
    assert READ not in control.reads


@given(st.integers(0, 20 * 512 - 1), st.integers(0, 1 << 32))
@settings(max_examples=40)
def test_a_packet_longer_than_a_batch_is_fetched_in_two_parts_that_do_not_overlap(start, seed):
    ring = ChangingRing(range(10, 31), seed)
    body = ring.rng.randbytes(70_000)
    whole = packet(IN_BAND, body)
    put_packets(ring, start * 8, [whole, packet(IN_BAND, b"next")])
    reader = RingReader(ring)
    control = ring.start_changing()
    (got,) = reader.read_batch_untrusted()
    assert got.data == whole
    assert control.reads == [WRITE]
    rest = len(whole) + 8 - MAX_BATCH_BYTES
    second = (start * 8 + MAX_BATCH_BYTES) % ring.size
    assert ring.fetched == [(start * 8, MAX_BATCH_BYTES), (second, rest)]


@given(bodies, st.integers(0, 1023), st.integers(0, 1 << 32))
def test_a_batch_is_written_with_one_look_at_the_guests_index(lengths, start, seed):
    ring = ChangingRing(PFNS, seed)
    ring.control[READ] = ring.control[WRITE] = start * 8
    writer = RingWriter(ring)
    control = ring.start_changing()
    packets = [packet(IN_BAND, bytes(n)) for n in lengths]
    count, _signal = writer.write_batch_untrusted(packets)
    assert count == len(packets)
    # One look for the room; mask and index once more, for the signal only, in that order.
    assert control.reads in ([READ, 2, READ], [READ, 2])
    total = sum(len(each) + 8 for each in packets)
    assert control.real[WRITE] == (start * 8 + total) % ring.size


def test_a_packet_of_the_fetch_is_private_bytes():
    ring = ChangingRing(PFNS, 1)
    put_packets(ring, 0, [packet(IN_BAND, b"12345678")])
    (got,) = RingReader(ring).read_batch_untrusted()
    assert isinstance(got, Packet)
    assert type(got.data) is bytes
