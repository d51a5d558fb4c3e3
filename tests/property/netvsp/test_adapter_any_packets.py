"""An adapter fed arbitrary packets: each one answered once, and nothing escapes or is touched."""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

import trio
from hypothesis import given, settings, strategies as st

from netvsp.frames.frame import Frame, Offload
from netvsp.link import AdapterConfig
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.net_frames import SHAPES, packet
from tests.support.net_guest import (
    MAC,
    NetGuest,
    Network,
    Received,
    incoming,
    message_of,
    plain_frame,
    running,
)
from vmbus.memory import PAGE_SIZE
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, IN_BAND, build_packet

small = st.integers(0, 12)
word = small | st.sampled_from([36, 44, 60, 104, 2048, 6144, 0xCAFE, 0xFFFFFFFF]) | st.integers(
    0, 0xFFFFFFFF
)  # fmt: skip
words = st.lists(word, max_size=10).map(lambda some: struct.pack(f"<{len(some)}I", *some))
FRAMES = [packet(shape, bytes(size)) for shape in SHAPES for size in (0, 500, 6000)]


# -- RNDIS -----------------------------------------------------------------------------------------


@st.composite
def damaged(draw, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of which some words are others, or the last ones missing."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        if len(data) >= 4:
            place = draw(st.integers(0, min(len(data) - 4, 60)))
            data[place : place + 4] = draw(word).to_bytes(4, "little")
    if draw(st.integers(0, 7)):
        return bytes(data)
    return bytes(data[: draw(st.integers(0, len(data)))])


objects = (
    st.just(b"\x0d\0\0\0")
    | st.builds(
        ndis.build_rss_parameters,
        flags=st.integers(0, 31),
        hash_information=st.sampled_from([0x1701, 0, 2]),
        table=st.lists(st.integers(0, 8), max_size=128).map(tuple),
        key=st.binary(max_size=40),
    )
    | st.builds(
        lambda rsc: ndis.build_offload_parameters(
            ndis.OffloadParameters(rsc_ipv4=rsc, rsc_ipv6=rsc)
        ),
        small,
    )
    | st.just(rndis.build_parameter("NetworkAddress", "00155d0a0b0c"))
    | st.just(ndis.build_offload_query(2))
    | st.binary(max_size=60)
)
RIGHT = [
    (oids.GEN_CURRENT_PACKET_FILTER, b"\x2d\0\0\0"),
    (
        oids.GEN_RECEIVE_SCALE_PARAMETERS,
        ndis.build_rss_parameters(
            flags=0, hash_information=0x3F01, table=(0, 1, 0, 3), key=bytes(range(40))
        ),
    ),
    (
        oids.TCP_OFFLOAD_PARAMETERS,
        ndis.build_offload_parameters(ndis.OffloadParameters(rsc_ipv4=2, rsc_ipv6=2)),
    ),
    (oids.GEN_RNDIS_CONFIG_PARAMETER, rndis.build_parameter("NetworkAddress", "00155d0a0b0c")),
]
"""What a driver sets."""
requests = damaged(
    st.sampled_from(RIGHT).map(lambda each: rndis.build_request(rndis.SET, 5, *each))
    | st.builds(
        rndis.build_request,
        st.sampled_from([rndis.QUERY, rndis.SET]),
        small,
        st.sampled_from(sorted(oids.NAMES)) | word,
        objects,
    )
    | st.builds(rndis.build_initialize, small, word)
    | st.builds(rndis.build_id_message, st.integers(0, 9), small)
    | words
)
items = st.lists(
    st.builds(ppi.build_item, st.sampled_from([0, 2, 6, 8, 77]), word), max_size=3
).map(b"".join)
frames = damaged(
    st.builds(
        message_of,
        st.sampled_from(FRAMES) | st.integers(0, 1600).map(lambda size: plain_frame(60)[:size]),
        items,
    )
)
batches = st.lists(frames, min_size=1, max_size=9).map(b"".join)
messages = (
    st.tuples(st.just(0), frames | batches)
    | st.tuples(st.just(1), requests)
    | st.tuples(st.integers(0, 2), frames | requests)
)
"""With the type of channel that they are said to belong to."""

# -- packets ---------------------------------------------------------------------------------------

nvsp_messages = st.builds(
    lambda kind, body: struct.pack("<I", kind) + body,
    st.sampled_from(sorted(nvsp.MESSAGE_NAMES)) | word,
    words
    | st.sampled_from([struct.pack("<II", 0x60001, 0x60001), struct.pack("<II", 1, 0xCAFE)])
    | st.just(struct.pack("<II", 2, 0)),
)
actions: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("nvsp"), nvsp_messages, st.sampled_from([IN_BAND] * 4 + [GPA_DIRECT])),
    st.tuples(st.just("raw"), words, st.sampled_from([COMPLETION, 7, 8, 0, 0xFFFF])),
    st.tuples(st.just("section"), messages, st.integers(0, 9)),
    st.tuples(st.just("said"), st.integers(0, 2), word, word),
    st.tuples(
        st.just("pages"),
        messages,
        st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 2000)), min_size=1, max_size=4),
    ),
    st.tuples(st.just("both"), messages, st.integers(0, 2000)),
    st.tuples(st.just("ranges"), words, st.integers(0, 4)),
    st.tuples(st.just("back"), st.integers(0, 60)),
    st.tuples(st.just("receive"), st.integers(1, 90), st.integers(14, 2000)),
    st.tuples(st.just("segment"), st.sampled_from(FRAMES), st.sampled_from([0, 100, 1000, 9000])),
    st.tuples(st.just("link"), st.booleans()),
    st.tuples(
        st.just("sub-channel"),
    ),
    st.tuples(
        st.just("room"),
    ),
)


def build(guest: NetGuest, action: tuple[Any, ...], number: int, flags: int) -> bytes | None:
    """Return the packet of an action; None if it is none."""
    size = guest.section_size or 6144
    match action:
        case "nvsp", payload, kind:
            return build_packet(kind, payload, transaction_id=number, flags=flags)
        case "raw", payload, kind:
            return build_packet(kind, payload, transaction_id=number, flags=flags)
        case "section", (kind, message), index:
            message = message[:size]
            guest.write(guest.send_pfns, index * size, message)
            payload = nvsp.build_rndis_packet(kind, index, len(message))
            return guest.in_band(payload, number=number, flags=flags)
        case "said", kind, index, length:
            payload = nvsp.build_rndis_packet(kind, index, length)
            return guest.in_band(payload, number=number, flags=flags)
        case "pages", (kind, message), places:
            pieces = []
            for offset, length in places[:-1]:
                pieces.append((offset, message[:length]))
                message = message[length:]
            pieces.append((places[-1][0], message))
            return guest.pages(pieces, kind=kind, number=number, flags=flags)
        case "both", (kind, message), place:
            guest.section_size = size
            first, rest = message[:place][:size], message[place:]
            return guest.pages(
                [(7, rest)], kind=kind, section=(1, first), number=number, flags=flags
            )
        case "ranges", header, count:
            header = header.ljust(len(header) + 7 & ~7, b"\0")
            return build_packet(
                GPA_DIRECT,
                nvsp.build_rndis_packet(0),
                transaction_id=number,
                flags=flags,
                header=struct.pack("<II", 0, count) + header,
            )
        case _:
            return None


def untouched(guest: NetGuest) -> bytes:
    """What the device never writes: sections and data."""
    pfns = [*guest.send_pfns, *guest.data_pfns]
    return guest.read(pfns, 0, len(pfns) * PAGE_SIZE)


configs = st.builds(
    AdapterConfig,
    max_queues=st.sampled_from([1, 4]),
    allow_spoofing=st.booleans(),
    allow_mac_change=st.booleans(),
    vlan=st.sampled_from([None, None, 5]),
)


@given(
    config=configs,
    started=st.sampled_from([True, True, True, False]),
    first=st.sets(st.sampled_from(RIGHT)),
    room=st.sampled_from([None, None, 0, 2]),
    script=st.lists(st.tuples(actions, st.sampled_from([1, 1, 1, 0])), min_size=12, max_size=40),
)
@settings(max_examples=150)
def test_every_packet_is_answered_exactly_once_if_it_asks_for_it(
    config, started, first, room, script
):
    """Checklist rows 12 and 24, and row 23: a completion has no id that nobody sent."""

    async def serve() -> None:
        network = Network(room=None)
        async with running(network, config=config, started=started) as (guest, adapter):
            for oid, value in first if started else ():
                await guest.set(oid, value)
            guest.completions.clear()
            guest.gives_back = False
            network.room = room
            wanted: Counter[int] = Counter()
            out: list[Received] = []
            for number, (action, flags) in enumerate(script):
                sent = build(guest, action, number, flags)
                if sent is not None:
                    wanted[number] += flags
                    assert guest.end.send(sent) == 1
                else:
                    act(guest, adapter, network, action, out)
                before = untouched(guest)
                found = adapter._session
                assert found is not None
                guest.part_size = found.receiver.buffer.part_size if found.receiver.buffer else 1
                guest.part_count = 1 << 16
                guest.received.clear()
                await guest.settle()
                assert untouched(guest) == before
                if found.receiver.buffer is None:
                    out.clear()
                out += guest.received
                # What is the guest's until it gives it back, is left alone.
                for each in out if found.receiver.outstanding >= len(out) else ():
                    for (length, offset), message in zip(each.ranges, each.messages, strict=True):
                        assert guest.read(guest.receive_pfns, offset, length) == message
            network.make_room(10**6)
            for _ in range(3):
                await guest.settle()
            answered = Counter(each for each, _payload in guest.completions)
            assert answered == +wanted
            assert guest.channel.outstanding == 0
            json_safe = adapter.snapshot()
            assert json_safe["stage"]

    trio.run(serve)


def act(guest: NetGuest, adapter: Any, network: Network, action: tuple[Any, ...], out: Any) -> None:
    match action:
        case "back", index:
            if out:
                guest.give_back(out.pop(index % len(out)).transaction_id)
        case "receive", count, size:
            adapter.receive([incoming(size, number=each) for each in range(count)])
        case "segment", frame, size:
            for kind, start in ((1, 34), (4, 54), (5, 34), (0, 34)):
                said = Offload(1, kind, start + 20, size, start, 16)
                adapter.receive([Frame(MAC + frame[6:], (), said)])
        case "link", up:
            adapter.set_link(up=up)
        case ("sub-channel",):
            guest.add_subchannel(len(adapter._session.receiver.channels))
        case _:
            network.make_room(2)
