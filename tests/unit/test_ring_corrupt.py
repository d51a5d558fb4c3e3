"""Guests whose rings cannot be: what kills a ring, and what does not."""

from __future__ import annotations

import struct

import pytest

from tests.support.ring_peer import IN_BAND, PENDING, READ, WANTS_COMPLETION, WRITE, packet
from tests.support.rings import SMALL, incoming, outgoing, set_indices, words
from vmbus.errors import RingError
from vmbus.memory import PAGE_SIZE
from vmbus.ring import RingMemory, RingReader, RingWriter

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
