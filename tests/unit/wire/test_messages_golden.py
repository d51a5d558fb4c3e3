"""Control messages as bytes that were written by hand from the published structures."""

from __future__ import annotations

import dataclasses
from uuid import UUID

import pytest

from vmbus.errors import GuestProtocolError
from vmbus.wire import messages as m
from vmbus.wire.messages import Direction, build_message, parse_message_untrusted
from vmbus.wire.versions import Feature, Version

H2G = Direction.HOST_TO_GUEST
G2H = Direction.GUEST_TO_HOST
SCSI = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")


INSTANCE = UUID("00112233-4455-6677-8899-aabbccddeeff")


def test_golden_offer():
    user = bytes([4]) + bytes(119)
    expected = bytes.fromhex(
        "01000000 00000000"
        "d96361ba a104 294d b605 72e2ffb1dc7f"
        "33221100 5544 7766 8899 aabbccddeeff"
        "00000000 00000000 00000000 00000000"
        "1100 8000" + user.hex() + "0300 0201 05000000 07 01 0100 05200000"
    )
    assert len(expected) == 196
    message = m.OfferChannel(
        class_id=SCSI,
        instance_id=INSTANCE,
        flags=m.OFFER_ENUMERATE | m.OFFER_NAMED_PIPE_MODE,
        mmio_megabytes=128,
        user_defined=user,
        subchannel_index=3,
        mmio_megabytes_optional=0x102,
        relid=5,
        monitor_id=7,
        monitor_allocated=True,
        connection_id=0x2005,
    )
    assert build_message(message, version=Version.V5_3) == expected
    assert parse_message_untrusted(expected, direction=H2G, version=Version.V5_3) == message


def test_golden_open_channel_with_and_without_signal_parameters():
    body = "05000000 00000000 05000000 00000000 10e1e100 02000000 20000000" + "ab" * 120
    message = m.OpenChannel(
        relid=5,
        open_id=0,
        ring_gpadl=0xE1E110,
        target_vp=2,
        downstream_page_offset=32,
        user_data=b"\xab" * 120,
    )
    old = bytes.fromhex(body)
    assert len(old) == 148
    assert build_message(message, version=Version.V5_3) == old
    assert parse_message_untrusted(old, direction=G2H, version=Version.V5_3) == message
    new = bytes.fromhex(body + "05200000 0500 0100")
    extended = dataclasses.replace(message, connection_id=0x2005, event_flag=5, open_flags=1)
    signals = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    assert build_message(extended, version=Version.V6_0, features=signals) == new
    assert (
        parse_message_untrusted(new, direction=G2H, version=Version.V6_0, features=signals)
        == extended
    )
    # Without the feature the same 156 bytes are an old message with something behind it.
    assert parse_message_untrusted(new, direction=G2H, version=Version.V6_0) == message


def test_golden_gpadl_header_and_body():
    header = bytes.fromhex(
        "08000000 00000000 07000000 10e1e100 1800 0100"
        "00200000 00000000 4523010000000000 4623010000000000"
    )
    message = m.GpadlHeader(
        relid=7, gpadl=0xE1E110, range_buflen=24, range_count=1, data=header[20:]
    )
    assert parse_message_untrusted(header, direction=G2H, version=Version.V0_13) == message
    assert build_message(message, version=Version.V0_13) == header
    body = bytes.fromhex("09000000 00000000 01000000 10e1e100 4723010000000000")
    part = m.GpadlBody(message_number=1, gpadl=0xE1E110, data=body[16:])
    assert parse_message_untrusted(body, direction=G2H, version=Version.V0_13) == part
    assert build_message(part, version=Version.V0_13) == body


def test_golden_contact_with_an_interrupt_page():
    data = bytes.fromhex(
        "0e000000 00000000 04000200 00000000 0030120000000000 0040120000000000 0050120000000000"
    )
    contact = parse_message_untrusted(data, direction=G2H, version=None)
    assert contact == m.InitiateContact(
        version=0x2_0004,
        target_vp=0,
        target_info=0x123000,
        monitor_page_1=0x124000,
        monitor_page_2=0x125000,
    )
    assert contact.interrupt_page == 0x123000
    assert build_message(contact, version=None) == data


def test_golden_contact_with_sint_vtl_features_and_client():
    data = bytes.fromhex(
        "0e000000 00000000 00000600 03000000 02 01 5a5a ff0000c0"
        "0040120000000000 0050120000000000"
        "33221100 5544 7766 8899 aabbccddeeff"
    )
    contact = parse_message_untrusted(data, direction=G2H, version=None)
    assert isinstance(contact, m.InitiateContact)
    assert (contact.version, contact.target_vp) == (0x6_0000, 3)
    assert (contact.target_sint, contact.target_vtl) == (2, 1)
    assert contact.feature_flags == Feature(0xFF), "unknown feature bits are ignored"
    assert contact.client_id == INSTANCE
    assert build_message(contact, version=None) == data
    # 16 more bytes are a client id, 15 are not.
    short = parse_message_untrusted(data[:-1], direction=G2H, version=None)
    assert short == dataclasses.replace(contact, client_id=None)


def test_golden_version_responses():
    plain = bytes.fromhex("0f000000 00000000 01 00 0000 04000000")
    answer = m.VersionResponse(version_supported=True, message_connection_id=4)
    assert build_message(answer, version=Version.V5_3) == plain
    with_features = dataclasses.replace(answer, supported_features=0x2F)
    assert build_message(with_features, version=Version.V6_0) == plain + bytes.fromhex("2f000000")
    pages = dataclasses.replace(
        with_features, host_monitor_page_1=0x1000, host_monitor_page_2=0x2000
    )
    longest = plain + bytes.fromhex("2f000000 00000000 0010000000000000 0020000000000000")
    feature = Feature.SERVER_SPECIFIED_MONITOR_PAGES
    assert build_message(pages, version=Version.V6_0, features=feature) == longest
    for message, length in ((answer, 16), (with_features, 20), (pages, 40)):
        # A host answers in the longest layout it has something to say in; the other side sees
        # which one from the size.
        assert (
            parse_message_untrusted(
                longest[:length], direction=H2G, version=Version.V6_0, features=feature
            )
            == message
        )


def test_golden_refusal_of_a_version():
    refusal = m.VersionResponse(version_supported=False)
    assert build_message(refusal, version=None) == bytes.fromhex("0f00000000000000") + bytes(8)


def test_golden_replies():
    version = Version.V5_3
    assert build_message(
        m.OpenChannelResult(relid=1, open_id=0xFFFFFFFF, status=0xC0000001), version=version
    ) == bytes.fromhex("06000000 00000000 01000000 ffffffff 010000c0")
    assert build_message(
        m.GpadlCreated(relid=1, gpadl=0xE1E10, status=0), version=version
    ) == bytes.fromhex("0a000000 00000000 01000000 101e0e00 00000000")
    assert build_message(m.GpadlTorndown(gpadl=0xE1E10), version=version) == bytes.fromhex(
        "0c000000 00000000 101e0e00"
    )
    assert build_message(
        m.ModifyChannelResponse(relid=3, status=0), version=version
    ) == bytes.fromhex("18000000 00000000 03000000 00000000")
    assert build_message(m.RescindChannelOffer(relid=2047), version=version) == bytes.fromhex(
        "02000000 00000000 ff070000"
    )
    assert build_message(m.AllOffersDelivered(), version=version) == b"\4" + bytes(7)
    assert build_message(m.UnloadResponse(), version=version) == b"\x11" + bytes(7)
    assert build_message(
        m.ModifyConnectionResponse(connection_state=1),
        version=Version.V6_0,
        features=Feature.MODIFY_CONNECTION,
    ) == bytes.fromhex("1a000000 00000000 01")


def test_golden_connect_requests_of_hv_sock():
    data = bytes.fromhex("15000000 00000000") + INSTANCE.bytes_le + SCSI.bytes_le
    old = m.TlConnectRequest(endpoint_id=INSTANCE, service_id=SCSI)
    assert parse_message_untrusted(data, direction=G2H, version=Version.V5_1) == old
    assert build_message(old, version=Version.V5_1) == data
    new = m.TlConnectRequest(endpoint_id=INSTANCE, service_id=SCSI, silo_id=INSTANCE)
    assert (
        parse_message_untrusted(data + INSTANCE.bytes_le, direction=G2H, version=Version.V5_2)
        == new
    )
    for version in (Version.V5_2, Version.V5_3, Version.V6_0):
        # As Linux sends it, whatever the version.
        assert parse_message_untrusted(data, direction=G2H, version=version) == old
        assert build_message(old, version=version) == data
    with pytest.raises(GuestProtocolError):
        parse_message_untrusted(data[:-1], direction=G2H, version=Version.V5_2)
