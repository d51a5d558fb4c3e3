"""When each side of a ring is signalled: masks, empty rings, and waiting for room."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.support.ring_peer import FEATURES, IN_BAND, MASK, PENDING, READ, WRITE, packet
from tests.support.rings import SMALL, incoming, outgoing, words
from vmbus.memory import PAGE_SIZE

# -- we write --------------------------------------------------------------------------------------


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


# -- we read ---------------------------------------------------------------------------------------


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
