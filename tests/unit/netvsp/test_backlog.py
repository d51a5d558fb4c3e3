"""What is too much for one turn: a segment of a thousand pieces, and all that is behind it."""

from __future__ import annotations

import random

from netvsp.backlog import FRAME_COST, MAX_PIECES, STEP, TURN, count_pieces, finished
from netvsp.endpoint import Offloads
from netvsp.frames import offload
from netvsp.frames.frame import Frame, Offload
from netvsp.frames.offload import fill_checksum
from netvsp.wire import nvsp, ppi
from tests.support.net_frames import Shape, packet, pieces_of, uncut
from tests.support.net_guest import Network, message_of, plain_frame, running
from tests.support.turns import counting

SHAPE = Shape(4, "tcp", "none")
MSS = 48
PAYLOAD = random.Random(3).randbytes(60_000)


def segment(payload: bytes = PAYLOAD, mss: int = MSS) -> bytes:
    left, items = uncut(SHAPE, packet(SHAPE, payload), mss)
    return message_of(left, ppi.build_item(ppi.LARGE_SEND, items[ppi.LARGE_SEND]))


MOST = TURN // FRAME_COST + STEP
"""Pieces that are made in a turn."""


async def test_a_segment_of_a_thousand_pieces_is_cut_in_many_turns():
    network = Network()
    async with running(network) as (guest, adapter):
        first = guest.section(0, message_of(plain_frame(60)), number=1)
        last = guest.section(1, message_of(plain_frame(61)), number=3)
        wanted = [plain_frame(60), *pieces_of(SHAPE, PAYLOAD, MSS), plain_frame(61)]
        with counting(offload, "_piece_headers") as made:
            await guest.exchange(first, guest.pages([(0, segment())], number=2), last)
        assert made.most_in_turn <= MOST
        assert made.turns > len(wanted) // MOST
        assert network.bytes() == wanted
        assert guest.take_completions() == [(number, nvsp.SUCCESS) for number in (1, 2, 3)]
        assert adapter.statistics.transmit.total_frames == len(wanted)
        assert adapter.statistics.transmit.segments == 1
        assert guest.channel.undertakings.load.total == 0


async def test_many_such_segments_are_no_more_in_a_turn():
    network = Network()
    async with running(network) as (guest, _adapter):
        packets = [guest.pages([(0, segment())], number=number) for number in range(8)]
        with counting(offload, "_piece_headers") as made:
            await guest.exchange(*packets)
        assert made.total == 8 * len(list(pieces_of(SHAPE, PAYLOAD, MSS)))
        assert made.most_in_turn <= MOST
        assert len(guest.take_completions()) == 8


async def test_a_segment_of_few_pieces_goes_at_once():
    network = Network()
    async with running(network) as (guest, _adapter):
        payload = PAYLOAD[: MAX_PIECES * 100]
        await guest.exchange(guest.pages([(0, segment(payload, 100))], number=1))
        assert network.calls == [MAX_PIECES]
        await guest.exchange(guest.pages([(0, segment(payload + b"x", 100))], number=1))
        await guest.settle()
        assert network.calls == [MAX_PIECES, STEP, STEP, 1]


async def test_its_pieces_wait_for_room_like_any_frames():
    network = Network(room=100)
    async with running(network) as (guest, _adapter):
        await guest.exchange(guest.pages([(0, segment())], number=1))
        await guest.settle()
        assert len(network.frames) == 100
        assert guest.take_completions() == []
        guest.write(guest.data_pfns, 0, bytes(61_000))
        network.make_room(10_000)
        await guest.settle()
        assert network.bytes() == list(pieces_of(SHAPE, PAYLOAD, MSS))
        assert guest.take_completions() == [(1, nvsp.SUCCESS)]


def test_pieces_are_counted_as_they_are_made():
    none = Offloads()
    for length in (54 + 1, 54 + 48, 54 + 49, 54 + 96, 20_000):
        large = Offload(1, 1, 54, 48, 34, 16)
        head = packet(SHAPE, bytes(length - 54))
        frame = Frame(head, (), large)
        assert len(list(finished([frame], none))) == count_pieces(large, length, none)
    assert count_pieces(None, 60_000, none) == 1
    assert count_pieces(Offload(1, 0, 0, 0, 34, 16), 60_000, none) == 1
    for offloads, kind in (
        (Offloads(tcp_segments=True), 1),
        (Offloads(tcp_segments=True), 0x84),
        (Offloads(udp_segments=True), 5),
    ):
        large = Offload(1, kind, 54, 48, 34, 16)
        assert count_pieces(large, 60_000, offloads) == 1
        frame = Frame(bytes(60_000), (), large)
        assert list(finished([frame], offloads)) == [frame]


def test_what_was_done_is_not_done_again():
    """Pieces that an endpoint has had no room for are asked about once more."""
    frame = Frame(packet(SHAPE, b"some"), (), Offload(1, 0, 0, 0, 34, 16))
    once = list(finished([frame], Offloads()))
    assert once[0].tobytes() == fill_checksum(frame).tobytes()
    assert list(finished(once, Offloads())) == once
