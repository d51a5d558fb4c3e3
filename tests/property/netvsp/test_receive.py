"""Arbitrary frames from an endpoint: nothing breaks, and the guest gets messages it can read."""

from __future__ import annotations

import trio
from hypothesis import given, settings, strategies as st

from netvsp.frames.frame import Frame, Offload
from netvsp.link import AdapterConfig
from netvsp.placing import ROOM
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.net_frames import SHAPES, packet
from tests.support.net_guest import MAC, NetGuest, running
from vmbus.memory import PAGE_SIZE

WHOLE = [packet(shape, bytes(size)) for shape in SHAPES for size in (0, 300, 9000, 60000)]
SETTINGS = [
    (
        oids.GEN_RECEIVE_SCALE_PARAMETERS,
        ndis.build_rss_parameters(
            flags=0, hash_information=0x3F01, table=(0, 1, 2), key=bytes(range(40))
        ),
    ),
    (
        oids.TCP_OFFLOAD_PARAMETERS,
        ndis.build_offload_parameters(ndis.OffloadParameters(rsc_ipv4=2, rsc_ipv6=2)),
    ),
]
words = st.integers(0, 80) | st.integers(0, 0xFFFF)
offloads = st.none() | st.builds(
    Offload,
    st.integers(0, 3),
    st.sampled_from([0, 1, 4, 5, 0x81, 0x84, 3, 255]),
    st.sampled_from([54, 74, 42]) | words,
    st.sampled_from([48, 1400]) | words,
    st.sampled_from([34, 54, 38]) | words,
    st.sampled_from([6, 16]) | words,
)


@st.composite
def frames(draw) -> Frame:
    data = bytearray(draw(st.sampled_from(WHOLE) | st.binary(max_size=100)))
    if draw(st.booleans()):
        data[:6] = MAC
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        if len(data) > 60:
            data[draw(st.integers(0, 60))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    head, rest = bytes(data[:256]), bytes(data[256:])
    tci = draw(st.none() | st.integers(0, 0xFFFF))
    return Frame(head, (rest,) if rest else (), draw(offloads), tci)


configs = st.builds(
    AdapterConfig,
    max_queues=st.just(3),
    vlan=st.sampled_from([None, 0x123]),
) | st.builds(AdapterConfig, max_queues=st.just(3), trunk=st.just(frozenset({0, 0x123})))


def other_memory(guest: NetGuest) -> bytes:
    pfns = [*guest.send_pfns, *guest.data_pfns]
    return guest.read(pfns, 0, len(pfns) * PAGE_SIZE)


@given(
    config=configs,
    wants=st.sampled_from([0x2F, 0x0F, 1]),
    beside=st.booleans(),
    mtu=st.sampled_from([68, 1500, 4000]),
    chosen=st.sets(st.sampled_from(SETTINGS)),
    batches=st.lists(st.lists(frames(), max_size=6), min_size=1, max_size=6),
)
@settings(max_examples=80)
def test_any_frames_are_messages_or_nothing(config, wants, beside, mtu, chosen, batches):
    async def serve() -> None:
        capabilities = nvsp.CAPABILITY_RSC | (nvsp.CAPABILITY_8021Q if beside else 0)
        async with running(config=config, wants=wants, mtu=mtu, capabilities=capabilities) as (
            guest,
            adapter,
        ):
            _branch, end = guest.add_subchannel(1)
            for oid, value in chosen:
                assert not await guest.set(oid, value)
            before = other_memory(guest)
            session = adapter._session
            assert session is not None
            for batch in batches:
                guest.received.clear()
                taken = adapter.receive(batch)
                assert 0 <= taken <= len(batch)
                await guest.settle()
                guest.collect(end)
                for some in guest.received:
                    marks = [look_at(guest, each, beside=beside) for each in some.messages]
                    assert all(marks) or session.control.rsc
            for _ in range(3):
                await guest.settle()
                guest.collect(end)
            assert other_memory(guest) == before
            buffer = session.receiver.buffer
            assert buffer is not None
            assert sorted(buffer.free) == list(range(buffer.count))
            assert guest.host.complaints == []

    trio.run(serve)


def look_at(guest: NetGuest, message: bytes, *, beside: bool) -> bool:
    """Check a message; return whether it is a whole frame."""
    where = rndis.parse_frame_untrusted(message)
    assert where.length == len(message)
    assert where.data_length <= guest.part_size - ROOM
    items = ppi.parse_items_untrusted(
        message[where.info_offset : where.info_offset + where.info_length]
    )
    assert beside or ppi.VLAN not in items
    whole = ppi.PACKET_ID not in items
    assert where.data_length >= 14 or not whole
    return whole
