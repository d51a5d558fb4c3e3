"""RNDIS requests: how a driver finds the answer that is due, and which it takes."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from netvsp.guest import RndisError
from netvsp.wire import nvsp, oids, rndis
from tests.support.fake_nic_host import ADDRESS, plugged
from vmbus.guest import DPDK, FREEBSD, LINUX_6_1, OPENBSD, GuestPanic

settle = trio.testing.wait_all_tasks_blocked
OID = oids.GEN_VENDOR_DESCRIPTION


def status_reply(kind: int, status: int = 0) -> bytes:
    return rndis.build_status_reply(kind, 0, status)


def query_reply(data: bytes, number: int = 0) -> bytes:
    return rndis.build_query_reply(number, rndis.STATUS_SUCCESS, data)


async def test_any_object_can_be_asked_for_and_set():
    async with plugged() as (adapter, nic):
        nic.objects[OID] = b"somebody"
        assert await adapter.query(OID) == b"somebody"
        assert await adapter.query(oids.E802_3_CURRENT_ADDRESS, room=6) == ADDRESS
        await adapter.set(oids.GEN_CURRENT_LOOKAHEAD, b"\1\2\3\4")
        assert nic.sets[-1] == (oids.GEN_CURRENT_LOOKAHEAD, b"\1\2\3\4")
        await adapter.keepalive()
        assert nic.log[-1] == "KEEPALIVE"


async def test_what_the_device_refuses():
    async with plugged() as (adapter, nic):
        with pytest.raises(
            RndisError, match=r"QUERY 0x00010123: RNDIS status 0xc00000bb"
        ) as caught:
            await adapter.query(0x00010123)
        assert caught.value.status == rndis.STATUS_NOT_SUPPORTED
        nic.statuses[OID] = rndis.STATUS_INVALID_DATA
        with pytest.raises(RndisError, match="SET GEN_VENDOR_DESCRIPTION"):
            await adapter.set(OID, b"")
        nic.replies[rndis.KEEPALIVE] = [status_reply(rndis.KEEPALIVE, rndis.STATUS_FAILURE)]
        with pytest.raises(RndisError, match="KEEPALIVE: RNDIS status 0xc0000001"):
            await adapter.keepalive()


async def test_the_answer_may_come_before_the_completion():
    """Both are waited for, and the page of the request is free after the completion."""
    async with plugged() as (adapter, nic):
        channel = nic.host.channels[1]

        def late(channel, packet, answer=nic.packet):
            channel.send, send = (lambda *rest: completions.append(rest)), channel.send
            try:
                answer(channel, packet)
            finally:
                channel.send = send

        completions: list[tuple[int, bytes, int]] = []
        nic.host.on_packet = late
        nic.objects[OID] = b"x"
        done = []

        async def ask():
            done.append(await adapter.query(OID))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            assert done == []
            nic.host.on_packet = nic.packet
            for rest in completions:
                channel.send(*rest)
        assert done == [b"x"]


async def test_requests_are_answered_in_any_order():
    async with plugged() as (adapter, nic):
        nic.replies[OID] = [b""]
        nic.replies[oids.GEN_DRIVER_VERSION] = [b""]
        answers = {}

        async def ask(oid):
            answers[oid] = await adapter.query(oid)

        async with trio.open_nursery() as nursery:
            for oid in (OID, oids.GEN_DRIVER_VERSION):
                nursery.start_soon(ask, oid)
                await settle()
            first, second = nic.control_ids[-2:]
            nic.deliver([query_reply(b"second", second), query_reply(b"first", first)])
        assert answers == {OID: b"first", oids.GEN_DRIVER_VERSION: b"second"}


async def test_the_late_answer_of_a_request_that_was_given_up():
    async with plugged() as (adapter, nic):
        nic.replies[OID] = [b""]
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adapter.query, OID)
                await settle()
                scope.cancel()
        nic.deliver([query_reply(b"late", nic.control_ids[-1])])
        await settle()
        del nic.replies[OID]
        nic.objects[OID] = b"new"
        assert await adapter.query(OID) == b"new"


@pytest.mark.parametrize(
    ("personality", "messages", "reason"),
    [
        (LINUX_6_1, [query_reply(b"", 77)], "RNDIS QUERY_CMPLT: there is no request 0x4d"),
        (LINUX_6_1, [query_reply(b"x"), query_reply(b"x")], "QUERY_CMPLT: there is no request"),
        (LINUX_6_1, [status_reply(rndis.SET)], "SET_CMPLT: the answer to .* is QUERY_CMPLT"),
        (
            LINUX_6_1,
            [struct.pack("<IIII", rndis.RESET | rndis.COMPLETE, 16, 0, 0)],
            "RESET_CMPLT: nobody has asked",
        ),
        (LINUX_6_1, [struct.pack("<IIII", rndis.KEEPALIVE, 16, 9, 0)], "RNDIS KEEPALIVE: rndis_"),
        (LINUX_6_1, [struct.pack("<IIII", rndis.HALT, 16, 9, 0)], "RNDIS HALT: rndis_"),
        (LINUX_6_1, [struct.pack("<IIII", 0x99, 16, 9, 0)], "RNDIS 0x00000099: rndis_"),
        (
            LINUX_6_1,
            [struct.pack("<IIII", 0x80000099, 16, 9, 0)],
            "RNDIS 0x80000099: rndis_",
        ),
        (LINUX_6_1, [struct.pack("<IIII", rndis.QUERY | rndis.COMPLETE, 16, 0, 0)], "of 16 bytes"),
        (LINUX_6_1, [query_reply(bytes(65))], "65 bytes, 64 were asked for"),
        (DPDK, [query_reply(bytes(240))], "QUERY_CMPLT of 264 bytes, there is room for 256"),
        (OPENBSD, [query_reply(bytes(520))], "QUERY_CMPLT of 544 bytes, there is room for 536"),
    ],
    ids=str,
)
async def test_an_answer_that_the_driver_does_not_take(personality, messages, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged(personality) as (adapter, nic):
            nic.replies[OID] = messages
            await adapter.query(OID, room=64)
            await settle()


async def test_the_answer_comes_on_the_first_channel():
    with pytest.raises(GuestPanic, match="RNDIS QUERY_CMPLT on channel 1: hn_rndis_exec1"):
        async with plugged(vps=2) as (adapter, nic):
            await adapter.up()
            await settle()
            nic.deliver([query_reply(b"", 1)], relid=10)
            await settle()


@pytest.mark.parametrize("kind", [rndis.SET, rndis.KEEPALIVE])
async def test_an_answer_without_a_status(kind):
    with pytest.raises(GuestPanic, match="an answer of 12 bytes"):
        async with plugged() as (adapter, nic):
            key = OID if kind == rndis.SET else kind
            nic.replies[key] = [struct.pack("<III", kind | rndis.COMPLETE, 12, 0)]
            await (adapter.set(OID, b"") if kind == rndis.SET else adapter.keepalive())


async def test_a_request_that_the_device_did_not_take():
    with pytest.raises(GuestPanic, match="completed with NVSP status 2"):
        async with plugged(FREEBSD) as (adapter, nic):
            nic.answers[nvsp.SEND_RNDIS_PACKET] = nvsp.build_rndis_packet_complete(nvsp.FAILURE)
            await adapter.keepalive()


@pytest.mark.parametrize("how", ["close", "rescind"])
async def test_who_waits_for_an_answer_is_told_of_the_end(how):
    error = trio.ClosedResourceError if how == "close" else trio.BrokenResourceError
    async with plugged() as (adapter, nic):
        nic.replies[OID] = [b""]

        async def ask():
            with pytest.raises(error):
                await adapter.query(OID)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            if how == "close":
                await adapter.close()
            else:
                nic.host.rescind(1)
        with pytest.raises(error):
            await adapter.query(OID)
