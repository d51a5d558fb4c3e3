"""The adapter's session: handshakes in each driver's order, and what is refused."""

from __future__ import annotations

import struct

import pytest
import trio.testing

from netvsp.link import AdapterConfig
from netvsp.session import DEFAULT_MTU, SECTION_SIZE
from netvsp.wire import nvsp, oids, rndis
from tests.support.net_guest import (
    MAC,
    RECEIVE_HANDLE,
    SEND_HANDLE,
    NetGuest,
    Network,
    incoming,
    message_of,
    plain_frame,
    running,
)
from vmbus.wire.packets import COMPLETION, build_packet

INVALID = nvsp.build_rndis_packet_complete(nvsp.INVALID_RNDIS_PACKET)
RECEIVE = nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, RECEIVE_HANDLE, nvsp.RECEIVE_BUFFER_ID)
SEND = nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, SEND_HANDLE, 0xFACE)


# -- handshakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", nvsp.VERSIONS, ids=nvsp.VERSION_NAMES.get)
async def test_linux_gets_along_with_each_version(version):
    """linux: netvsc_connect_vsp, then netvsc_init_buf, then RNDIS."""
    network = Network()
    async with running(network, version=version) as (guest, adapter):
        assert adapter.snapshot()["nvsp_version"] == nvsp.VERSION_NAMES[version]
        assert adapter.snapshot()["stage"] == "RNDIS"
        assert guest.section_size == SECTION_SIZE
        await guest.exchange(guest.section(2, message_of(plain_frame())))
        assert network.bytes() == [plain_frame()]
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]
        assert guest.host.complaints == []


async def test_linux_goes_down_the_versions_until_one_is_taken():
    config = AdapterConfig(max_version=nvsp.VERSION_5)
    async with running(config=config, started=False) as (guest, adapter):
        for version in (nvsp.VERSION_6_1, nvsp.VERSION_6, nvsp.VERSION_5):
            answer = await guest.ask(nvsp.build_init(version, version))
            assert len(answer) == nvsp.ANSWER_SIZE
            got, status = nvsp.parse_init_complete_untrusted(answer)
            assert got == version
        assert status == nvsp.SUCCESS
        assert adapter.snapshot()["nvsp_version"] == "5"


@pytest.mark.parametrize(
    ("least", "greatest", "got", "status"),
    [
        (2, 0x60001, 0x60001, nvsp.SUCCESS),
        (2, 0x5FFFF, 0x50000, nvsp.SUCCESS),
        (3, 4, 4, nvsp.PROTOCOL_UNSUPPORTED),
        (0x30001, 0x30001, 0x30001, nvsp.PROTOCOL_UNSUPPORTED),
        (0x60002, 0x70000, 0x70000, nvsp.PROTOCOL_TOO_NEW),
        (0x60001, 2, 2, nvsp.PROTOCOL_UNSUPPORTED),
    ],
)
async def test_a_version_is_in_the_range_that_is_asked_for(least, greatest, got, status):
    async with running(started=False) as (guest, _adapter):
        answer = await guest.ask(nvsp.build_init(least, greatest))
        assert nvsp.parse_init_complete_untrusted(answer) == (got, status)


async def test_openbsd_wants_empty_answers_to_what_has_none():
    """openbsd: hvn_nvs_cmd sends all with a completion and looks at the type of the last answer."""
    async with running(started=False) as (guest, _adapter):
        await guest.ask(nvsp.build_init(nvsp.VERSION_5, nvsp.VERSION_5))
        assert await guest.ask(nvsp.build_ndis_config(1514, nvsp.CAPABILITY_8021Q)) == b""
        assert await guest.ask(nvsp.build_ndis_version(6, 30)) == b""
        answer = await guest.ask(RECEIVE)
        found = nvsp.parse_receive_buffer_complete_untrusted(answer)
        guest.part_size, guest.part_count = found.sub_alloc_size, found.sub_alloc_count
        assert (found.status, found.sections, found.offset) == (nvsp.SUCCESS, 1, 0)
        assert found.end_offset == found.sub_alloc_size * found.sub_alloc_count
        # There is no send buffer; messages come in pages.
        reply = await guest.control(rndis.build_initialize(1, 0x4000))
        assert rndis.parse_initialize_reply_untrusted(reply).status == 0
        assert await guest.ask(nvsp.build_revoke(nvsp.REVOKE_RECEIVE_BUFFER, 0xCAFE)) == b""
        assert guest.host.complaints == []


async def test_uefi_asks_in_sections_and_for_six_bytes():
    """NetvscDxe: control messages go through the send buffer."""
    guest = NetGuest(receive_pages=48)
    async with running(guest=guest, started=False, config=AdapterConfig()) as (_guest, _adapter):
        await guest.ask(nvsp.build_init(nvsp.VERSION_5, nvsp.VERSION_5))
        await guest.ask(nvsp.build_ndis_config(1514, 0))
        await guest.ask(nvsp.build_ndis_version(6, 30))
        assert await guest.share_receive_buffer() == nvsp.SUCCESS
        assert await guest.share_send_buffer() == nvsp.SUCCESS
        for message in (
            rndis.build_initialize(1, 1514),
            rndis.build_request(rndis.QUERY, 2, oids.E802_3_CURRENT_ADDRESS),
        ):
            await guest.exchange(guest.section(0, message, kind=nvsp.CHANNEL_CONTROL))
        await guest.settle()
        _initialized, answer = [each.messages[0] for each in guest.received]
        assert rndis.parse_query_reply_untrusted(answer).buffer == MAC
        assert guest.host.complaints == []


async def test_macos_gets_the_completion_before_the_reply():
    """It speaks version 1, sends no config, and waits for the completion first."""
    async with running(version=nvsp.VERSION_1, wants=0) as (guest, adapter):
        assert adapter.snapshot()["mtu"] == DEFAULT_MTU
        message = rndis.build_request(rndis.QUERY, 2, oids.E802_3_PERMANENT_ADDRESS)
        guest.end.send(guest.pages([(0, message)], kind=nvsp.CHANNEL_CONTROL))
        await trio.testing.wait_all_tasks_blocked()
        first, second = guest.end.receive_nowait()
        assert first.kind == COMPLETION
        assert second.kind != COMPLETION
        guest.give_back(second.transaction_id)


async def test_dpdk_begins_with_no_filter_and_gets_no_frames():
    network = Network()
    async with running(network, wants=0) as (guest, adapter):
        assert adapter.receive([incoming()]) == 1
        await guest.exchange(guest.section(0, message_of(plain_frame()), number=5))
        assert guest.take_completions() == [(5, nvsp.SUCCESS)]
        assert network.frames == []
        assert guest.received == []
        assert adapter.statistics.receive.dropped["not ready"] == 1
        assert adapter.statistics.transmit.dropped["not ready"] == 1


# -- MTU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "carried", "got"),
    [
        (1500, None, 1500),
        (9000, None, 9000),
        (9202, None, 9202),
        (9000, 1500, 1500),
        (1400, 1500, 1500),
        (68, None, 1500),
        (1486, None, 1500),  # freebsd, which does not count the header
        (67, None, 1500),
        (9203, None, 1500),
        (0xFFFFFF00, 576, 576),
    ],
)
async def test_the_mtu_is_what_guest_and_network_can_do(asked, carried, got):
    """linux takes the lower one of its own and the answer to GEN_MAXIMUM_FRAME_SIZE."""
    guest = NetGuest(receive_pages=256)
    async with running(Network(mtu=carried), guest=guest, mtu=asked) as (_guest, adapter):
        answer = await guest.query(oids.GEN_MAXIMUM_FRAME_SIZE)
        assert answer.buffer == got.to_bytes(4, "little")
        assert adapter.snapshot()["mtu"] == got
        # What it says may be without the header.
        said = asked + 14 if asked <= 9202 else 1500
        longest = min(max(said, 1500), carried or 9202) + 14
        assert guest.part_size >= longest + 4 + 256
        await guest.exchange(guest.pages([(0, message_of(plain_frame(longest)))]))
        await guest.exchange(guest.pages([(0, message_of(plain_frame(longest + 1)))]))
        assert adapter.statistics.transmit.frames[0] == 1
        assert adapter.statistics.transmit.dropped["too long"] == 1


@pytest.mark.parametrize(
    ("capabilities", "pages", "size"),
    [(nvsp.CAPABILITY_RSC, 2048, 16384), (nvsp.CAPABILITY_RSC, 2047, 2048), (0, 2048, 2048)],
)
async def test_a_driver_that_takes_coalesced_segments_has_long_parts_for_them(
    capabilities, pages, size
):
    guest = NetGuest(receive_pages=pages)
    async with running(guest=guest, capabilities=capabilities):
        assert (guest.part_size, guest.part_count) == (size, pages * 4096 // size)


async def test_another_mtu_is_another_handshake():
    """linux closes the channel for that; a driver that begins anew on it is served as well."""
    async with running(mtu=1500) as (guest, adapter):
        before = guest.part_size
        await guest.start(mtu=4000)
        assert guest.part_size > before
        assert adapter.receive([incoming(4014)]) == 1
        await guest.settle()
        assert guest.take_frames() == [incoming(4014).tobytes()]
        assert guest.host.complaints == []


# -- refusals --------------------------------------------------------------------------------------


async def test_a_second_init_begins_anew():
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert adapter.receive([incoming()] * 3) == 3
        await guest.settle()
        await guest.agree(version=nvsp.VERSION_5)
        found = adapter.snapshot()
        assert (found["stage"], found["nvsp_version"]) == ("SEND_NDIS_VERSION and buffers", "5")
        assert (found["filter"], found["receive_outstanding"]) == (0, 0)
        assert len(guest.host.leases) == 0
        guest.gives_back = True
        assert await guest.share_receive_buffer() == nvsp.SUCCESS
        assert await guest.share_send_buffer() == nvsp.SUCCESS


async def test_nothing_goes_before_init():
    async with running(started=False) as (guest, adapter):
        assert await guest.ask(nvsp.build_ndis_version(6, 30)) == b""
        assert await guest.ask(nvsp.build_ndis_config(1514, 0)) == b""
        answer = await guest.ask(RECEIVE)
        assert answer == nvsp.build_receive_buffer_complete(nvsp.FAILURE)
        assert await guest.ask(SEND) == nvsp.build_send_buffer_complete(nvsp.FAILURE)
        assert await guest.ask(nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL)) == INVALID
        assert await guest.ask(nvsp.build_subchannel(1)) == (
            nvsp.build_subchannel_complete(nvsp.FAILURE, 0)
        )
        assert adapter.snapshot()["refused"] == len(guest.host.complaints) == 6
        # It can still do it right.
        await guest.start()


async def test_rndis_needs_a_receive_buffer():
    async with running(started=False) as (guest, _adapter):
        await guest.agree()
        assert await guest.share_send_buffer() == nvsp.SUCCESS
        packet = guest.section(0, rndis.build_initialize(1, 0x4000), kind=nvsp.CHANNEL_CONTROL)
        await guest.exchange(packet)
        assert guest.completions[-1][1] == INVALID
        assert "where SEND_NDIS_VERSION and buffers is expected" in guest.host.complaints[0]


@pytest.mark.parametrize(
    ("payload", "answer"),
    [
        (nvsp.build_init(2, 2)[:8], nvsp.build_init_complete(0, nvsp.FAILURE)),
        (struct.pack("<I", 125) + bytes(4), b""),
        (struct.pack("<II", 101, 1), nvsp.build_receive_buffer_complete(nvsp.FAILURE)),
        (struct.pack("<II", 104, 1), nvsp.build_send_buffer_complete(nvsp.FAILURE)),
        (struct.pack("<II", 107, 0), INVALID),
        (struct.pack("<II", 133, 1), nvsp.build_subchannel_complete(nvsp.FAILURE, 0)),
        (nvsp.build_init_complete(2, 1), b""),
        (nvsp.build_vf_association(allocated=True, serial=1), b""),
        (nvsp.build_send_table(tuple(range(16))), b""),
        (struct.pack("<II", 135, 0).ljust(40, b"\0"), b""),
        (struct.pack("<II", 0, 0), b""),
        (struct.pack("<II", 0xFFFFFFFF, 0), b""),
        (b"", b""),
    ],
    ids=lambda each: each[:4].hex(),
)
async def test_a_message_that_is_refused_is_answered_in_its_own_way(payload, answer):
    async with running() as (guest, adapter):
        guest.host.complaints.clear()
        assert await guest.ask(payload) == answer
        assert len(guest.host.complaints) == 1
        assert adapter.statistics.transmit.errors == 1
        assert await guest.ask(payload, flags=0) == b""
        assert len(guest.host.complaints) == 2


async def test_packets_of_other_kinds_are_refused():
    async with running() as (guest, _adapter):
        for kind in (7, 8, 0, 0xFFFF):
            packet = build_packet(kind, bytes(40), transaction_id=kind, flags=1)
            await guest.exchange(packet)
            assert guest.completions == [(kind, b"")]
            guest.completions.clear()


async def test_a_completion_that_wants_one_gets_one():
    """None does; the channel would count it as a request for ever, and a pause would wait."""
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        (number,) = [each.transaction_id for each in guest.received]
        answer = nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
        for wanted in (1, 0):
            await guest.exchange(build_packet(COMPLETION, answer, transaction_id=number, flags=1))
            assert guest.completions == [(number, b"")]
            guest.completions.clear()
            assert guest.channel.outstanding == 0
            assert len(guest.host.complaints) == 1 - wanted


async def test_a_control_message_is_of_a_bounded_length_and_answered_as_it_asks():
    async with running() as (guest, _adapter):
        request = rndis.build_request(rndis.QUERY, 7, oids.GEN_LINK_SPEED)
        kind = nvsp.CHANNEL_CONTROL
        await guest.exchange(guest.pages([(0, request.ljust(4097, b"\0"))], kind=kind, number=1))
        assert guest.completions == [(1, INVALID)]
        await guest.exchange(guest.pages([(0, request.ljust(4096, b"\0"))], kind=kind, flags=0))
        assert len(guest.completions) == 1
        (reply,) = guest.received
        assert rndis.parse_query_reply_untrusted(reply.messages[0]).request_id == 7


async def test_the_data_path_is_the_synthetic_one():
    """linux: netvsc_switch_datapath waits for an answer that is empty."""
    async with running() as (guest, _adapter):
        assert await guest.ask(nvsp.build_data_path(nvsp.DATA_PATH_SYNTHETIC)) == b""
        assert guest.host.complaints == []
        assert await guest.ask(nvsp.build_data_path(nvsp.DATA_PATH_VF)) == b""
        assert "a VF that there is not" in guest.host.complaints[0]


async def test_windows_may_ask_by_nvsp_and_is_told_that_it_cannot():
    async with running() as (guest, _adapter):
        answer = await guest.ask(struct.pack("<II", nvsp.OID_QUERY_EX, 1))
        assert answer == nvsp.build_oid_query_complete(rndis.STATUS_NOT_SUPPORTED)
