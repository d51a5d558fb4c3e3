"""What the network drivers demand of answers."""

from __future__ import annotations

import struct

import pytest

from netvsp.guest.habits import DPDK, FREEBSD, LINUX, MACOS, OPENBSD, UEFI
from netvsp.guest.replies import (
    check_address,
    check_answer,
    check_bare_completion,
    check_offloads,
    check_query_reply,
    check_receive_section,
    check_scaling,
    check_send_section,
    check_word,
    name_of,
)
from netvsp.wire import ndis, nvsp, oids, rndis
from vmbus.guest import GuestPanic, Incoming
from vmbus.wire.packets import build_packet


def panic(reason):
    raise GuestPanic("test", reason)


def completion(payload):
    return Incoming(11, 0, 1, 16, build_packet(11, payload))


INIT = nvsp.build_init_complete(nvsp.VERSION_5, nvsp.SUCCESS)
BUFFER = nvsp.build_receive_buffer_complete(nvsp.SUCCESS, 2048, 16)


@pytest.mark.parametrize("habits", [LINUX, FREEBSD, OPENBSD, DPDK, MACOS, UEFI])
def test_the_answers_of_the_wire_please_every_driver(habits):
    for kind, answer in [
        (nvsp.INIT_COMPLETE, INIT),
        (nvsp.SEND_RECEIVE_BUFFER_COMPLETE, BUFFER),
        (nvsp.SEND_SEND_BUFFER_COMPLETE, nvsp.build_send_buffer_complete(nvsp.SUCCESS, 6144)),
        (nvsp.SEND_RNDIS_PACKET_COMPLETE, nvsp.build_rndis_packet_complete(nvsp.SUCCESS)),
    ]:
        assert check_answer(completion(answer), kind, habits, panic)[: len(answer)] == answer
    answer = nvsp.build_subchannel_complete(nvsp.SUCCESS, 3)
    if habits is not UEFI:
        check_answer(completion(answer), nvsp.SUBCHANNEL, habits, panic)


@pytest.mark.parametrize(
    ("habits", "kind", "payload", "reason"),
    [
        (LINUX, nvsp.INIT_COMPLETE, INIT[:24], "24 bytes instead of 28"),
        (FREEBSD, nvsp.INIT_COMPLETE, INIT[:8], "8 bytes instead of 16"),
        (LINUX, nvsp.SEND_RECEIVE_BUFFER_COMPLETE, BUFFER[:24], "24 bytes instead of 28"),
        (LINUX, nvsp.INIT_COMPLETE, b"", "a completion of 0 bytes"),
        (LINUX, nvsp.INIT_COMPLETE, BUFFER, "SEND_RECEIVE_BUFFER_COMPLETE where INIT_COMPLETE"),
        (LINUX, nvsp.INIT_COMPLETE, struct.pack("<I28x", 77), "NVSP: 77 where"),
        (UEFI, nvsp.INIT_COMPLETE, INIT + bytes(8), "40 bytes, the driver has room for 32"),
        (DPDK, nvsp.INIT_COMPLETE, INIT.ljust(264, b"\0"), "room for 256"),
        (
            DPDK,
            nvsp.SUBCHANNEL,
            nvsp.build_subchannel_complete(1, 2)[:32],
            "32 bytes instead of 40",
        ),
    ],
)
def test_answers_that_a_driver_does_not_take_crash_it(habits, kind, payload, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_answer(completion(payload), kind, habits, panic)


def test_where_no_answer_is_due_some_drivers_want_an_empty_completion():
    kind = nvsp.SEND_NDIS_CONFIG
    for habits in (OPENBSD, UEFI):
        check_bare_completion(completion(b""), kind, habits, panic)
    check_bare_completion(completion(bytes(32)), kind, UEFI, panic)
    with pytest.raises(GuestPanic, match="completed with 32 bytes, where there is no answer"):
        check_bare_completion(completion(bytes(32)), kind, OPENBSD, panic)
    with pytest.raises(GuestPanic, match="room for 32"):
        check_bare_completion(completion(bytes(40)), kind, UEFI, panic)
    with pytest.raises(GuestPanic, match="SWITCH_DATA_PATH: completed with 40"):
        check_bare_completion(completion(bytes(40)), nvsp.SWITCH_DATA_PATH, LINUX, panic)


def section(sections=1, offset=0, size=2048, count=16):
    words = (nvsp.SEND_RECEIVE_BUFFER_COMPLETE, 1, sections, offset, size, count, 0)
    return struct.pack("<7I", *words)


def test_a_receive_buffer_is_one_run_of_sub_allocations():
    found = check_receive_section(section(), 32768, LINUX, panic)
    assert (found.sub_alloc_size, found.sub_alloc_count) == (2048, 16)
    refused = nvsp.build_receive_buffer_complete(nvsp.FAILURE)
    assert check_receive_section(refused, 32768, LINUX, panic).status == nvsp.FAILURE


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sections": 2}, "2 sections"),
        ({"sections": 0}, "0 sections"),
        ({"offset": 4096}, "the first at 4096"),
        ({"size": 67}, "16 sub-allocations of 67 bytes"),
        ({"count": 17}, "17 sub-allocations of 2048 bytes in 32768"),
        ({"count": 0}, "0 sub-allocations"),
    ],
)
def test_other_receive_buffers_crash_the_guest(fields, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_receive_section(section(**fields), 32768, LINUX, panic)


@pytest.mark.parametrize(
    ("habits", "size"), [(MACOS, 0), (LINUX, 67), (DPDK, 6146), (LINUX, 40000)]
)
def test_sections_that_a_driver_cannot_use_crash_it(habits, size):
    with pytest.raises(GuestPanic, match=f"sections of {size} bytes"):
        check_send_section(nvsp.build_send_buffer_complete(1, size), 32768, habits, panic)
    ok = nvsp.build_send_buffer_complete(nvsp.SUCCESS, 6144)
    assert check_send_section(ok, 32768, habits, panic) == (1, 6144)


def query(size, offset, data=b"", status=0):
    return struct.pack("<6I", 0x80000004, 24 + len(data), 1, status, size, offset) + data


def test_the_data_of_a_query_is_where_it_says():
    oid = oids.GEN_LINK_SPEED
    reply = rndis.build_query_reply(1, 0, b"1234")
    assert check_query_reply(reply, oid, 4, LINUX, panic).buffer == b"1234"
    far = query(4, 20, bytes(4) + b"5678")
    assert check_query_reply(far, oid, 4, LINUX, panic).buffer == b"5678"
    refused = query(4, 16, b"1234", rndis.STATUS_NOT_SUPPORTED)
    assert check_query_reply(refused, oid, 4, LINUX, panic).buffer == b""


@pytest.mark.parametrize(
    ("habits", "message", "reason"),
    [
        (LINUX, query(0, 0), "0 bytes at offset 0 of 16"),
        (LINUX, query(4, 16), "4 bytes at offset 16 of 16"),
        (LINUX, query(4, 12, bytes(4)), "offset 12"),
        (LINUX, query(5, 16, bytes(8)), "5 bytes, 4 were asked for"),
        (OPENBSD, query(4, 20, bytes(8)), "takes it from 16 on"),
        (LINUX, query(0, 16)[:20], "an answer of 20 bytes"),
    ],
)
def test_queries_that_are_answered_wrongly_crash_the_guest(habits, message, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_query_reply(message, oids.GEN_LINK_SPEED, 4, habits, panic)


@pytest.mark.parametrize("address", ["", "0015", "00155d010203ff", "01155d010203", "000000000000"])
def test_addresses_that_no_station_has_crash_the_guest(address):
    with pytest.raises(GuestPanic, match="hardware address"):
        check_address(bytes.fromhex(address), panic)
    assert check_address(bytes.fromhex("00155d010203"), panic)


def test_a_word_has_four_bytes():
    assert check_word(oids.GEN_LINK_SPEED, b"\1\0\0\0", panic) == 1
    with pytest.raises(GuestPanic, match="QUERY GEN_LINK_SPEED: 8 bytes"):
        check_word(oids.GEN_LINK_SPEED, bytes(8), panic)
    assert name_of(0x12345678) == "0x12345678"


def test_offload_capabilities_are_no_longer_than_the_revision_asked_for():
    some = ndis.OffloadCapabilities(tx_ipv4=ndis.CSUM_TCP, lso_max_size=9000)
    for revision in ndis.OFFLOAD_SIZES:
        data = ndis.build_offload_capabilities(some, revision)
        assert check_offloads(data, revision, panic) == some
    with pytest.raises(GuestPanic, match="revision 2 was asked for"):
        check_offloads(ndis.build_offload_capabilities(some, 3), 2, panic)
    with pytest.raises(GuestPanic, match="NDIS"):
        check_offloads(bytes(112), 1, panic)


def capabilities(flags=0x301, queues=4, entries=128):
    return ndis.build_rss_capabilities(ndis.RssCapabilities(flags, 1, queues, entries))


def test_scaling_capabilities_have_18_bytes():
    assert check_scaling(capabilities(), panic).queues == 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (capabilities() + bytes(2), "size 18 in 20"),
        (capabilities()[:16], "16 bytes"),
        (capabilities(queues=0), "no queues"),
        (capabilities(entries=0), "table of 0"),
        (capabilities(entries=100), "table of 100"),
        (capabilities(entries=256), "table of 256"),
        (capabilities(flags=0x300), "nothing to hash with"),
        (capabilities(flags=1), "nothing to hash with"),
        (bytes(18), "NDIS object 0x0"),
    ],
)
def test_other_scaling_capabilities_crash_the_guest(data, reason):
    with pytest.raises(GuestPanic, match=reason):
        check_scaling(data, panic)
