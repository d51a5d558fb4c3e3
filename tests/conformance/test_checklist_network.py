"""The rows of the acceptance checklist about the network adapter, for guests without habits.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
drivers themselves are played in ``test_network_adapter.py``.
"""

from __future__ import annotations

import pytest

from netvsp.frames.frame import Frame, Offload
from netvsp.link import AdapterConfig
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.net_guest import (
    RECEIVE_HANDLE,
    SEND_HANDLE,
    NetGuest,
    incoming,
    message_of,
    plain_frame,
    running,
)

VERSIONS = pytest.mark.parametrize("version", nvsp.VERSIONS, ids=nvsp.VERSION_NAMES.get)


@VERSIONS
async def test_row_13_answers_of_the_handshake_have_their_size_and_those_of_ndis_none(version):
    async with running(started=False) as (guest, _adapter):
        buffers = [
            nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, RECEIVE_HANDLE, nvsp.RECEIVE_BUFFER_ID),
            nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, SEND_HANDLE, 0),
        ]
        for message in (nvsp.build_init(version, version), *buffers):
            answer = await guest.ask(message)
            assert len(answer) == nvsp.ANSWER_SIZE == 32
            assert not any(answer[28:])
        for message in (
            nvsp.build_ndis_config(1514, 0),
            nvsp.build_ndis_version(6, 30),
            nvsp.build_data_path(nvsp.DATA_PATH_SYNTHETIC),
        ):
            assert await guest.ask(message) == b""
            assert await guest.ask(message, flags=0) == b"", "and none at all unasked"


async def test_row_13_an_answer_about_sub_channels_has_40_bytes():
    async with running(config=AdapterConfig(max_queues=4)) as (guest, _adapter):
        answer = await guest.ask(nvsp.build_subchannel(3))
        assert len(answer) == nvsp.MESSAGE_SIZE == 40


@pytest.mark.parametrize(("pages", "mtu"), [(48, 1500), (256, 1500), (256, 9000), (1024, 9000)])
async def test_row_14_buffers_have_one_section_and_sane_sizes(pages, mtu):
    guest = NetGuest(receive_pages=pages)
    async with running(guest=guest, started=False) as (_guest, _adapter):
        await guest.agree(mtu=mtu)
        answer = await guest.ask(
            nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, RECEIVE_HANDLE, nvsp.RECEIVE_BUFFER_ID)
        )
        found = nvsp.parse_receive_buffer_complete_untrusted(answer)
        assert (found.status, found.sections, found.offset) == (nvsp.SUCCESS, 1, 0)
        assert found.sub_alloc_size >= mtu + 14
        assert 0 < found.sub_alloc_count * found.sub_alloc_size <= pages * 4096
        assert found.end_offset == found.sub_alloc_count * found.sub_alloc_size
        assert await guest.share_send_buffer() == nvsp.SUCCESS
        assert guest.section_size >= 68
        assert not guest.section_size % 4


async def test_row_15_a_request_has_a_completion_and_a_reply_and_both_on_the_primary_channel():
    async with running(config=AdapterConfig(max_queues=2)) as (guest, _adapter):
        _branch, end = guest.add_subchannel(1)
        for number, message in enumerate(
            (
                rndis.build_request(rndis.QUERY, 71, oids.E802_3_PERMANENT_ADDRESS),
                rndis.build_request(rndis.QUERY, 72, 0x12345678),  # unknown
                rndis.build_request(rndis.SET, 73, oids.GEN_CURRENT_PACKET_FILTER, bytes(4)),
                rndis.build_id_message(rndis.KEEPALIVE, 74),
            ),
            500,
        ):
            guest.completions.clear()
            guest.received.clear()
            await guest.exchange(
                guest.pages([(0, message)], kind=nvsp.CHANNEL_CONTROL, number=number)
            )
            assert guest.take_completions() == [(number, nvsp.SUCCESS)]
            (reply,) = guest.received
            assert reply.channel_type == nvsp.CHANNEL_CONTROL
            assert int.from_bytes(reply.messages[0][8:12], "little") == number - 500 + 71
            assert guest.collect(end) == []


async def test_row_15_only_halt_has_a_completion_alone():
    async with running() as (guest, _adapter):
        guest.received.clear()
        await guest.exchange(
            guest.pages(
                [(0, rndis.build_id_message(rndis.HALT, 9))], kind=nvsp.CHANNEL_CONTROL, number=9
            )
        )
        assert guest.take_completions() == [(9, nvsp.SUCCESS)]
        assert guest.received == []


async def test_row_16_what_drivers_insist_on_succeeds_and_is_no_longer_than_asked_for():
    async with running() as (guest, adapter):
        for oid in (oids.E802_3_PERMANENT_ADDRESS, oids.E802_3_CURRENT_ADDRESS):
            answer = await guest.query(oid)
            assert (answer.status, answer.buffer) == (rndis.STATUS_SUCCESS, adapter.mac)
        longest = await guest.query(oids.GEN_MAXIMUM_FRAME_SIZE)
        assert (longest.status, int.from_bytes(longest.buffer, "little")) == (0, 1500)
        for revision, size in ndis.OFFLOAD_SIZES.items():
            wanted = ndis.build_offload_query(revision)
            answer = await guest.query(oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES, wanted)
            assert (answer.status, len(answer.buffer)) == (rndis.STATUS_SUCCESS, size)
        parameters = ndis.build_offload_parameters(ndis.OffloadParameters())
        assert await guest.set(oids.TCP_OFFLOAD_PARAMETERS, parameters) == 0
        scaling = await guest.query(oids.GEN_RECEIVE_SCALE_CAPABILITIES)
        assert (scaling.status, len(scaling.buffer)) == (0, 18)
        for wants in (0xD, 0):
            word = wants.to_bytes(4, "little")
            assert await guest.set(oids.GEN_CURRENT_PACKET_FILTER, word) == 0


async def test_row_18_lists_of_information_are_well_formed():
    async with running() as (guest, adapter):
        tagged = incoming()
        tagged.tci = 0x2005
        udp = incoming()
        udp.offload = Offload(1, 0, 34, 34, 34, 6)
        for frame in (incoming(), tagged, udp):
            assert adapter.receive([frame]) == 1
        await guest.settle()
        messages = [message for each in guest.received for message in each.messages]
        lists = []
        for message in messages:
            where = rndis.parse_frame_untrusted(message)
            lists.append(message[where.info_offset : where.info_offset + where.info_length])
        assert any(lists), "a tag is beside its frame"
        for information in lists:
            at = 0
            while at < len(information):
                size, _kind, offset = (
                    int.from_bytes(information[at + place : at + place + 4], "little")
                    for place in (0, 4, 8)
                )
                assert size >= 12
                assert not size % 4
                assert 12 <= offset < size
                at += size
            assert at == len(information)
            ppi.parse_items_untrusted(information)


async def test_row_19_transaction_ids_are_below_the_sub_allocations_and_one_has_one_at_a_time():
    async with running() as (guest, adapter):
        guest.gives_back = False
        frames = [incoming() for _ in range(3 * guest.part_count)]
        held: set[int] = set()
        used: set[int] = set()
        while frames:
            taken = adapter.receive(frames)
            del frames[:taken]
            await guest.settle()
            for each in guest.received:
                places = {offset // guest.part_size for _, offset in each.ranges}
                assert each.transaction_id < guest.part_count
                assert each.transaction_id not in held
                assert not used & places, "a part is not used again before it is given back"
                held.add(each.transaction_id)
                used |= places
            assert guest.received or not taken
            guest.received.clear()
            guest.give_back(*held)
            held.clear()
            used.clear()
            await guest.settle()


async def test_row_20_nothing_comes_before_the_filter_nor_shorter_than_a_header():
    async with running(wants=0) as (guest, adapter):
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == []
        await guest.set_filter(0xD)
        guest.received.clear()
        short = [Frame(plain_frame()[:size]) for size in (0, 1, 13)]
        assert adapter.receive([*short, incoming()]) == 4
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]
        await guest.set_filter(0)
        guest.received.clear()
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == []
        await guest.exchange(guest.section(0, message_of(plain_frame())))
        assert not guest.host.complaints, "what it sends is no fault"
