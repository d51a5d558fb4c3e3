"""The short way of a frame ends where the long way does."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any
from unittest import mock

import trio
from hypothesis import given, settings, strategies as st

from netvsp.endpoint import Offloads
from netvsp.link import AdapterConfig
from netvsp.transmit import Sender
from netvsp.wire import oids, ppi, rndis
from tests.support.net_frames import SHAPES, packet, uncut, without_sum
from tests.support.net_guest import MAC, PEER, NetGuest, Network, message_of, plain_frame, running

ALL = Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True)
SECTIONS = 10


def _made(shape, size: int, how: int) -> bytes:
    whole = packet(shape, bytes(size))
    if how == 2 and shape.protocol == "tcp":
        left, items = uncut(shape, whole, 1000)
    elif how:
        left, items = without_sum(shape, whole)
    else:
        left, items = whole, shape.items()
    return message_of(left, b"".join(ppi.build_item(*each) for each in items.items()))


OF_STATIONS = [
    message_of(plain_frame(size, source=source, target=target), information)
    for size in (14, 60, 1514, 1518, 1519, 5000)
    for source in (MAC, PEER)
    for target in (PEER, b"\xff" * 6)
    for information in (b"", ppi.build_item(ppi.HASH_VALUE, 7))
]
TAGGED = PEER + MAC + b"\x81\0\0\5\x88\xb5"
WHOLE = [
    message_of(b""),
    message_of(plain_frame(13)),
    message_of(TAGGED.ljust(1518, b"t")),
    message_of(plain_frame(60), bytes(16)),
    *[_made(shape, size, how) for shape in SHAPES for size, how in ((9, 0), (9, 1), (4500, 2))],
]

whole = st.sampled_from(OF_STATIONS) | st.sampled_from(WHOLE)


def _changed(message: bytes, place: int, by: int) -> bytes:
    """Add something to a field of the header."""
    data = bytearray(message)
    value = int.from_bytes(data[place : place + 4], "little") + by
    data[place : place + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(data)


FIELDS = (0, 4, 8, 12, 28, 32)
AMOUNTS = (-8, -1, 1, 8, 100, 0x7FFFFFFF)
damaged = st.builds(_changed, whole, st.sampled_from(FIELDS), st.sampled_from(AMOUNTS))
padded = whole.map(lambda each: _changed(each, 4, 8) + bytes(8))
CONTROL = [
    rndis.build_request(rndis.SET, 1, oids.GEN_CURRENT_PACKET_FILTER, each.to_bytes(4, "little"))
    for each in (0, 1)
]
messages = st.one_of(
    st.sampled_from(OF_STATIONS),
    whole,
    damaged,
    padded,
    st.tuples(whole, st.integers(0, 200)).map(lambda both: both[0][: both[1]]),
    # With up to seven bytes behind it, which are no other message.
    st.tuples(whole, st.integers(1, 7)).map(lambda both: both[0] + bytes(both[1])),
    st.lists(whole, min_size=2, max_size=3).map(b"".join),
    st.sampled_from(CONTROL),
)
places = st.sampled_from(["section", "section", "section", "pages", "both"])
packets = st.lists(
    st.tuples(
        messages,
        places,
        st.integers(0, SECTIONS - 1),
        st.lists(st.integers(0, 200) | st.integers(0, 6000), max_size=3).map(sorted),
        st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, 2]),
        st.sampled_from([1, 1, 1, 0]),
    ),
    min_size=1,
    max_size=6,
)
configs = st.sampled_from(
    [
        *[AdapterConfig()] * 5,
        AdapterConfig(vlan=5),
        AdapterConfig(trunk=frozenset({0, 5})),
        AdapterConfig(allow_spoofing=True),
    ]
)


def _cut(data: bytes, where: list[int]) -> list[bytes]:
    ends = [0, *[min(each, len(data)) for each in where], len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def _packet(guest: NetGuest, number: int, given_packet: tuple[Any, ...]) -> bytes:
    message, place, section, where, kind, flags = given_packet
    more = {"kind": kind, "number": number, "flags": flags}
    if place == "section":
        return guest.section(section, message[: guest.section_size], **more)
    pieces = [(at * 1000 % 4096, each) for at, each in enumerate(_cut(message, where))]
    if place == "both":
        return guest.pages(pieces[1:], section=(section, pieces[0][1][:6000]), **more)
    return guest.pages(pieces, **more)


def _batches(some: list[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Packets that can come together: those in pages use the same ones."""
    found: list[list[tuple[Any, ...]]] = []
    used: set[int] = set()
    for each in some:
        _message, place, section, *_ = each
        if place != "section" or section in used or not found:
            found.append([])
            used = set(range(SECTIONS)) if place != "section" else set()
        used.add(section)
        found[-1].append(each)
    return found


async def _seen(
    some: list[tuple[Any, ...]],
    config: AdapterConfig,
    offloads: Offloads,
    room: int | None,
    *,
    link: bool,
    short: bool,
) -> tuple[object, ...]:
    """Return all that can be told of the packets when they have been dealt with."""
    network = Network(offloads, room=room)
    long_way = mock.patch.object(Sender, "_state", return_value=(False, {}, b""))
    with contextlib.nullcontext() if short else long_way:
        async with running(network, config=config) as (guest, adapter):
            session = adapter._session
            assert session is not None
            assert session._send_buffer is not None
            for index in range(SECTIONS):
                session._send_buffer.part(index)
            reader = session._senders[guest.channel].messages
            for each in WHOLE[-len(SHAPES) * 3 :]:
                reader.frames_untrusted([each])  # what their information means is known
            adapter.set_link(up=link)
            guest.received.clear()
            number = 0
            for batch in _batches(some):
                built = [_packet(guest, number + at, each) for at, each in enumerate(batch)]
                number += len(batch)
                await guest.exchange(*built)
            if room is not None:
                network.make_room(100_000)
                await guest.settle()
            await guest.settle()
            sent = [(each.tobytes(), each.offload, each.tci, each.flow) for each in network.frames]
            return (
                sent,
                guest.completions,
                [each.messages for each in guest.received],
                guest.host.complaints,
                adapter.statistics.transmit.describe(),
                guest.channel.outstanding,
            )


@given(
    packets,
    configs,
    st.sampled_from([ALL, ALL, Offloads(), Offloads(checksum=True)]),
    st.sampled_from([None] * 5 + [0, 2]),
    st.sampled_from([True] * 5 + [False]),
)
@settings(max_examples=200, deadline=None)
def test_the_short_way_ends_where_the_long_way_does(some, config, offloads, room, link):
    # Sender.serve_batch_untrusted, with and without its own look at packets; large_frame_untrusted.
    async def both() -> None:
        found = [
            await _seen(some, config, offloads, room, link=link, short=short)
            for short in (True, False)
        ]
        assert found[0] == found[1]

    trio.run(both)


def test_every_kind_of_message_ends_the_same_both_ways():
    several = [*OF_STATIONS, *WHOLE]
    several += [_changed(each, 4, 8) + bytes(8) for each in (OF_STATIONS[8], OF_STATIONS[20])]
    for each in (OF_STATIONS[4], OF_STATIONS[20], OF_STATIONS[21], WHOLE[-1]):
        several += [_changed(each, field, by) for field in FIELDS for by in AMOUNTS]

    async def both() -> None:
        for place, where in (("section", []), ("pages", [100]), ("pages", [44]), ("both", [100])):
            for offloads in (ALL, Offloads()):
                some = [
                    (each, place, number % SECTIONS, where, 0, 1)
                    for number, each in enumerate(several)
                ]
                config = AdapterConfig()
                found = [
                    await _seen(some, config, offloads, None, link=True, short=short)
                    for short in (True, False)
                ]
                assert found[0] == found[1]

    trio.run(both)


def _of_tcp(size: int, *, segment: bool) -> bytes:
    shape = next(each for each in SHAPES if each.protocol == "tcp" and each.vlan == "none")
    whole = packet(shape, bytes(size))
    left, items = uncut(shape, whole, 1000) if segment else without_sum(shape, whole)
    return message_of(left, b"".join(ppi.build_item(*each) for each in items.items()))


COMMON = {
    "in a section": (message_of(plain_frame(1514)), None),
    "in pages": (message_of(plain_frame(1514)), (44,)),
    "long, in pages": (message_of(plain_frame(8000)), (44, 200)),
    "without its sum": (_of_tcp(1400, segment=False), None),
    "a segment": (_of_tcp(20_000, segment=True), (100,)),
}


async def _goes_short(message: bytes, pieces: tuple[int, ...] | None) -> bool:
    network = Network(ALL)
    async with running(network, mtu=9000) as (guest, adapter):
        session = adapter._session
        assert session is not None
        sender = session._senders[guest.channel]
        # The first one of a section, or with new information, goes the long way.
        for _ in range(2):
            with (
                mock.patch.object(session, "_act", wraps=session._act) as act,
                mock.patch.object(sender, "add", wraps=sender.add) as add,
            ):
                if pieces is None:
                    await guest.exchange(guest.section(3, message))
                else:
                    parts = [(0, each) for each in _cut(message, list(pieces))]
                    await guest.exchange(guest.pages(parts))
        assert len(network.frames) == 2
        return not act.called and not add.called


def test_what_drivers_send_goes_the_short_way():
    found = {name: trio.run(_goes_short, *each) for name, each in COMMON.items()}
    assert found == dict.fromkeys(COMMON, True)
