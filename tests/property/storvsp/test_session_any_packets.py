"""A controller's session fed arbitrary packets: each one answered once, and nothing escapes."""

from __future__ import annotations

import struct
from uuid import UUID

import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from storvsp import ScsiController
from storvsp.disks.ram import RamDisk
from storvsp.session import Session
from vmbus.ring import Packet
from vmbus.testing import channel_pair
from vmbus.wire.packets import COMPLETION, DESCRIPTOR, GPA_DIRECT, IN_BAND, build_packet

# The order in which a driver sends them, to get far, and everything else.
operations = st.integers(1, 14) | st.sampled_from([7, 9, 10, 8, 13]) | st.integers(0, 0xFFFF_FFFF)
versions = st.sampled_from([0x0602, 0x0600, 0x0501, 0x0402, 0x0200, 0x0601, 0])
counts = st.integers(0, 9).map(lambda n: n.to_bytes(2, "little"))
bodies = (
    versions.map(lambda version: version.to_bytes(4, "little"))
    | counts
    | st.binary(max_size=52)
    | st.binary(min_size=52, max_size=60)
)
vstor = st.builds(
    lambda operation, flags, status, body: struct.pack("<III", operation, flags, status) + body,
    operations,
    st.integers(0, 3),
    st.integers(0, 0xFFFF_FFFF),
    bodies.map(lambda body: body.ljust(52, b"\0")) | bodies,
)
kinds = st.sampled_from([IN_BAND] * 6 + [GPA_DIRECT, 7, 8, 11, 0, 0xFFFF])
packets = st.tuples(kinds, vstor, st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, 1, 0xFFFF]))
INITIALIZATION = [
    (IN_BAND, struct.pack("<III", operation, 1, 0) + body.ljust(52, b"\0"), operation, 1)
    for operation, body in ((7, b""), (9, b"\2\6\0\0"), (10, b""), (8, b""))
]


def as_packet(kind: int, payload: bytes, transaction_id: int, flags: int) -> Packet:
    raw = build_packet(kind, payload, transaction_id=transaction_id, flags=flags)
    return Packet(kind, flags, transaction_id, raw, 16)


@given(st.integers(0, len(INITIALIZATION)), st.lists(packets, max_size=12), st.integers(0, 4))
@settings(max_examples=300)
def test_every_packet_is_answered_exactly_once_if_it_asks_for_it(steps, more, subchannels):
    """Checklist rows 12 and 24, and row 23: a completion has no id that nobody sent."""

    async def serve() -> None:
        controller = ScsiController(instance_id=UUID(int=7), max_subchannels=subchannels)
        controller.add_disk(RamDisk(1 << 16))
        channel, _guest = channel_pair(ring_pages=4, data_pages=0)
        session = Session(channel, controller.units, controller.limits)
        async with trio.open_nursery() as nursery:
            for each in INITIALIZATION[:steps] + more:
                before = channel.pending
                packet = as_packet(*each)
                session.handle(channel, packet, nursery)
                # A command may have to wait for its disk; everything else is answered at once.
                await trio.testing.wait_all_tasks_blocked()
                answers = list(channel._queue)[before:]
                assert len(answers) == packet.wants_completion
                for answer in answers:
                    kind, _offset, _length, flags, ident = DESCRIPTOR.unpack_from(answer)
                    assert (kind, flags, ident) == (COMPLETION, 0, packet.transaction_id)
                    asked = len(packet.data) - packet.payload_offset
                    assert len(answer) == 16 + -(-max(12, min(asked, 64)) // 8) * 8
        channel.close_doorbell()

    trio.run(serve)
