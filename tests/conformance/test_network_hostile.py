"""A network guest that breaks rules: what each costs it, and what nobody else notices.

A bad packet is one fault with its reason, one answer, and nothing else: the frame behind it goes
out. Only a corrupt ring costs its channel.
"""

from __future__ import annotations

import struct

import pytest

from netvsp.adapter import NetworkAdapter
from netvsp.control import MAX_CONTROL
from netvsp.link import AdapterConfig
from netvsp.messages import MAX_MESSAGE
from netvsp.receive import MAX_CONTROL_QUEUE, Receiver
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.net_guest import (
    DATA_PAGES,
    MAC,
    PEER,
    RECEIVE_HANDLE,
    SEND_HANDLE,
    NetGuest,
    Network,
    incoming,
    message_of,
    plain_frame,
    running,
)
from vmbus.memory import PAGE_SIZE
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, IN_BAND, RANGES_HEADER, build_packet
from vmbus.wire.ring import WRITE_INDEX

HIGH = 0xFFFFFFFF
DATA = nvsp.build_rndis_packet(nvsp.CHANNEL_DATA)


def words(message: bytes, **changes: int) -> bytes:
    """Replace words of a message; ``w3=7`` makes the fourth one 7."""
    data = bytearray(message)
    for name, value in changes.items():
        data[4 * int(name[1:]) : 4 * int(name[1:]) + 4] = (value & HIGH).to_bytes(4, "little")
    return bytes(data)


def listed(count: int, ranges: bytes) -> bytes:
    header = RANGES_HEADER.pack(0, count) + ranges
    header += bytes(-len(header) % 8)
    return build_packet(GPA_DIRECT, DATA, transaction_id=1, flags=1, header=header)


GOOD = message_of(plain_frame(60))
ITEM = ppi.build_item(ppi.CHECKSUM, ppi.TX_TCP | ppi.TX_IPV4)
LARGE = ppi.build_item(ppi.LARGE_SEND, ppi.pack_large_send(ppi.LargeSend(1000, 34, False)))


def receiver_of(adapter: NetworkAdapter) -> Receiver:
    assert adapter._session is not None
    return adapter._session.receiver


def free_parts(adapter: NetworkAdapter) -> list[int]:
    buffer = receiver_of(adapter).buffer
    assert buffer is not None
    return sorted(buffer.free)


# What breaks a rule, by a word of what is said of it: how to send it.
BAD = {
    "of the frame beyond the message": ("a frame of", words(GOOD, w3=HIGH)),
    "of a frame before its header": ("at byte 10", words(GOOD, w2=2)),
    "of an offset that wraps round": ("at byte 4294967303", words(GOOD, w2=HIGH)),
    "of information beyond the message": (
        "information",
        words(message_of(GOOD[44:], ITEM), w7=999),
    ),
    "of an item longer than the list": ("an item of", message_of(GOOD[44:], words(ITEM, w0=20))),
    "of an item of no bytes": ("an item of 0 bytes", message_of(GOOD[44:], words(ITEM, w0=0))),
    "of data outside of its item": ("data at byte", message_of(GOOD[44:], words(ITEM, w2=99))),
    "of items without end": ("more than 16 items", message_of(GOOD[44:], ITEM * 17)),
    "of a sum beyond the frame": ("CHECKSUM", message_of(GOOD[44:60], ITEM)),
    "of a segment that is no IP": ("LARGE_SEND", message_of(GOOD[44:], LARGE)),
    "of a length that is too long": ("msg_len|where", words(GOOD, w1=HIGH)),
    "of a length of nothing": ("bytes", words(GOOD, w1=0)),
    "of frames without end": ("more than 8 frames", GOOD * 9),
    "of another message among frames": ("type 0x5", GOOD + words(GOOD, w0=5)),
    "of nothing": ("of 0 bytes|of 3 bytes", b"\1\0\0"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("in_pages", [False, True])
async def test_a_bad_message_costs_its_packet(what, in_pages):
    says, message = BAD[what]
    network = Network()
    async with running(network) as (guest, adapter):
        if in_pages:
            half = len(message) // 2
            pieces = [(4096 - half, message[:half]), (0, message[half:])]
            bad = guest.pages(pieces, number=1)
        else:
            bad = guest.section(0, message, number=1)
        await guest.exchange(bad, guest.section(1, GOOD, number=2))
        assert guest.take_completions() == [
            (1, nvsp.INVALID_RNDIS_PACKET),
            (2, nvsp.SUCCESS),
        ]
        assert network.bytes() == [plain_frame(60)]
        (complaint,) = guest.host.complaints
        assert adapter.statistics.transmit.errors == 1
        assert any(each in complaint for each in says.split("|")), complaint


def far_pages(guest: NetGuest) -> bytes:
    return listed(1, build_range(8000, 0, [guest.data_pfns[0], 1 << 40]))


PLACES = {
    "section": lambda _: build_packet(
        IN_BAND, nvsp.build_rndis_packet(0, 10, 60), transaction_id=1, flags=1
    ),
    "bytes in section": lambda _: build_packet(
        IN_BAND, nvsp.build_rndis_packet(0, 0, HIGH), transaction_id=1, flags=1
    ),
    "neither a section nor pages": lambda _: build_packet(IN_BAND, DATA, transaction_id=1, flags=1),
    "a message of more than": lambda guest: listed(
        1, build_range(MAX_MESSAGE + 1, 0, [guest.data_pfns[0]] * 18)
    ),
    "range_count 65": lambda guest: listed(65, build_range(16, 0, guest.data_pfns[:1]) * 65),
    "": far_pages,
}


@pytest.mark.parametrize("says", PLACES)
async def test_a_message_that_is_nowhere_costs_its_packet(says):
    network = Network()
    async with running(network) as (guest, adapter):
        await guest.exchange(PLACES[says](guest), guest.section(1, GOOD, number=2))
        assert guest.take_completions() == [(1, nvsp.INVALID_RNDIS_PACKET), (2, nvsp.SUCCESS)]
        (complaint,) = guest.host.complaints
        assert says in complaint
        assert adapter.statistics.transmit.errors == 1
        assert network.bytes() == [plain_frame(60)]


async def test_a_header_may_cross_a_page():
    """Linux does that since 6.14, and OpenVMM had to learn it."""
    network = Network()
    async with running(network) as (guest, _adapter):
        for place in range(4096 - 60, 4096, 7):
            await guest.exchange(guest.pages([(place, message_of(plain_frame(1514)))]))
        assert network.bytes() == [plain_frame(1514)] * len(range(4036, 4096, 7))
        assert guest.host.complaints == []


CONTROL = {
    "of a kind that is no request": rndis.build_id_message(rndis.INDICATE_STATUS, 5),
    "of a reply": rndis.build_status_reply(rndis.SET, 5, 0),
    "of a message that is too long": bytes(MAX_CONTROL + 8),
    "of half a message": rndis.build_request(rndis.QUERY, 5, 1)[:10],
}


@pytest.mark.parametrize("what", CONTROL)
async def test_a_bad_request_costs_its_packet(what):
    async with running() as (guest, adapter):
        packet = guest.pages([(0, CONTROL[what])], kind=nvsp.CHANNEL_CONTROL, number=1)
        await guest.exchange(packet)
        assert guest.take_completions() == [(1, nvsp.INVALID_RNDIS_PACKET)]
        assert len(guest.host.complaints) == adapter.snapshot()["refused"] == 1
        assert guest.received == []
        assert (await guest.query(oids.E802_3_CURRENT_ADDRESS)).buffer == MAC


@pytest.mark.parametrize(
    "parameters",
    [
        {"table": ()},
        {"table": (8,)},
        {"table": (HIGH,) * 128},
        {"hash_information": 2},
    ],
)
async def test_a_table_that_names_no_channel_changes_nothing(parameters):
    """OpenVMM once ended the adapter for it."""
    right = {"flags": 0, "hash_information": 0x1701, "table": (0,), "key": bytes(40)}
    async with running(config=AdapterConfig(max_queues=8)) as (guest, adapter):
        wanted = ndis.build_rss_parameters(**{**right, **parameters})
        status = await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, wanted)
        assert status == rndis.STATUS_INVALID_DATA
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]


async def test_an_oid_with_addresses_of_a_host_is_not_known():
    """CVE-2021-28476: vmswitch followed a pointer out of such a request."""
    switch_request = 0x01010222
    async with running() as (guest, _adapter):
        for oid in (switch_request, 0, HIGH, 0xFF010201):
            value = struct.pack("<Q", 0x4141414141414141) * 60
            assert await guest.set(oid, value) == rndis.STATUS_NOT_SUPPORTED
            assert (await guest.query(oid, value)).status == rndis.STATUS_NOT_SUPPORTED


async def test_completions_of_nothing_are_faults_and_free_nothing():
    async with running() as (guest, adapter):
        guest.gives_back = False
        before = free_parts(adapter)
        assert adapter.receive([incoming(number=1)]) == 1
        await guest.settle()
        ((real, *_),) = guest.received
        ids = [0, 1, HIGH, (1 << 64) - 3, real, real]
        guest.give_back(*ids)
        await guest.settle()
        assert free_parts(adapter) == before
        faults = [each for each in guest.host.complaints if "not outstanding" in each]
        assert len(faults) == len(ids) - 1


async def test_completions_on_another_channel_are_faults():
    async with running(config=AdapterConfig(max_queues=2)) as (guest, adapter):
        _branch, end = guest.add_subchannel(1)
        guest.gives_back = False
        await guest.settle()
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        ((real, *_),) = guest.received
        guest.give_back(real, end=end)
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 1


async def test_replies_that_are_not_taken_are_bounded():
    async with running() as (guest, adapter):
        guest.gives_back = False
        ask = rndis.build_request(rndis.QUERY, 5, oids.GEN_SUPPORTED_LIST)
        for _ in range(guest.part_count + MAX_CONTROL_QUEUE + 50):
            await guest.exchange(guest.section(0, ask, kind=nvsp.CHANNEL_CONTROL))
        assert len(receiver_of(adapter)._control_queue) == MAX_CONTROL_QUEUE
        assert adapter.snapshot()["refused"] == 50
        assert len(guest.completions) == guest.part_count + MAX_CONTROL_QUEUE + 50


# -- buffers that go away --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["teardown", "revoke", "both", "init"])
async def test_a_receive_buffer_that_goes_while_frames_are_out(how):
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert adapter.receive([incoming(number=each) for each in range(20)]) == 20
        await guest.settle()
        ids = [each.transaction_id for each in guest.received]
        guest.received.clear()
        if how in {"revoke", "both"}:
            await guest.ask(nvsp.build_revoke(nvsp.REVOKE_RECEIVE_BUFFER, nvsp.RECEIVE_BUFFER_ID))
        if how == "init":
            await guest.ask(nvsp.build_init(nvsp.VERSION_6_1, nvsp.VERSION_6_1))
        if how in {"teardown", "both"}:
            guest.host.leases.tear_down(0, RECEIVE_HANDLE)
            assert guest.host.torn_down == [RECEIVE_HANDLE], "at once: nothing of it is used"
        assert adapter.receive([incoming()]) == 1
        guest.give_back(*ids)
        await guest.settle()
        assert guest.received == []
        assert adapter.statistics.receive.dropped["not ready"] == 1
        # And it is whole again with another one.
        await guest.agree()
        assert await guest.share_receive_buffer() == nvsp.SUCCESS


async def test_a_send_buffer_that_goes_between_two_packets_of_a_batch():
    network = Network()
    async with running(network) as (guest, _adapter):
        guest.completions.clear()
        revoke = guest.in_band(nvsp.build_revoke(nvsp.REVOKE_SEND_BUFFER, 0), number=2)
        first, last = guest.section(0, GOOD, number=1), guest.section(1, GOOD, number=3)
        await guest.exchange(first, revoke, last)
        assert [number for number, _ in guest.completions] in ([1, 2, 3], [2, 3, 1], [2, 1, 3])
        assert dict(guest.completions)[3] == nvsp.build_rndis_packet_complete(
            nvsp.INVALID_RNDIS_PACKET
        )
        assert network.bytes() == [plain_frame(60)], "what was copied before"
        guest.host.leases.tear_down(0, SEND_HANDLE)
        assert guest.host.torn_down == [SEND_HANDLE]


async def test_frames_that_wait_outlive_the_buffer_that_they_were_in():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        pieces = [(0, message_of(plain_frame(9000))[:9044])]
        await guest.exchange(guest.section(0, GOOD, number=1), guest.pages(pieces, number=2))
        guest.write(guest.data_pfns, 0, bytes(DATA_PAGES * PAGE_SIZE))
        guest.host.leases.tear_down(0, SEND_HANDLE)
        guest.write(guest.send_pfns, 0, bytes(PAGE_SIZE))
        network.make_room(9)
        await guest.settle()
        assert network.bytes()[0] == plain_frame(60)
        assert min(guest.take_completions()) == (1, nvsp.SUCCESS)


# -- rings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [3, 1 << 20, HIGH])
async def test_a_corrupt_ring_of_a_sub_channel_costs_that_channel(index):
    network = Network()
    async with running(network, config=AdapterConfig(max_queues=2)) as (guest, adapter):
        branch, end = guest.add_subchannel(1)
        await guest.settle()
        assert adapter.snapshot()["channels"] == 2
        end.memory.page(0).cast("I")[WRITE_INDEX] = index
        branch.poke()
        await guest.settle()
        assert adapter.snapshot()["channels"] == 1
        await guest.exchange(guest.section(0, GOOD))
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert network.bytes() == [plain_frame(60)]
        assert guest.take_frames() == [incoming().tobytes()]


# -- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [PEER, bytes(6), b"\xff" * 6], ids=bytes.hex)
async def test_frames_of_others_do_not_go_out(source):
    network = Network()
    async with running(network) as (guest, adapter):
        frame = plain_frame(60, source=source)
        await guest.exchange(guest.section(0, message_of(frame), number=1))
        assert guest.take_completions() == [(1, nvsp.SUCCESS)]
        assert network.frames == []
        assert adapter.statistics.transmit.dropped == {"spoofed": 1}


@pytest.mark.parametrize("size", [*range(14), 1515, 9000, 60_000])
async def test_frames_of_impossible_size_do_not_go_out(size):
    network = Network(mtu=1500)
    async with running(network) as (guest, adapter):
        message = message_of(plain_frame(14).ljust(size, b"x")[:size])
        await guest.exchange(guest.pages([(0, message)], number=1))
        assert len(guest.completions) == 1
        assert network.frames == []
        assert sum(adapter.statistics.transmit.dropped.values()) == 1


@pytest.mark.parametrize("size", [0, 1, 13, 2000, 9000, 65_549])
async def test_frames_of_impossible_size_do_not_come_in(size):
    async with running() as (guest, adapter):
        frame = incoming(max(size, 18))
        frame.head = frame.head[:size]
        assert adapter.receive([frame, incoming()]) == 2
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]
        assert sum(adapter.statistics.receive.dropped.values()) == 1


# -- coming and going ------------------------------------------------------------------------------


async def test_a_guest_that_comes_and_goes_leaves_nothing_behind():
    network = Network(room=0)
    for _ in range(20):
        async with running(network, config=AdapterConfig(max_queues=3)) as (guest, adapter):
            guest.gives_back = False
            branch, end = guest.add_subchannel(1)
            await guest.settle()
            adapter.receive([incoming(number=each) for each in range(30)])
            end.send(guest.pages([(0, GOOD)]))
            await guest.exchange(guest.section(0, GOOD))
            assert adapter.endpoint.info.mtu is None
            branch.end()
        assert adapter._session is None
        assert guest.channel.undertakings.load.total == 0
        branch.close_doorbell()
    assert network.frames == []


async def test_sub_channels_that_never_open_are_not_waited_for():
    network = Network()
    async with running(network, config=AdapterConfig(max_queues=8)) as (guest, adapter):
        answer = await guest.ask(nvsp.build_subchannel(7))
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (nvsp.SUCCESS, 7)
        table = ndis.build_rss_parameters(
            flags=0, hash_information=0x1701, table=(1, 2, 3, 4, 5, 6, 7), key=bytes(range(40))
        )
        assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, table)
        guest.received.clear()
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]
        assert (await guest.ask(nvsp.build_subchannel(7))) == nvsp.build_subchannel_complete(
            nvsp.FAILURE, 0
        )


async def test_one_that_agrees_on_another_mtu_in_a_storm_gets_no_frame_that_is_too_long():
    network = Network()
    async with running(network, mtu=9000) as (guest, adapter):
        for mtu in (1500, 9000, 68, 1500, 9202) * 3:
            adapter.receive([incoming(9000), incoming(1514), incoming(60)])
            await guest.ask(nvsp.build_revoke(nvsp.REVOKE_RECEIVE_BUFFER, nvsp.RECEIVE_BUFFER_ID))
            adapter.receive([incoming(9000)])
            await guest.agree(mtu=mtu)
            await guest.ask(nvsp.build_revoke(nvsp.REVOKE_SEND_BUFFER, 0))
            assert await guest.share_receive_buffer() == nvsp.SUCCESS
            assert await guest.share_send_buffer() == nvsp.SUCCESS
            reply = await guest.control(rndis.build_initialize(5, 0x4000))
            assert rndis.parse_initialize_reply_untrusted(reply).status == 0
            await guest.set_filter(0xD)
            guest.received.clear()
            adapter.receive([incoming(size) for size in (60, 1514, 9000, 9216)])
            await guest.settle()
            for each in guest.take_frames():
                assert len(each) <= guest.part_size
        # It has given back what was out when the buffer went.
        assert all("not outstanding" in each for each in guest.host.complaints)
