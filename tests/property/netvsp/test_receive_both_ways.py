"""The short way of a frame to the guest ends where the long way does."""

from __future__ import annotations

import contextlib
from unittest import mock

import trio
from hypothesis import given, settings, strategies as st

from netvsp.frames.frame import Frame, Offload
from netvsp.link import AdapterConfig
from netvsp.receive import Receiver
from netvsp.wire import ndis, nvsp, oids
from tests.support.net_frames import SHAPES, Shape, packet
from tests.support.net_guest import MAC, PEER, incoming, plain_frame, running

SCALING = ndis.build_rss_parameters(
    flags=0, hash_information=0x1701, table=(0, 1, 2), key=bytes(range(40))
)
TAGGED = MAC + PEER + b"\x81\0\0\5\x88\xb5"
BYTES = [
    *[plain_frame(size, source=PEER, target=MAC) for size in (14, 60, 1514, 1518, 1792, 1793)],
    *[plain_frame(60, source=PEER, target=each) for each in (PEER, b"\xff" * 6, b"\1" + bytes(5))],
    MAC,
    b"",
    TAGGED.ljust(60, b"t"),
    *[MAC + packet(shape, bytes(100))[6:] for shape in SHAPES],
    *[MAC + packet(Shape(4, "tcp", "none"), bytes(size))[6:] for size in range(8)],
]


@st.composite
def frames(draw) -> Frame:
    data = draw(st.sampled_from(BYTES))
    cut = draw(st.sampled_from([len(data), 256]))
    rest = (memoryview(data)[cut:],) if len(data) > cut else ()
    return Frame(
        data[:cut],
        rest,
        draw(st.sampled_from([None, None, None, Offload(2), Offload(1, 0, 0, 0, 34, 16)])),
        draw(st.sampled_from([None, None, None, 5, 6])),
    )


configs = st.sampled_from([*[AdapterConfig(max_queues=3)] * 4, AdapterConfig(max_queues=3, vlan=5)])


async def _seen(
    batches: list[list[Frame]],
    config: AdapterConfig,
    *,
    wants: int,
    beside: bool,
    scaled: bool,
    link: bool,
    short: bool,
) -> tuple[object, ...]:
    """Return all that can be told of frames that were handed over."""
    long_way = mock.patch.object(Receiver, "_plain_address", return_value=b"none")
    capabilities = nvsp.CAPABILITY_8021Q if beside else 0
    with contextlib.nullcontext() if short else long_way:
        async with running(config=config, wants=wants, capabilities=capabilities) as (
            guest,
            adapter,
        ):
            end = guest.add_subchannel(1)[1]
            await guest.settle()
            if scaled:
                assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, SCALING)
            guest.received.clear()
            adapter.set_link(up=link)
            taken = []
            for batch in batches:
                taken.append(adapter.receive(batch))
                await guest.settle()
                guest.collect(end)
            await guest.settle()
            return (
                taken,
                [(each.channel_type, each.messages) for each in guest.received],
                adapter.statistics.receive.describe(),
                guest.host.complaints,
                adapter.snapshot()["receive_outstanding"],
            )


@given(
    st.lists(st.lists(frames(), min_size=1, max_size=20), min_size=1, max_size=4),
    configs,
    st.sampled_from([0x0D, 0x0D, 0x20, 0x08, 0x01]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([True] * 4 + [False]),
)
@settings(max_examples=100, deadline=None)
def test_the_short_way_ends_where_the_long_way_does(batches, config, wants, beside, scaled, link):
    async def both() -> None:
        found = [
            await _seen(
                batches,
                config,
                wants=wants,
                beside=beside,
                scaled=scaled,
                link=link,
                short=short,
            )
            for short in (True, False)
        ]
        assert found[0] == found[1]

    trio.run(both)


def test_what_comes_for_the_guest_goes_the_short_way():
    async def serve() -> None:
        async with running() as (guest, adapter):
            with mock.patch.object(Receiver, "_receive_one") as slow:
                assert adapter.receive([incoming(60), incoming(1514)]) == 2
            assert not slow.called
            await guest.settle()
            assert guest.take_frames() == [incoming(60).tobytes(), incoming(1514).tobytes()]

    trio.run(serve)
