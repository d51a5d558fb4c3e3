"""What frames become on their way to the guest: sums, segments, tags, and channels."""

from __future__ import annotations

import struct

import pytest

from netvsp.frames.frame import (
    DATA_VALID,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    Frame,
    Offload,
)
from netvsp.link import AdapterConfig
from netvsp.placing import ROOM
from netvsp.receive import MAX_RANGES
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.net_frames import SHAPES, TCI, Shape, packet, pieces_of, without_sum
from tests.support.net_guest import (
    MAC,
    PEER,
    NetGuest,
    Network,
    Received,
    incoming,
    plain_frame,
    running,
)

TCP_SHAPES = [each for each in SHAPES if each.protocol == "tcp"]
RSC_ON = ndis.build_offload_parameters(
    ndis.OffloadParameters(rsc_ipv4=ndis.OFFLOAD_ENABLED, rsc_ipv6=ndis.OFFLOAD_ENABLED)
)
PROMISCUOUS = oids.FILTER_PROMISCUOUS


def items_of(message: bytes) -> dict[int, int]:
    """Return the items of a PACKET; they have to be as linux's rndis_get_ppi wants them."""
    where = rndis.parse_frame_untrusted(message)
    found = message[where.info_offset : where.info_offset + where.info_length]
    position = 0
    while position < len(found):
        size, _kind, offset = struct.unpack_from("<III", found, position)
        assert (size, offset) == (16, 12)
        position += size
    assert position == len(found)
    return ppi.parse_items_untrusted(found)


def segment(shape: Shape, payload: bytes, mss: int) -> Frame:
    """A segment that is to be cut, as a TAP brings it."""
    left, _items = without_sum(shape, packet(shape, payload))
    kind = GSO_TCPV4 if shape.version == 4 else GSO_TCPV6
    said = Offload(NEEDS_CHECKSUM, kind, shape.headers, mss, shape.transport, 16)
    return Frame(left, (), said, shape.tci)


def inside(shape: Shape) -> Shape:
    return shape._replace(vlan="none" if shape.vlan == "none" else "inside")


def outside(shape: Shape) -> Shape:
    return shape._replace(vlan="none" if shape.vlan == "none" else "beside")


def data(size: int) -> bytes:
    return bytes(number * 11 & 0xFF for number in range(size))


# -- sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beside", [True, False])
async def test_a_sum_is_filled_in_and_the_guest_told(shape, beside):
    """A driver looks at the frame whatever it is told: the sum has to be there."""
    capabilities = nvsp.CAPABILITY_8021Q if beside else 0
    async with running(capabilities=capabilities, wants=PROMISCUOUS) as (guest, adapter):
        left, _items = without_sum(shape, packet(shape, data(100)))
        field = 16 if shape.protocol == "tcp" else 6
        said = Offload(NEEDS_CHECKSUM, 0, 0, 0, shape.transport, field)
        checked = Frame(packet(shape, data(100)), (), Offload(DATA_VALID), shape.tci)
        assert adapter.receive([Frame(left, (), said, shape.tci), checked]) == 2
        await guest.settle()
        seen = outside(shape) if beside else inside(shape)
        (got,) = guest.received
        assert got.frames() == [packet(seen, data(100))] * 2
        tag = ppi.pack_vlan(ppi.vlan_of_tci(TCI))
        value = ppi.RX_TCP_SUCCEEDED if shape.protocol == "tcp" else ppi.RX_UDP_SUCCEEDED
        wanted = {ppi.CHECKSUM: value | (ppi.RX_IP_SUCCEEDED if shape.version == 4 else 0)}
        if seen.vlan == "beside":
            wanted[ppi.VLAN] = tag
        assert [items_of(each) for each in got.messages] == [wanted] * 2
        assert adapter.statistics.receive.checksums == 1


# -- segments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", TCP_SHAPES, ids=str)
async def test_a_segment_is_cut_for_a_guest_that_does_not_take_it(shape):
    async with running(wants=PROMISCUOUS) as (guest, adapter):
        payload = data(20000)
        assert adapter.receive([segment(shape, payload, 1400)]) == 1
        await guest.settle()
        messages = [each for some in guest.received for each in some.messages]
        assert guest.take_frames() == list(pieces_of(outside(shape), payload, 1400))
        assert {items_of(each)[ppi.CHECKSUM] & ppi.RX_TCP_SUCCEEDED for each in messages} == {
            ppi.RX_TCP_SUCCEEDED
        }
        assert not any(ppi.PACKET_ID in items_of(each) for each in messages)
        assert adapter.statistics.receive.segments == 1
        assert adapter.statistics.receive.total_frames == 15


def coalesced(packets: list[Received]) -> list[bytes]:
    """Put segments together as linux does (rndis_filter_receive_data)."""
    found: list[bytes] = []
    parts: list[bytes] = []
    for each in packets:
        assert not parts, "linux drops a segment that is in two packets"
        assert len(each.messages) <= 562
        for number, message in enumerate(each.messages, 1):
            where = rndis.parse_frame_untrusted(message)
            mark = items_of(message).get(ppi.PACKET_ID)
            frame = message[where.data_offset : where.data_offset + where.data_length]
            if mark is None:
                found.append(frame)
                continue
            version, flags, _number = struct.unpack("<BBH", mark.to_bytes(4, "little"))
            assert version == 1
            assert flags & ppi.FRAGMENT_SUB_ALLOCATION
            assert bool(flags & ppi.FRAGMENT_FIRST) == (not parts)
            parts.append(frame)
            if flags & ppi.FRAGMENT_LAST:
                found.append(b"".join(parts))
                parts = []
            else:
                assert number < len(each.messages)
    assert not parts
    return found


@pytest.mark.parametrize("shape", TCP_SHAPES, ids=str)
@pytest.mark.parametrize("size", [2000, 20000, 65000])
async def test_a_segment_is_in_parts_for_a_guest_that_takes_them(shape, size):
    async with running(wants=PROMISCUOUS) as (guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        payload = data(size)
        frames = [incoming(number=1), segment(shape, payload, 1400), incoming(number=2)]
        assert adapter.receive(frames * 2) == 6
        await guest.settle()
        # Its sum is not made: who coalesces is told that it is good, and believes that.
        whole, _items = without_sum(outside(shape), packet(outside(shape), payload))
        one, two = frames[0].tobytes(), frames[2].tobytes()
        assert coalesced(guest.received) == [one, whole, two] * 2
        marks = {
            items_of(each)[ppi.PACKET_ID] >> 16
            for some in guest.received
            for each in some.messages
            if ppi.PACKET_ID in items_of(each)
        }
        assert len(marks) == 2, "a number for each segment"
        assert adapter.statistics.receive.segments == 2
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0


async def test_a_segment_is_cut_for_a_driver_that_has_not_said_that_it_can_take_it():
    """Whatever it sets: linux says so in SEND_NDIS_CONFIG, from version 6.1 on."""
    for capabilities, whole in ((nvsp.CAPABILITY_RSC, True), (nvsp.CAPABILITY_8021Q, False)):
        async with running(capabilities=capabilities, wants=PROMISCUOUS) as (guest, adapter):
            assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
            guest.received.clear()
            shape = Shape(4, "tcp", "none")
            assert adapter.receive([segment(shape, data(5000), 1400)]) == 1
            await guest.settle()
            if whole:
                assert coalesced(guest.received) == [segment(shape, data(5000), 1400).tobytes()]
            else:
                assert guest.take_frames() == list(pieces_of(shape, data(5000), 1400))


async def test_a_segment_may_need_more_parts_than_a_packet_has_frames():
    """With a small MTU; linux takes 562 ranges."""
    async with running(Network(mtu=68), wants=PROMISCUOUS) as (guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        shape = Shape(4, "tcp", "none")
        frames = [incoming(20), segment(shape, data(65000), 1400), incoming(21)]
        assert adapter.receive(frames) == 3
        await guest.settle()
        assert max(len(each.ranges) for each in guest.received) > MAX_RANGES
        found = coalesced(guest.received)
        assert found == [each.tobytes() for each in frames]


async def test_a_segment_that_fits_is_in_one_part():
    async with running() as (guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        await guest.set_filter(PROMISCUOUS)
        guest.received.clear()
        shape = Shape(4, "tcp", "none")
        assert adapter.receive([segment(shape, data(1600), 1400)]) == 1
        await guest.settle()
        (message,) = guest.received[0].messages
        assert ppi.PACKET_ID not in items_of(message)
        assert guest.take_frames() == [segment(shape, data(1600), 1400).tobytes()]


async def test_a_segment_whose_sum_is_right_is_left_as_it_is():
    async with running(wants=PROMISCUOUS) as (guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        whole = packet(Shape(4, "tcp", "none"), data(5000))
        said = Offload(DATA_VALID, GSO_TCPV4, 54, 1400, 34, 16)
        assert adapter.receive([Frame(whole, (), said)]) == 1
        await guest.settle()
        assert coalesced(guest.received) == [whole]


async def test_a_segment_whose_pages_go_away_in_the_middle_takes_no_parts():
    guest = NetGuest(receive_pages=32)
    region = guest.memory.regions[0]
    async with running(guest=guest, wants=PROMISCUOUS) as (_guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        session = adapter._session
        assert session is not None
        buffer = session.receiver.buffer
        assert buffer is not None
        before = sorted(buffer.free)
        guest.memory.remove_region(region.gpa, region.size)
        assert adapter.receive([segment(Shape(4, "tcp", "none"), data(9000), 1400)]) == 1
        assert adapter.statistics.receive.dropped == {"no memory": 1}
        assert sorted(buffer.free) == before


async def test_only_tcp_is_in_parts():
    async with running(wants=PROMISCUOUS) as (guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        shape = Shape(4, "udp", "none")
        left, _items = without_sum(shape, packet(shape, data(3000)))
        said = Offload(NEEDS_CHECKSUM, GSO_UDP, shape.headers, 1000, shape.transport, 6)
        room = guest.part_size - ROOM
        assert adapter.receive([Frame(left, (), said), incoming(room + 1)]) == 2
        await guest.settle()
        assert guest.take_frames() == [
            packet(shape, data(3000)[start : start + 1000], identity=(0xFFFE + number) & 0xFFFF)
            for number, start in enumerate(range(0, 3000, 1000))
        ]
        assert adapter.statistics.receive.dropped == {"too long": 1}


async def test_a_segment_that_can_never_fit_is_dropped():
    """A guest chooses the buffer, and so do those who bring frames their segments."""
    guest = NetGuest(receive_pages=16)
    async with running(Network(mtu=68), guest=guest, wants=PROMISCUOUS) as (_guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        shape = Shape(4, "tcp", "none")
        assert guest.part_count == 64
        assert adapter.receive([segment(shape, data(65000), 1400), incoming(20)]) == 2
        assert adapter.statistics.receive.dropped == {"too long": 1}
        await guest.settle()
        assert guest.take_frames() == [incoming(20).tobytes()]


async def test_a_segment_waits_until_there_is_room_for_all_of_it():
    guest = NetGuest(receive_pages=32)
    async with running(guest=guest, wants=PROMISCUOUS) as (_guest, adapter):
        assert not await guest.set(oids.TCP_OFFLOAD_PARAMETERS, RSC_ON)
        guest.received.clear()
        guest.gives_back = False
        frame = segment(Shape(4, "tcp", "none"), data(60000), 1400)
        assert adapter.receive([frame, frame]) == 1
        await guest.settle()
        assert adapter.receive([frame]) == 0
        assert adapter.statistics.receive.segments == 1
        guest.give_back(guest.received[0].transaction_id)
        await guest.settle()
        assert adapter.receive([frame]) == 1


# -- VLANs -----------------------------------------------------------------------------------------


def tagged(tci: int | None) -> bytes:
    tag = b"" if tci is None else b"\x81\0" + tci.to_bytes(2, "big")
    return MAC + PEER + tag + plain_frame(60)[12:]


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize(
    ("config", "gets"),
    [
        ({}, {None: None, 0: 0, 0xA005: 0xA005, 6: 6}),
        ({"vlan": 5}, {0xA005: None}),
        ({"trunk": frozenset({5})}, {0xA005: 0xA005}),
        ({"trunk": frozenset({0, 6})}, {None: None, 0: 0, 6: 6}),
    ],
)
async def test_a_guest_sees_its_vlans(config, gets, outer, beside):
    capabilities = nvsp.CAPABILITY_8021Q if beside else 0
    async with running(config=AdapterConfig(**config), capabilities=capabilities) as (
        guest,
        adapter,
    ):
        tcis = [None, 0, 0xA005, 6]
        frames = [
            Frame(tagged(None), (), None, tci) if outer else Frame(tagged(tci)) for tci in tcis
        ]
        assert adapter.receive(frames) == 4
        await guest.settle()
        seen = [
            (frame, items_of(message).get(ppi.VLAN))
            for some in guest.received
            for frame, message in zip(some.frames(), some.messages, strict=True)
        ]
        wanted = [gets[tci] for tci in tcis if tci in gets]
        assert seen == [
            (tagged(None), None if tci is None else ppi.pack_vlan(ppi.vlan_of_tci(tci)))
            if beside
            else (tagged(tci), None)
            for tci in wanted
        ]
        assert adapter.statistics.receive.dropped["vlan"] == 4 - len(wanted)


@pytest.mark.parametrize(
    ("config", "tags"),
    [
        ({"vlan": 5}, "8100 0005 8100 0007"),
        ({"vlan": 5}, "8100 0000 8100 0005"),
        ({"trunk": frozenset({0, 5})}, "8100 0000 8100 0007"),
        ({"trunk": frozenset({0, 5})}, "88a8 0000 8100 0007"),
    ],
)
async def test_no_tag_is_hidden_behind_another_one(config, tags):
    async with running(config=AdapterConfig(**config)) as (guest, adapter):
        frame = Frame(MAC + PEER + bytes.fromhex(tags) + plain_frame(60)[12:])
        assert adapter.receive([frame]) == 1
        await guest.settle()
        assert guest.take_frames() == []
        assert adapter.statistics.receive.dropped == {"vlan": 1}


# -- receive-side scaling --------------------------------------------------------------------------

KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
KINDS = 0x1701


def scaling(table: tuple[int, ...]) -> bytes:
    return ndis.build_rss_parameters(flags=0, hash_information=KINDS, table=table, key=KEY)


def flow(port: int) -> bytes:
    """A TCP frame of one flow; its hash is Microsoft's."""
    frame = bytearray(packet(Shape(4, "tcp", "none"), b""))
    frame[:6] = MAC
    frame[34:36] = port.to_bytes(2, "big")
    return bytes(frame)


async def test_frames_go_to_the_channels_that_the_guest_has_chosen():
    async with running(config=AdapterConfig(max_queues=3)) as (guest, adapter):
        ends = [guest.end, guest.add_subchannel(1)[1], guest.add_subchannel(2)[1]]
        await guest.settle()
        assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, scaling((2, 1, 0)))
        guest.received.clear()
        frames = [flow(port) for port in range(1000, 1040)]
        assert adapter.receive([Frame(each) for each in [*frames, plain_frame(60, target=MAC)]])
        await guest.settle()
        sent = {0: list(guest.received)}
        sent |= {index: guest.collect(ends[index]) for index in (1, 2)}
        order: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
        for index, some in sent.items():
            for each in some:
                for frame, message in zip(each.frames(), each.messages, strict=True):
                    order[index].append(frame)
                    number = items_of(message).get(ppi.HASH_VALUE)
                    assert (number is None) == (frame[12:14] == b"\x88\xb5")
                    if number is not None:
                        assert (2, 1, 0)[number % 3] == index
        assert all(len(each) > 4 for each in order.values())
        assert order[0][-1] == plain_frame(60, target=MAC), "without a hash: on the primary one"
        everything = [frame for each in order.values() for frame in each]
        assert sorted(everything) == sorted([*frames, order[0][-1]])
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0
        for channel in order.values():
            ports = [frame[34:36] for frame in channel if frame[12:14] == b"\x08\0"]
            assert ports == sorted(ports), "in order within a channel"


async def test_flows_of_channels_that_are_not_there_are_shared_out_among_those_that_are():
    """linux makes its table for as many as it asks for, whatever it is granted."""
    async with running(config=AdapterConfig(max_queues=8)) as (guest, adapter):
        end = guest.add_subchannel(1)[1]
        await guest.settle()
        table = tuple(range(8)) * 16
        assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, scaling(table))
        guest.received.clear()
        frames = [Frame(flow(port)) for port in range(1000, 1200)]
        assert adapter.receive(frames) == 200
        await guest.settle()
        first = guest.take_frames()
        other = [frame for each in guest.collect(end) for frame in each.frames()]
        assert len(first) + len(other) == 200
        assert min(len(first), len(other)) > 70
        session = adapter._session
        assert session is not None
        targets = [each.subchannel_index for each in session.receiver._targets]
        assert targets[:2] == [0, 1]
        assert targets.count(0) == targets.count(1) == 64


async def test_a_channel_that_is_not_open_is_the_primary_one():
    """linux sets its table before all of its channels are open, or when some have failed."""
    async with running(config=AdapterConfig(max_queues=4)) as (guest, adapter):
        assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, scaling((3,)))
        guest.received.clear()
        branch, end = guest.add_subchannel(3)
        await guest.settle()
        assert adapter.receive([Frame(flow(1))]) == 1
        await guest.settle()
        assert guest.take_frames() == []
        guest.gives_back = False
        assert len(guest.collect(end)) == 1
        branch.end()
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0, "its parts are free"
        assert adapter.receive([Frame(flow(1))]) == 1
        await guest.settle()
        assert guest.take_frames()[-1:] == [flow(1)]


async def test_a_hash_of_zero_has_a_place_in_the_table():
    """linux has a key of zeros after it has had one channel only: all its hashes are 0."""
    async with running(config=AdapterConfig(max_queues=2)) as (guest, adapter):
        _branch, end = guest.add_subchannel(1)
        await guest.settle()
        table = ndis.build_rss_parameters(
            flags=0, hash_information=KINDS, table=(1,) * 128, key=bytes(40)
        )
        assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, table)
        guest.received.clear()
        assert adapter.receive([Frame(flow(1)), Frame(plain_frame(60, target=MAC))]) == 2
        await guest.settle()
        (some,) = guest.collect(end)
        assert some.frames() == [flow(1)]
        assert items_of(some.messages[0])[ppi.HASH_VALUE] == 0
        assert guest.received[0].frames() == [plain_frame(60, target=MAC)], "on the primary one"
