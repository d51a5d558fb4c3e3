"""A session's functions that read guest bytes: whatever the bytes, only the protocol's error."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict

import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from storvsp import ScsiController
from storvsp.disks.delay import DelayDisk
from storvsp.disks.ram import RamDisk
from storvsp.scsi import DataDirection
from storvsp.session import Limits, Session, Stage
from storvsp.wire import REQUEST, SUPPORTED_VERSIONS, VERSION_5_1, Srb
from tests.support.patience import PATIENCE
from vmbus.errors import BudgetError, GuestProtocolError
from vmbus.host.channel_host import ChannelHost
from vmbus.memory import GuestMemory
from vmbus.ring import Packet
from vmbus.testing import LoneHost, channel_pair
from vmbus.wire.packets import (
    COMPLETION,
    GPA_DIRECT,
    IN_BAND,
    RANGES_HEADER,
    build_packet,
    build_packet as build_ring_packet,
)

u8, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 32, 64))
versions = st.sampled_from(sorted(SUPPORTED_VERSIONS))


def session(
    *, subchannels: int = 3, max_version: int = 0x602, host: ChannelHost | None = None
) -> Session:
    limits = Limits(max_subchannels=subchannels, max_version=max_version)
    channel, _ = channel_pair(ring_pages=2, data_pages=4, host=host)
    made = Session(channel, ScsiController().units, limits)
    made.stage = Stage.READY
    made.version = 0x602
    return made


def inside(function) -> None:
    """Run something that needs trio's clock and descriptors, and give them back."""

    async def main() -> None:
        made = function()
        made.primary.close_doorbell()
        made.primary.release_rings()

    trio.run(main)


@given(st.binary(max_size=60), versions)
def test_any_version_request_is_agreed_to_or_refused(body, highest):
    def run() -> Session:
        made = session(max_version=highest)
        made.version = 0
        try:
            status = made._negotiate_untrusted(body)
        except GuestProtocolError as error:
            status = error.status
        if status:
            assert made.version == 0
            assert status in {0xC0000059, 0xC000000D}
        else:
            assert made.version in SUPPORTED_VERSIONS
            assert made.version <= highest
        return made

    inside(run)


@given(
    st.binary(max_size=60),
    st.sampled_from(list(Stage)),
    versions,
    st.integers(0, 2),
    st.sampled_from([None, BudgetError("the bus is full")]),
)
def test_any_request_for_sub_channels_is_honoured_or_refused(body, stage, version, had, refusal):
    def run() -> Session:
        offered: list[int] = []

        class Host(LoneHost):
            def offer_subchannels(self, count: int) -> None:
                if refusal is not None:
                    raise refusal
                offered.append(count)

        made = session(host=Host(GuestMemory()))
        made.stage, made.version, made.subchannels = stage, version, had
        try:
            made._create_subchannels_untrusted(body)
        except GuestProtocolError:
            assert offered == []
            assert made.subchannels == had
        else:
            (count,) = struct.unpack_from("<H", body)
            assert count <= 3
            assert offered == ([count] if count else [])
            assert version >= VERSION_5_1
            assert stage in {Stage.END, Stage.READY}
        return made

    inside(run)


ranges = st.tuples(
    u32 | st.integers(0, 3),
    st.lists(
        st.tuples(
            u32 | st.integers(0, 20000),
            u32 | st.integers(0, 4096),
            st.lists(u64 | st.integers(0, 8), max_size=6),
        ),
        max_size=4,
    ),
)
srbs = st.builds(
    lambda path, target, lun, cdb_length, sense, data_in, length, cdb: Srb._make(
        REQUEST.unpack(
            REQUEST.pack(
                3, 1, 0, 52, 0, 0, 0, path, target, lun, cdb_length, sense, data_in, length, cdb,
                0, 0, 0, 0, 0,
            )
        )
    ),
    u8, u8, u8, u8 | st.integers(0, 17), u8, u8 | st.integers(0, 3),
    u32 | st.integers(0, 20000), st.binary(min_size=16, max_size=16),
)  # fmt: skip


@given(srbs, ranges, st.sampled_from([IN_BAND, GPA_DIRECT]), st.binary(max_size=64))
@settings(max_examples=300)
def test_any_srb_becomes_a_command_over_the_guests_own_memory_or_is_refused(
    srb, ranges, kind, tail
):
    count, described = ranges
    header = RANGES_HEADER.pack(0, count) + b"".join(
        struct.pack(f"<II{len(pfns)}Q", size, offset, *pfns) for size, offset, pfns in described
    )

    def run() -> Session:
        made = session()
        raw = build_ring_packet(kind, tail, header=header if kind == GPA_DIRECT else b"")
        offset = raw[2] * 8 + raw[3] * 2048
        packet = Packet(kind, 1, 1, raw, offset)
        try:
            command = made.requests._command_untrusted(made.primary, packet, srb)
        except GuestProtocolError:
            return made
        assert 0 < len(command.cdb) <= 16
        assert command.length == srb.transfer_length
        assert sum(map(len, command.data)) == command.length
        assert command.direction in list(DataDirection)
        command.data.clear()
        return made

    inside(run)


requests = st.tuples(
    st.sampled_from([IN_BAND, IN_BAND, GPA_DIRECT, 7, 8, COMPLETION, 0, 15]),
    st.binary(max_size=100)
    | st.builds(
        lambda op, rest: struct.pack("<III", op, 1, 0) + rest.ljust(52, b"\0")[:52],
        st.integers(0, 15),
        st.binary(max_size=52),
    )
    | st.builds(
        lambda cdb, lun: REQUEST.pack(
            3, 1, 0, 52, 0, 0, 0, 0, 0, lun, 10, 20, 2, 0, cdb, 0, 0, 0, 0, 0
        ),
        st.sampled_from([b"\0", b"\x28", b"\x2a", b"\x12", b"\x35", b"\x25"]).map(
            lambda op: op.ljust(16, b"\0")
        ),
        st.integers(0, 1),
    ),
    st.sampled_from([0, 1, 5, (1 << 64) - 1]),
    st.booleans(),
)


@given(st.lists(requests, max_size=20))
@settings(max_examples=150)
def test_any_packets_through_the_ring_are_each_answered_once(sent):
    """Over the whole session, slow disk and reset included; nothing but EndOfChannel ends it."""

    async def main() -> None:
        controller = ScsiController()
        controller.add_disk(RamDisk(1 << 16))
        controller.add_disk(DelayDisk(RamDisk(1 << 16), read=0.0001, flush=0.0001))
        channel, guest = channel_pair(ring_pages=8, data_pages=4)
        wanted: Counter[int] = Counter()
        sizes: defaultdict[int, set[int]] = defaultdict(set, {9: {64}})  # by transaction id
        async with trio.open_nursery() as nursery:
            nursery.start_soon(controller.run, channel)
            for operation, body in ((7, b""), (9, b"\2\6\0\0"), (10, b""), (8, b"")):
                vstor = struct.pack("<III", operation, 1, 0) + body.ljust(52, b"\0")
                guest.send(build_packet(IN_BAND, vstor, transaction_id=9, flags=1))
            for kind, payload, identity, wants in sent:
                packet = build_packet(kind, payload, transaction_id=identity, flags=int(wants))
                assert guest.send(packet) == 1
                wanted[identity] += wants
                # A ring packet is as long as a multiple of 8, and an answer as long as its request.
                sizes[identity].add(max(16, min(-(-len(payload) // 8) * 8, 64)))
            seen: Counter[int] = Counter()
            with trio.fail_after(PATIENCE):
                while sum(seen.values()) < sum(wanted.values()) + 4:
                    for answer in await guest.receive():
                        assert answer.kind == COMPLETION
                        assert len(answer.payload) in sizes[answer.transaction_id]
                        seen[answer.transaction_id] += 1
            await trio.testing.wait_all_tasks_blocked()
            assert guest.receive_nowait() == []
            wanted[9] += 4
            assert seen == wanted
            assert channel.outstanding == 0
            channel.end()
        channel.close_doorbell()
        channel.release_rings()

    trio.run(main)
