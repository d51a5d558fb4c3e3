"""The fast path answers every packet with the same bytes as the long way round."""

from __future__ import annotations

import struct
from uuid import UUID

import trio
from hypothesis import given, settings, strategies as st

from storvsp import ScsiController
from storvsp.disks.ram import RamDisk
from storvsp.session import Session, Stage
from storvsp.wire import REQUEST, VERSION_6_2
from vmbus.ring import Packet
from vmbus.testing import channel_pair
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, IN_BAND, RANGES_HEADER, build_packet

PAGES = 8
DISK = bytes(range(256)) * 256

cdbs = st.one_of(
    st.builds(
        lambda op, lba, count: struct.pack(">BBIBHB", op, 0, lba, 0, count, 0).ljust(16, b"\0"),
        st.sampled_from([0x28, 0x2A]),
        st.integers(0, 130),
        st.integers(0, 16),
    ),
    st.sampled_from([b"\x12\0\0\0\x24\0", b"\0" * 6, b"\xa0" + bytes(11)]).map(
        lambda cdb: cdb.ljust(16, b"\0")
    ),
    st.binary(min_size=16, max_size=16),
)
lengths = st.one_of(st.integers(0, 16).map(lambda n: n * 512), st.integers(0, 9000))


@st.composite
def requests(draw):
    transfer = draw(lengths)
    byte_count = draw(st.one_of(st.just(transfer), lengths))
    offset = draw(st.one_of(st.just(0), st.integers(0, 5000)))
    pages = draw(st.one_of(st.just((offset + byte_count + 4095) // 4096), st.integers(0, 4)))
    pfns = draw(
        st.lists(
            st.one_of(st.integers(0, PAGES - 1), st.just(1 << 40)), min_size=pages, max_size=pages
        )
    )
    count = draw(st.sampled_from([1, 1, 1, 0, 2]))
    vstor = REQUEST.pack(
        draw(st.sampled_from([3, 3, 3, 3, 11, 1 << 8 | 3])),
        *draw(st.tuples(st.integers(0, 1), st.integers(0, 1))),
        52,
        draw(st.integers(0, 255)),
        0,
        7,
        *draw(st.sampled_from([(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 5), (1, 1, 0)])),
        draw(st.sampled_from([10, 10, 16, 6, 0, 17])),
        draw(st.sampled_from([20, 0, 255])),
        draw(st.sampled_from([0, 1, 1, 2, 3])),
        transfer,
        draw(cdbs),
        *draw(st.tuples(*[st.integers(0, 255)] * 2)),
        1,
        60,
        9,
    )
    return build_packet(
        draw(st.sampled_from([GPA_DIRECT, GPA_DIRECT, GPA_DIRECT, IN_BAND])),
        vstor[: draw(st.sampled_from([64, 64, 64, 48, 16]))],
        transaction_id=draw(st.integers(0, (1 << 64) - 1)),
        flags=draw(st.sampled_from([1, 1, 0])),
        header=RANGES_HEADER.pack(0, count) + build_range(byte_count, offset, pfns),
    )


def as_packet(raw: bytes) -> Packet:
    kind, offset8, _length8, flags, transaction_id = struct.unpack_from("<HHHHQ", raw)
    return Packet(kind, flags, transaction_id, raw, offset8 * 8)


async def answers(raw: list[bytes], *, fast: bool) -> tuple[object, ...]:
    """Return answers, guest memory, disk contents and counters after serving ``raw``."""
    disk = RamDisk(1 << 16)
    assert disk.try_writev(0, [memoryview(DISK)])
    controller = ScsiController(instance_id=UUID(int=7))
    controller.add_disk(disk)
    controller.add_disk(RamDisk(1 << 16))
    channel, guest = channel_pair(ring_pages=4, data_pages=0)
    for pfn in range(8):
        guest.memory.page(pfn)[64:] = bytes([pfn]) * 4032  # rings are not looked at here
    session = Session(channel, controller.units, controller.limits)
    session.stage, session.version = Stage.READY, VERSION_6_2
    async with trio.open_nursery() as nursery:
        packets = [as_packet(each) for each in raw]
        if fast:
            session.requests.serve_batch_untrusted(channel, packets, nursery, session.handle)
        else:
            for packet in packets:
                session.handle(channel, packet, nursery)
    content = bytearray(1 << 16)
    assert disk.try_readv(0, [memoryview(content)])
    queued = list(channel._queue)
    memory = b"".join(bytes(guest.memory.page(pfn)) for pfn in range(8))
    channel.close_doorbell()
    return queued, memory, bytes(content), session.requests.inline, controller.units.describe()


@given(st.lists(requests(), max_size=6))
@settings(max_examples=300, deadline=None)
def test_the_fast_path_does_what_the_long_way_does(raw):
    # serve_batch_untrusted against Session.handle, answers, guest memory and disk alike.
    async def both():
        assert await answers(raw, fast=True) == await answers(raw, fast=False)

    trio.run(both)
