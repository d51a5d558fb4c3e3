"""The host's ends of both rings: framing, and pages that are scattered."""

from __future__ import annotations

import pytest

from tests.support.ring_peer import IN_BAND, READ, WRITE, packet
from tests.support.rings import SMALL, incoming, outgoing, pages, set_indices, words
from vmbus.errors import GuestProtocolError
from vmbus.memory import PAGE_SIZE
from vmbus.ring import MAX_BATCH_BYTES, Packet, RingMemory, RingReader, RingWriter, completion
from vmbus.wire.packets import COMPLETION, MAX_PACKET, build_packet

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


# -- waiting for room ------------------------------------------------------------------------------


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
