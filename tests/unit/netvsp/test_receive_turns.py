"""What is too much for one turn on its way to the guest: segments that it does not take whole."""

from __future__ import annotations

import random

import pytest
import trio

from netvsp.backlog import MAX_PIECES, SEGMENT_COST, TURN
from netvsp.frames import offload
from netvsp.frames.frame import GSO_TCPV4, GSO_UDP, NEEDS_CHECKSUM, Frame, Offload
from netvsp.receive import COST
from netvsp.wire import nvsp, oids
from tests.support.net_frames import Shape, packet, pieces_of, without_sum
from tests.support.net_guest import NetGuest, incoming, running
from tests.support.turns import counting

SHAPE = Shape(4, "tcp", "none")
PAYLOAD = random.Random(7).randbytes(60_000)
MOST = -(-TURN // SEGMENT_COST)
"""Pieces that are made in a turn, at most."""


def segment(payload: bytes = PAYLOAD, mss: int = 48) -> Frame:
    left, _items = without_sum(SHAPE, packet(SHAPE, payload))
    said = Offload(NEEDS_CHECKSUM, GSO_TCPV4, SHAPE.headers, mss, SHAPE.transport, 16)
    return Frame(left[:300], (memoryview(left)[300:],), said)


WANTED = list(pieces_of(SHAPE, PAYLOAD, 48))


@pytest.mark.parametrize("receive_pages", [32, 1024])
async def test_a_segment_of_a_thousand_pieces_is_cut_in_many_turns(receive_pages):
    """Also if the guest's buffer has no room for all of it."""
    guest = NetGuest(receive_pages=receive_pages)
    async with running(guest=guest, wants=oids.FILTER_PROMISCUOUS) as (_guest, adapter):
        before, after = incoming(number=1), incoming(number=2)
        with counting(offload, "_piece_headers") as made:
            assert adapter.receive([before, segment(), after]) == 2
            assert adapter.receive([after]) == 0
            for _ in range(len(WANTED)):
                await guest.settle()
                if made.total == len(WANTED) and not adapter._session.receiver._cutting:  # type: ignore[union-attr]
                    break
        assert made.most_in_turn <= MOST
        assert made.total == len(WANTED)
        await adapter.wait_room()
        assert adapter.receive([after]) == 1
        await guest.settle()
        assert guest.take_frames() == [before.tobytes(), *WANTED, after.tobytes()]
        assert adapter.statistics.receive.segments == 1
        assert adapter.statistics.receive.total_frames == len(WANTED) + 2
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0


async def test_who_brings_frames_waits_until_a_segment_is_through():
    async with running(wants=oids.FILTER_PROMISCUOUS) as (guest, adapter):
        assert adapter.receive([segment()]) == 1
        assert adapter.receive([incoming()]) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adapter.wait_room)
            for _ in range(len(WANTED)):
                await guest.settle()
                if not nursery.child_tasks:
                    break
            assert not nursery.child_tasks
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == [*WANTED, incoming().tobytes()]


async def test_a_segment_of_few_pieces_goes_at_once():
    async with running(wants=oids.FILTER_PROMISCUOUS) as (_guest, adapter):
        payload = PAYLOAD[: MAX_PIECES * 100]
        assert adapter.receive([segment(payload, 100)]) == 1
        assert adapter.statistics.receive.total_frames == MAX_PIECES
        assert adapter.receive([segment(payload + b"x", 100)]) == 1
        assert adapter.statistics.receive.total_frames == MAX_PIECES


async def test_what_does_not_belong_to_one_segment_is_dropped_and_counted():
    """It says that it can be cut, and cannot be."""
    async with running(wants=oids.FILTER_PROMISCUOUS) as (guest, adapter):
        arp = Frame(
            packet(SHAPE, PAYLOAD)[:12] + b"\x08\x06" + PAYLOAD,
            (),
            Offload(NEEDS_CHECKSUM, GSO_UDP, 42, 48, 34, 6),
        )
        assert adapter.receive([arp]) == 1
        await guest.settle()
        assert adapter.statistics.receive.dropped == {"too long": 1}
        assert adapter.receive([incoming()]) == 1


@pytest.mark.parametrize("how", ["revoked", "closed", "filtered"])
async def test_a_segment_ends_with_what_it_was_for(how):
    guest = NetGuest(receive_pages=32)
    async with running(guest=guest, wants=oids.FILTER_PROMISCUOUS) as (_guest, adapter):
        assert adapter.receive([segment()]) == 1
        session = adapter._session
        assert session is not None
        assert session.receiver._cutting is not None
        if how == "revoked":
            revoke = nvsp.build_revoke(nvsp.REVOKE_RECEIVE_BUFFER, nvsp.RECEIVE_BUFFER_ID)
            await guest.ask(revoke, flags=0)
        elif how == "filtered":
            guest.gives_back = False
            await guest.settle()
            await guest.set_filter(0)
            guest.give_back(*[each.transaction_id for each in guest.received])
            await guest.settle()
            assert adapter.statistics.receive.total_frames < len(WANTED)
        else:
            guest.channel.end()
        await guest.settle()
        assert session.receiver._cutting is None


async def test_nothing_is_cut_while_the_partition_stands_still():
    async with running(wants=oids.FILTER_PROMISCUOUS) as (guest, adapter):
        assert adapter.receive([segment()]) == 1
        await guest.channel.pause()
        with counting(offload, "_piece_headers") as made:
            await guest.settle()
            assert made.total == 0
            guest.channel.resume()
            for _ in range(len(WANTED)):
                await guest.settle()
        assert made.total == len(WANTED)
        assert guest.take_frames() == WANTED


async def test_a_batch_is_taken_as_far_as_one_turn_is_for():
    """What is left comes again at once: there is room for it."""
    async with running() as (guest, adapter):
        most = -(-TURN // (COST + 64))
        frames = [incoming(number=number) for number in range(most + 10)]
        assert adapter.receive(frames) == most
        await adapter.wait_room()
        assert adapter.receive(frames[most:]) == 10
        await guest.settle()
        assert guest.take_frames() == [each.tobytes() for each in frames]


async def test_a_batch_of_segments_is_no_more_than_a_turn():
    async with running(wants=oids.FILTER_PROMISCUOUS) as (_guest, adapter):
        some = [segment(PAYLOAD[:6000], 100)] * 40
        cost = COST + 2 * len(some[0]) + 60 * SEGMENT_COST
        assert adapter.receive(some) == -(-TURN // cost)
