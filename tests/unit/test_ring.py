"""The host's ends of both rings: framing, signalling, masks, room, and corrupt guests."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.support.ring_peer import (
    FEATURES,
    IN_BAND,
    MASK,
    PENDING,
    READ,
    WANTS_COMPLETION,
    WRITE,
    PeerReader,
    PeerRing,
    PeerWriter,
    packet,
)
from vmbus.errors import GuestProtocolError, RingError
from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory
from vmbus.ring import MAX_BATCH_BYTES, Packet, RingMemory, RingReader, RingWriter, completion
from vmbus.wire.packets import COMPLETION, MAX_PACKET, build_packet


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = allocate_memory(300 * PAGE_SIZE)
    yield memory
    memory.close()


def pages(memory: GuestMemory, pfns: range | list[int]) -> list[memoryview]:
    return [memory.page(pfn) for pfn in pfns]


def set_indices(memory: GuestMemory, pfn: int, write: int, read: int | None = None) -> None:
    memory.write(pfn * PAGE_SIZE, struct.pack("<II", write, write if read is None else read))


def incoming(
    memory: GuestMemory, data_pages: int = 1, start: int = 0
) -> tuple[PeerWriter, RingReader]:
    set_indices(memory, 0, start)
    pfns = range(data_pages + 1)
    return PeerWriter(PeerRing(pages(memory, pfns))), RingReader(RingMemory(memory, pfns))


def outgoing(
    memory: GuestMemory, data_pages: int = 1, start: int = 0
) -> tuple[RingWriter, PeerReader]:
    set_indices(memory, 0, start)
    pfns = range(data_pages + 1)
    return RingWriter(RingMemory(memory, pfns)), PeerReader(PeerRing(pages(memory, pfns)))


def words(memory: GuestMemory) -> memoryview:
    return memory.page(0).cast("I")


SMALL = packet(IN_BAND, b"12345678", ident=1)
"""24 bytes, 32 in the ring."""


# -- framing ---------------------------------------------------------------------------------------


def test_a_packet_arrives_with_all_its_fields(memory):
    peer, reader = incoming(memory)
    peer.put([packet(7, b"abcdefgh", ident=0xFFFFFFFF_FFFFFFFF, flags=0x8001)])
    (got,) = reader.read_batch_untrusted()
    assert (got.kind, got.flags, got.transaction_id) == (7, 0x8001, 0xFFFFFFFF_FFFFFFFF)
    assert got.payload_offset == 16
    assert got.payload == b"abcdefgh"
    assert len(got.data) == 24
    assert got.wants_completion
    assert repr(got) == "<Packet kind=7 flags=0x8001 id=0xffffffffffffffff 24 bytes>"


def test_a_packet_without_the_flag_wants_no_completion():
    assert not Packet(IN_BAND, 0xFFFE, 0, bytes(16), 16).wants_completion


def test_an_empty_ring_gives_nothing_and_nothing_is_signalled(memory):
    _peer, reader = incoming(memory)
    assert reader.read_batch_untrusted() == []
    assert not reader.has_data()
    assert reader.available() == 0
    assert not reader.commit()


def test_no_more_than_max_packets_are_taken_and_the_rest_comes_next(memory):
    peer, reader = incoming(memory)
    peer.put([packet(IN_BAND, b"", ident=n) for n in range(10)])
    assert reader.available() == 240
    assert [p.transaction_id for p in reader.read_batch_untrusted(3)] == [0, 1, 2]
    assert reader.read_batch_untrusted(0) == []
    assert reader.available() == 240 - 72
    assert [p.transaction_id for p in reader.read_batch_untrusted(6)] == [3, 4, 5, 6, 7, 8]
    assert [p.transaction_id for p in reader.read_batch_untrusted(6)] == [9]


def test_nothing_is_told_to_the_guest_before_the_commit(memory):
    peer, reader = incoming(memory)
    peer.put([SMALL] * 3)
    reader.read_batch_untrusted()
    assert words(memory)[READ] == 0
    reader.commit()
    assert words(memory)[READ] == 96


@pytest.mark.parametrize("start", range(0, PAGE_SIZE, 8))
def test_a_packet_wraps_at_every_position_in_both_directions(memory, start):
    body = bytes(range(40))
    peer, reader = incoming(memory, start=start)
    assert peer.put([packet(IN_BAND, body, ident=start), SMALL]) == (2, True)
    first, second = reader.read_batch_untrusted()
    assert (first.payload, first.transaction_id) == (body, start)
    assert second.data == SMALL
    reader.commit()
    assert words(memory)[READ] == (start + 64 + 32) % PAGE_SIZE
    writer, guest = outgoing(memory, start=start)
    assert writer.write_batch_untrusted([packet(IN_BAND, body, start), SMALL]) == (2, True)
    got = guest.take()  # checks the trailers too
    assert [each.payload for each in got] == [body, b"12345678"]
    assert words(memory)[WRITE] == (start + 64 + 32) % PAGE_SIZE


def test_a_ring_can_be_filled_to_eight_bytes_less_than_its_size(memory):
    peer, reader = incoming(memory, start=4000)
    whole = packet(IN_BAND, bytes(PAGE_SIZE - 8 - 8 - 16))
    assert peer.put([whole]) == (1, True)
    assert reader.available() == PAGE_SIZE - 8
    assert reader.read_batch_untrusted()[0].data == whole
    writer, guest = outgoing(memory, start=4000)
    assert writer.capacity == len(whole) == PAGE_SIZE - 16
    assert writer.free_untrusted() == PAGE_SIZE - 8
    assert writer.write_batch_untrusted([whole + bytes(8)]) == (0, False)
    assert writer.write_batch_untrusted([whole, SMALL]) == (1, True)
    assert (writer.free_untrusted(), writer.occupied()) == (0, PAGE_SIZE - 8)
    assert writer.write_batch_untrusted([packet(IN_BAND, b"")]) == (0, False)
    assert len(guest.take()) == 1


def test_a_big_ring_takes_the_longest_packet_that_a_descriptor_can_describe(memory):
    writer, guest = outgoing(memory, data_pages=200)
    assert writer.capacity == MAX_PACKET
    body = bytes(range(256)) * (MAX_PACKET // 256)
    big = build_packet(IN_BAND, body[: MAX_PACKET - 16])
    assert writer.write_batch_untrusted([big]) == (1, True)
    assert guest.take()[0].payload == body[: MAX_PACKET - 16]


@pytest.mark.parametrize("start", [0, 128, 100 * PAGE_SIZE - 24])
def test_a_packet_longer_than_a_batch_is_fetched_whole(memory, start):
    body = bytes(range(251)) * 800  # 200 800 bytes
    peer, reader = incoming(memory, data_pages=100, start=start)
    assert len(body) > MAX_BATCH_BYTES
    peer.put([packet(IN_BAND, body, ident=5), SMALL])
    (got,) = reader.read_batch_untrusted()
    assert got.payload == body
    assert reader.read_batch_untrusted()[0].data == SMALL


def test_a_batch_ends_before_a_packet_that_it_has_only_half_of(memory):
    peer, reader = incoming(memory, data_pages=100)
    sizes = [60_000, 8_000, 40_000, 8, 60_000, 70_000, 8]
    peer.put([packet(IN_BAND, bytes(size), ident=size) for size in sizes])
    batches = []
    while reader.has_data():
        batches.append([p.transaction_id for p in reader.read_batch_untrusted()])
    assert batches == [[60_000], [8_000, 40_000, 8], [60_000], [70_000], [8]]


@pytest.mark.parametrize("tail", [8, 16, 24])
def test_a_batch_may_end_in_the_middle_of_a_descriptor(memory, tail):
    peer, reader = incoming(memory, data_pages=100)
    first = packet(IN_BAND, bytes(MAX_BATCH_BYTES - tail - 24))
    peer.put([first, SMALL, SMALL])
    assert len(reader.read_batch_untrusted()) == 1
    assert [p.data for p in reader.read_batch_untrusted()] == [SMALL, SMALL]


def test_completions_carry_id_and_payload_padded(memory):
    writer, guest = outgoing(memory)
    writer.write_batch_untrusted(
        [completion(0, b""), completion(0xFFFFFFFF_FFFFFFFD, b"123456789")]
    )
    first, second = guest.take()
    assert (first.kind, first.ident, first.payload) == (COMPLETION, 0, b"")
    assert (second.ident, second.payload) == (0xFFFFFFFF_FFFFFFFD, b"123456789" + bytes(7))


# -- scattered pages -------------------------------------------------------------------------------


def test_scattered_pages_hold_the_same_ring_as_neighbouring_ones(memory):
    """Every offset and length that crosses a page or the end, against one flat ring."""
    flat = RingMemory(memory, range(10, 15))
    scattered_pfns = [40, 33, 20, 21, 31]  # 20 and 21 are joined
    scattered = RingMemory(memory, scattered_pfns)
    assert scattered.size == flat.size == 4 * PAGE_SIZE
    content = bytes(n * 7 & 0xFF for n in range(flat.size))
    for ring in (flat, scattered):
        ring.write(0, content)
    assert b"".join(pages(memory, scattered_pfns[1:])) == content
    edges = [page * PAGE_SIZE + delta for page in range(4) for delta in (0, 8, 4080, 4088)]
    for offset in edges:
        for length in (0, 8, 16, 4088, 4096, 4104, 12296, 16376, 16384):
            expected = (content + content)[offset : offset + length]
            assert flat.read(offset, length) == expected
            assert scattered.read(offset, length) == expected
            patch = bytes(255 - byte for byte in expected)
            for ring in (flat, scattered):
                ring.write(offset, patch)
            assert scattered.read(0, scattered.size) == flat.read(0, flat.size)
            for ring in (flat, scattered):
                ring.write(offset, expected)
    for ring in (flat, scattered):
        assert ring.read(0, ring.size) == content


@pytest.mark.parametrize("pfns", [[], [1], range(1)])
def test_a_ring_has_a_control_page_and_a_data_page(memory, pfns):
    with pytest.raises(GuestProtocolError) as caught:
        RingMemory(memory, pfns)
    assert caught.value.field == "ring"


@pytest.mark.parametrize("pfns", [[300, 1], [0, 300], [0, 1, 1 << 51], [(1 << 64) - 1, 0]])
def test_a_ring_of_pages_that_are_not_memory_is_refused_and_keeps_none_of_them(memory, pfns):
    with pytest.raises(GuestProtocolError) as caught:
        RingMemory(memory, pfns)
    assert caught.value.field == "gpa"
    memory.close()
    assert memory.drained()


def test_released_rings_let_the_memory_go(memory):
    rings = [RingMemory(memory, pfns) for pfns in ([0, 1], [0, 5, 3])]
    memory.close()
    assert not memory.drained()
    for ring in rings:
        ring.release()
    assert memory.drained()


# -- signalling: we write --------------------------------------------------------------------------


def test_the_guest_is_signalled_when_its_ring_was_empty_and_only_then(memory):
    """Checklist row 8."""
    writer, guest = outgoing(memory)
    assert writer.write_batch_untrusted([SMALL]) == (1, True)
    assert writer.write_batch_untrusted([SMALL]) == (1, False), "it was not empty"
    guest.take(1)
    guest.done()
    assert writer.write_batch_untrusted([SMALL]) == (1, False), "one packet was still there"
    guest.take()
    guest.done()
    assert writer.write_batch_untrusted([SMALL, SMALL, SMALL]) == (3, True), "once per batch"


@pytest.mark.parametrize("mask", [1, 2, 0xFFFF_FFFF])
def test_a_guest_that_masks_interrupts_is_not_signalled(memory, mask):
    writer, guest = outgoing(memory)
    words(memory)[MASK] = mask
    assert writer.write_batch_untrusted([SMALL]) == (1, False)
    assert guest.unmask(), "but it finds the packet when it looks again"


def test_writing_nothing_signals_nothing(memory):
    writer, _guest = outgoing(memory)
    assert writer.write_batch_untrusted([]) == (0, False)
    assert words(memory)[WRITE] == 0


def test_only_whole_packets_in_order_are_written_when_room_runs_out(memory):
    writer, guest = outgoing(memory)
    big = packet(IN_BAND, bytes(2000), ident=1)
    count, _signal = writer.write_batch_untrusted([big, big, big, SMALL])
    assert count == 2, "the small one has to wait for the big one before it"
    assert [each.ident for each in guest.take()] == [1, 1]
    guest.done()
    assert writer.write_batch_untrusted([big] * 3)[0] == 2


def test_packet_bytes_stand_in_the_ring_before_the_index_says_so(memory):
    """The one order that a writer must keep; seen by looking at each index store."""
    writer, _guest = outgoing(memory)
    ring = writer.ring
    real = ring.control
    seen: list[tuple[int, bytes]] = []

    class Watch:
        def __getitem__(self, word: int) -> int:
            return real[word]

        def __setitem__(self, word: int, value: int) -> None:
            seen.append((word, ring.read(0, 24)))
            real[word] = value

    ring.control = cast("Any", Watch())
    writer.write_batch_untrusted([SMALL])
    assert seen == [(WRITE, SMALL)]


# -- signalling: we read ---------------------------------------------------------------------------


def test_reading_signals_nobody_who_does_not_wait(memory):
    peer, reader = incoming(memory)
    peer.put([packet(IN_BAND, bytes(1000))] * 3)
    reader.read_batch_untrusted()
    assert not reader.commit()


@pytest.mark.parametrize(
    ("free_before", "wanted", "freed", "signal"),
    [
        (96, 1000, 904 - 8, False),  # not enough yet
        (96, 1000, 904, True),  # just enough by one count: rather too early than never
        (96, 1000, 912, True),
        (96, 1000, 3000, True),
        (96, 96, 32, True),  # it had exactly that much, and wanted more than that
        (96, 88, 32, False),  # it had more than it waits for: it was not blocked
        (96, 999, 904, True),  # some guests store the size less one
        (96, 1007, 904, True),
        (96, 1007, 912, True),
        (96, 1008, 904, False),
        (96, 0, 3000, False),
        (96, 7, 3000, False),  # there are never fewer than 8 bytes free
        (8, 4088, 4088, True),
        (8, 4096, 4088, True),  # the whole ring: there will never be more
        (8, 4104, 4088, False),
        (8, 0xFFFF_FFFF, 4088, False),
    ],
)
def test_a_guest_that_waits_for_room_is_signalled_when_there_is(
    memory, free_before, wanted, freed, signal
):
    """The free space is counted as Linux counts it: with the bytes that have to stay free."""
    peer, reader = incoming(memory, start=8)
    used = PAGE_SIZE - free_before
    sizes = [freed, used - freed] if used > freed else [freed]
    for size in sizes:
        peer.put([packet(IN_BAND, bytes(size - 24))])
    assert peer.free() == free_before
    words(memory)[PENDING] = wanted
    reader.read_batch_untrusted(1)
    assert reader.commit() is signal


def test_the_guest_is_signalled_once_for_the_room_it_waits_for(memory):
    peer, reader = incoming(memory)
    peer.put([SMALL] * 127)
    assert not peer.ask_for_room(1000)
    signals = []
    while reader.read_batch_untrusted(1):
        signals.append(reader.commit())
    assert signals.count(True) in {1, 2}, "at the threshold, and just above it"
    assert signals.index(True) in {29, 30}


def test_a_commit_without_reading_does_nothing(memory):
    peer, reader = incoming(memory)
    peer.put([SMALL] * 100)
    reader.read_batch_untrusted()
    words(memory)[PENDING] = 2000
    assert reader.commit()
    words(memory)[READ] = 0x5A5A5A58
    assert not reader.commit()
    assert words(memory)[READ] == 0x5A5A5A58


def test_masking_and_the_look_after_unmasking(memory):
    """Checklist row 9."""
    peer, reader = incoming(memory)
    reader.mask()
    assert words(memory)[MASK] == 1
    assert peer.put([SMALL]) == (1, False), "the guest does not signal a masked ring"
    assert reader.unmask(), "but we find the packet when we look again"
    assert words(memory)[MASK] == 0
    reader.read_batch_untrusted()
    reader.commit()
    assert not reader.unmask()
    assert peer.put([SMALL]) == (1, True)
    assert peer.put([SMALL]) == (1, False)


# -- waiting for room ------------------------------------------------------------------------------


def test_waiting_for_room_tells_the_guest_how_much_and_looks_again(memory):
    """Checklist row 29 needs the poll of the channel as well; this is what it polls."""
    writer, guest = outgoing(memory)
    big = packet(IN_BAND, bytes(1000), ident=1)
    assert writer.write_batch_untrusted([big] * 5)[0] == 3
    assert not writer.wait_for_room(len(big) + 8)
    assert words(memory)[PENDING] == len(big) + 8
    guest.take(1)
    assert guest.done(), "the guest's own rule says to signal us now"
    assert writer.wait_for_room(len(big) + 8)
    assert writer.write_batch_untrusted([big] * 2)[0] == 1
    writer.stop_waiting()
    assert words(memory)[PENDING] == 0


@pytest.mark.parametrize("missing", [8, 16, 1000])
def test_the_guest_signals_exactly_when_what_we_wait_for_fits(memory, missing):
    """The two ways to count free space must agree, or we sleep beside room."""
    writer, guest = outgoing(memory)
    blocker = packet(IN_BAND, bytes(missing - 8 if missing > 16 else 0))
    freed = len(blocker) + 8
    writer.write_batch_untrusted([blocker, packet(IN_BAND, bytes(2000))])
    wanted = writer.free_untrusted() + freed
    assert not writer.wait_for_room(wanted)
    guest.take(1)
    assert guest.done()
    assert writer.free_untrusted() == wanted


def test_the_feature_bit_is_set_and_the_other_bits_stay(memory):
    words(memory)[FEATURES] = 0xFFFF_FFF0
    _writer, _guest = outgoing(memory)
    assert words(memory)[FEATURES] == 0xFFFF_FFF1


def test_reader_and_writer_begin_where_the_indices_stand(memory):
    set_indices(memory, 0, write=64, read=32)
    reader = RingReader(RingMemory(memory, range(2)))
    assert reader.available() == 32
    writer = RingWriter(RingMemory(memory, range(2)))
    assert writer.occupied() == 32
    assert writer.write_batch_untrusted([SMALL]) == (1, False)
    assert words(memory)[WRITE] == 96


def test_after_the_first_look_our_own_index_is_never_read_again(memory):
    peer, reader = incoming(memory)
    words(memory)[READ] = 0xDEADBEEF
    peer.ring.control[WRITE] = 0
    peer.ring.copy_in(0, SMALL + bytes(8))
    peer.ring.control[WRITE] = 32
    assert [p.data for p in reader.read_batch_untrusted()] == [SMALL]
    reader.commit()
    assert words(memory)[READ] == 32
    writer, guest = outgoing(memory)
    words(memory)[WRITE] = 0xDEADBEEF
    writer.write_batch_untrusted([SMALL])
    assert words(memory)[WRITE] == 32
    assert len(guest.take()) == 1


# -- corruption ------------------------------------------------------------------------------------

BAD_INDICES = [
    PAGE_SIZE,
    PAGE_SIZE + 8,
    2 * PAGE_SIZE,
    1,
    4,
    7,
    12,
    PAGE_SIZE - 1,
    0x8000_0000,
    0xFFFF_FFF8,
    0xFFFF_FFFF,
]


@pytest.mark.parametrize("index", BAD_INDICES)
def test_an_impossible_write_index_kills_the_incoming_ring(memory, index):
    _peer, reader = incoming(memory)
    words(memory)[WRITE] = index
    assert reader.has_data(), "so that the task looks, and learns"
    assert reader.available() == 0
    with pytest.raises(RingError, match="write_index") as caught:
        reader.read_batch_untrusted()
    assert caught.value.field == "write_index"


@pytest.mark.parametrize("index", BAD_INDICES)
def test_an_impossible_read_index_kills_the_outgoing_ring(memory, index):
    writer, _guest = outgoing(memory)
    writer.write_batch_untrusted([SMALL])
    words(memory)[READ] = index
    assert writer.occupied() == 0
    for call in (
        writer.free_untrusted,
        lambda: writer.write_batch_untrusted([SMALL]),
        lambda: writer.wait_for_room(100),
    ):
        with pytest.raises(RingError) as caught:
            call()
        assert caught.value.field == "read_index"
    assert words(memory)[WRITE] == 32, "nothing was written"


@pytest.mark.parametrize("index", BAD_INDICES)
def test_a_ring_with_an_impossible_index_cannot_be_opened(memory, index):
    ring = RingMemory(memory, range(2))
    set_indices(memory, 0, write=0, read=index)
    with pytest.raises(RingError):
        RingReader(ring)
    with pytest.raises(RingError):
        RingWriter(ring)
    set_indices(memory, 0, write=index, read=0)
    with pytest.raises(RingError):
        RingWriter(ring)


@pytest.mark.parametrize("index", BAD_INDICES)
def test_an_index_that_goes_bad_after_the_check_only_costs_a_signal(memory, index):
    """commit() looks at the guest's write index for the sake of the guest alone."""
    peer, reader = incoming(memory)
    peer.put([SMALL])
    reader.read_batch_untrusted()
    words(memory)[WRITE] = index
    words(memory)[PENDING] = 8
    assert reader.commit() in {True, False}
    assert words(memory)[READ] == 32


@pytest.mark.parametrize("offset8", [0, 1, 2, 3, 4, 0xFFFF])
@pytest.mark.parametrize("length8", [0, 1, 2, 3, 4, 5, 0x1FF, 0x8000, 0xFFFF])
def test_lengths_in_a_descriptor_are_possible_or_the_ring_is_dead(memory, offset8, length8):
    peer, reader = incoming(memory)
    data = struct.pack("<HHHHQ", IN_BAND, offset8, length8, 0, 0) + bytes(16) + bytes(8)
    peer.ring.copy_in(0, data)
    peer.ring.control[WRITE] = len(data)
    if 2 <= offset8 <= length8 == 4:
        (got,) = reader.read_batch_untrusted()
        assert got.payload_offset == offset8 * 8
    else:
        # A packet of length 2 or 3 is fine, but then 8 or 16 stray bytes follow its trailer.
        with pytest.raises(RingError) as caught:
            reader.read_batch_untrusted()
        assert caught.value.field in {"data_offset8", "length8", "write_index"}
        reader.commit()
        assert words(memory)[READ] == 0, "nothing of a corrupt batch is taken"


@pytest.mark.parametrize("stray", [8])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_stray_bytes_behind_the_last_packet_kill_the_ring(memory, stray, before):
    peer, reader = incoming(memory, start=4088)
    if before:
        peer.put([SMALL] * before)
    peer.ring.control[WRITE] = (4088 + 32 * before + stray) % PAGE_SIZE
    with pytest.raises(RingError, match=f"{stray} stray bytes") as caught:
        reader.read_batch_untrusted()
    assert caught.value.field == "write_index"


def test_a_packet_without_room_for_its_trailer_kills_the_ring(memory):
    peer, reader = incoming(memory)
    peer.ring.copy_in(0, SMALL)
    peer.ring.control[WRITE] = 24
    with pytest.raises(RingError, match="24 bytes and trailer, 24 are in the ring") as caught:
        reader.read_batch_untrusted()
    assert caught.value.field == "length8"


def test_a_long_packet_that_claims_more_than_is_there_is_not_fetched(memory):
    peer, reader = incoming(memory, data_pages=100)
    claimed = struct.pack("<HHHHQ", IN_BAND, 2, 0x7FFF, 0, 0)
    peer.ring.copy_in(0, claimed)
    peer.ring.control[WRITE] = 0x7FFF * 8
    with pytest.raises(RingError):
        reader.read_batch_untrusted()
    peer.ring.control[WRITE] = 0x7FFF * 8 + 8
    (got,) = reader.read_batch_untrusted()
    assert len(got.data) == 0x7FFF * 8


def test_good_packets_before_a_bad_one_are_lost_with_the_ring(memory):
    peer, reader = incoming(memory)
    peer.put([SMALL, packet(IN_BAND, b"x", ident=9, flags=WANTS_COMPLETION)])
    peer.ring.copy_in(32 + 2, b"\1\0")
    with pytest.raises(RingError):
        reader.read_batch_untrusted()
    assert [p.data for p in reader.read_batch_untrusted(1)] == [SMALL]


def test_a_guest_whose_read_index_lies_only_hurts_itself(memory):
    writer, guest = outgoing(memory)
    for _ in range(100):
        guest.ring.control[READ] = writer.ring.control[WRITE]
        assert writer.write_batch_untrusted([packet(IN_BAND, bytes(4000))])[0] == 1
