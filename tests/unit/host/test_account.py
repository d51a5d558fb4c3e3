"""What ``vmbus serve -vv`` says of each control message."""

from __future__ import annotations

import logging

import pytest

from tests.support.worlds import EchoDevice, RawGuest, world
from vmbus.host.account import describe_untrusted
from vmbus.wire import messages as m
from vmbus.wire.versions import Version


def describe(message: m.Message, version: Version | None, direction: m.Direction) -> str:
    payload = m.build_message(message, version=version)
    return describe_untrusted(payload, direction=direction, version=version)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vmbus.bus.account"]


async def test_both_sides_of_a_conversation_are_written_down_in_order(caplog):
    caplog.set_level(logging.DEBUG, "vmbus.bus.account")
    async with world(EchoDevice(1)) as there:
        guest = RawGuest(there)
        await guest.contact(Version.V4_1)
        await guest.post(m.RequestOffers())
        await guest.post(m.GpadlTeardown(relid=1, gpadl=0xE1E10))
        await guest.post(m.Unload())

    name = there.transport.name
    assert [line.partition(" class_id")[0] for line in lines(caplog)] == [
        f"{name}: guest: INITIATE_CONTACT version=4.1 target_vp=0 target_info=0x10000"
        " monitor_page_1=0x11000 monitor_page_2=0x12000",
        f"{name}: host: VERSION_RESPONSE version_supported=1 connection_state=0"
        " message_connection_id=1",
        f"{name}: guest: REQUESTOFFERS",
        f"{name}: host: OFFERCHANNEL",
        f"{name}: host: ALLOFFERS_DELIVERED",
        f"{name}: guest: GPADL_TEARDOWN relid=1 gpadl=0xe1e10",
        f"{name}: host: GPADL_TORNDOWN gpadl=0xe1e10",
        f"{name}: guest: UNLOAD",
        f"{name}: host: UNLOAD_RESPONSE",
    ]


async def test_nothing_is_written_down_that_nobody_wants(caplog):
    caplog.set_level(logging.INFO)
    async with world() as there:
        await RawGuest(there).contact()

    assert lines(caplog) == []


def test_a_message_of_another_version_is_described_all_the_same():
    message = m.ModifyChannelResponse(relid=1, status=0)
    payload = m.build_message(message, version=Version.V5_3)

    text = describe_untrusted(payload, direction=m.Direction.HOST_TO_GUEST, version=Version.V4_0)

    assert text == "MODIFYCHANNEL_RESPONSE relid=1 status=0"


def test_long_data_is_counted_and_not_shown():
    message = m.GpadlBody(message_number=3, gpadl=0x10, data=bytes(16))

    text = describe(message, Version.V5_3, m.Direction.GUEST_TO_HOST)

    assert text == "GPADL_BODY message_number=3 gpadl=0x10 data=16B"


def test_a_version_that_nobody_knows_is_a_number():
    message = m.InitiateContact(
        version=9, target_vp=0, target_info=0, monitor_page_1=0, monitor_page_2=0
    )

    assert " version=9 " in describe(message, None, m.Direction.GUEST_TO_HOST)


def test_what_is_no_message_is_said_to_be_none():
    for payload, start in (
        (b"", "type 0, not readable: control message of 0 bytes"),
        ((5).to_bytes(8, "little"), "OPENCHANNEL, not readable: "),
        ((99).to_bytes(8, "little"), "type 99, not readable: "),
    ):
        text = describe_untrusted(
            payload, direction=m.Direction.GUEST_TO_HOST, version=Version.V5_3
        )
        assert text.startswith(start)
