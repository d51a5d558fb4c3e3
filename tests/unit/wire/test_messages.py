"""Control messages: sizes, gates, golden bytes, and what is refused.

The expectations here were written down from the published structures, not from the table under
test: bytes of each message, and the version or feature it arrived with.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any
from uuid import UUID

import pytest

from vmbus.errors import GuestProtocolError, LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.messages import Direction, Message, build_message, parse_message_untrusted
from vmbus.wire.versions import NO_FEATURES, Feature, Version

ANY = 0
"""Stands for "also without a connection" in GATES."""
H2G = Direction.HOST_TO_GUEST
G2H = Direction.GUEST_TO_HOST

# number: name, direction, first version, features of which one is needed
GATES: dict[int, tuple[str, Direction, int, int]] = {
    1: ("OFFERCHANNEL", H2G, 0xD, 0),
    2: ("RESCIND_CHANNELOFFER", H2G, 0xD, 0),
    3: ("REQUESTOFFERS", G2H, 0xD, 0),
    4: ("ALLOFFERS_DELIVERED", H2G, 0xD, 0),
    5: ("OPENCHANNEL", G2H, 0xD, 0),
    6: ("OPENCHANNEL_RESULT", H2G, 0xD, 0),
    7: ("CLOSECHANNEL", G2H, 0xD, 0),
    8: ("GPADL_HEADER", G2H, 0xD, 0),
    9: ("GPADL_BODY", G2H, 0xD, 0),
    10: ("GPADL_CREATED", H2G, 0xD, 0),
    11: ("GPADL_TEARDOWN", G2H, 0xD, 0),
    12: ("GPADL_TORNDOWN", H2G, 0xD, 0),
    13: ("RELID_RELEASED", G2H, 0xD, 0),
    14: ("INITIATE_CONTACT", G2H, ANY, 0),
    15: ("VERSION_RESPONSE", H2G, ANY, 0),
    16: ("UNLOAD", G2H, 0xD, 0),
    17: ("UNLOAD_RESPONSE", H2G, 0x1_0001, 0),
    18: ("OPEN_RESERVED_CHANNEL", G2H, 0x4_0000, 0),
    19: ("CLOSE_RESERVED_CHANNEL", G2H, ANY, 0),
    20: ("CLOSE_RESERVED_RESPONSE", H2G, ANY, 0),
    21: ("TL_CONNECT_REQUEST", G2H, 0x4_0000, 0),
    22: ("MODIFYCHANNEL", G2H, 0x4_0001, 0),
    23: ("TL_CONNECT_RESULT", H2G, 0x4_0001, 0),
    24: ("MODIFYCHANNEL_RESPONSE", H2G, 0x5_0003, 0),
    25: ("MODIFY_CONNECTION", G2H, 0x6_0000, 0x04),
    26: ("MODIFY_CONNECTION_RESPONSE", H2G, 0x6_0000, 0x04),
    27: ("PAUSE", G2H, 0x6_0000, 0x20),
    28: ("PAUSE_RESPONSE", H2G, 0x6_0000, 0x20),
    29: ("RESUME", G2H, 0x6_0000, 0x20),
}
# Bytes of each message where it has one size only.
SIZES = {
    1: 196,
    2: 12,
    3: 8,
    4: 8,
    6: 20,
    7: 12,
    8: 20,
    9: 16,
    10: 20,
    11: 16,
    12: 12,
    13: 12,
    14: 40,
    16: 8,
    17: 8,
    18: 28,
    19: 20,
    20: 12,
    22: 16,
    23: 44,
    24: 16,
    25: 24,
    26: 9,
    27: 8,
    28: 8,
    29: 8,
}


def size_of(number: int, version: Version | None, features: Feature) -> int:
    """Say how long a message that is part of the version has to be."""
    if number == 5:
        return 156 if version == Version.V6_0 and features & Feature(0x03) else 148
    if number == 15:
        if version != Version.V6_0:
            return 16
        return 40 if features & Feature(0x40) else 20
    if number == 21:
        return 56 if version is not None and version >= Version.V5_2 else 40
    return SIZES[number]


VERSIONS: tuple[Version | None, ...] = (None, *Version)
FEATURE_SETS = (NO_FEATURES, *Feature, Feature(0x03), Feature(0xFB), Feature(0xFF))
CLASSES: dict[int, type[Message]] = {spec.message.TYPE: spec.message for spec in m.MESSAGES}
CONNECTIONS = list(product(VERSIONS, FEATURE_SETS))


def is_part_of(number: int, version: Version | None, features: Feature) -> bool:
    _name, _direction, first, needed = GATES[number]
    if first == ANY:
        return True
    return version is not None and version >= first and (not needed or bool(features & needed))


def sample(number: int) -> Message:
    """Return a message whose every field is filled with something to be recognised."""
    kind = CLASSES[number]
    values: dict[str, Any] = {}
    for position, field in enumerate(dataclasses.fields(kind), 1):  # type: ignore[arg-type]
        annotation = str(field.type)
        if "UUID" in annotation:
            values[field.name] = UUID(
                int=0x0123456789ABCDEF_0123456789ABCDEF * position % (1 << 128)
            )
        elif annotation == "bool":
            values[field.name] = True
        elif annotation == "bytes":
            values[field.name] = bytes(range(120))
        else:
            values[field.name] = position
    return kind(**values)


@pytest.mark.parametrize("number", GATES)
def test_every_message_has_the_name_and_direction_of_the_specification(number):
    name, direction, _first, _needed = GATES[number]
    rows = [spec for spec in m.MESSAGES if number == spec.message.TYPE]
    assert rows
    assert {spec.direction for spec in rows} == {direction}
    assert {spec.message.NAME for spec in rows} == {name}
    assert m.message_name(number) == name


def test_there_are_29_messages_and_no_other():
    assert sorted({spec.message.TYPE for spec in m.MESSAGES}) == list(range(1, 30))
    assert m.message_name(0) == "type 0"
    assert m.message_name(30) == "type 30"


@pytest.mark.parametrize("number", GATES)
def test_a_message_is_parsed_exactly_where_its_version_and_features_allow_it(number):
    direction = GATES[number][1]
    for version, features in CONNECTIONS:
        data = number.to_bytes(8, "little") + bytes(232)
        if is_part_of(number, version, features):
            parsed = parse_message_untrusted(
                data, direction=direction, version=version, features=features
            )
            assert type(parsed) is CLASSES[number]
        else:
            with pytest.raises(GuestProtocolError, match="is not part of") as caught:
                parse_message_untrusted(
                    data, direction=direction, version=version, features=features
                )
            assert caught.value.field == "type"


@pytest.mark.parametrize("number", GATES)
def test_a_message_is_built_exactly_where_its_version_and_features_allow_it(number):
    message = sample(number)
    extra = {8: 120, 9: 120, 14: 16}.get(number, 0)
    for version, features in CONNECTIONS:
        if is_part_of(number, version, features):
            data = build_message(message, version=version, features=features)
            assert len(data) == size_of(number, version, features) + extra
            assert data[:8] == number.to_bytes(8, "little")
        else:
            with pytest.raises(LocalProtocolError, match="is not part of"):
                build_message(message, version=version, features=features)


@pytest.mark.parametrize("number", GATES)
def test_a_message_comes_back_as_it_was_built_on_every_connection_that_has_it(number):
    message = sample(number)
    for version, features in CONNECTIONS:
        if not is_part_of(number, version, features):
            continue
        data = build_message(message, version=version, features=features)
        parsed = parse_message_untrusted(
            data, direction=GATES[number][1], version=version, features=features
        )
        # What the connection's layout does not have comes back as its default.
        for field in dataclasses.fields(message):  # type: ignore[arg-type]
            got = getattr(parsed, field.name)
            assert got in {getattr(message, field.name), field.default}
        assert build_message(parsed, version=version, features=features) == data


@pytest.mark.parametrize("number", GATES)
def test_one_byte_less_than_the_size_is_refused_and_everything_up_to_240_accepted(number):
    direction = GATES[number][1]
    for version, features in CONNECTIONS:
        if not is_part_of(number, version, features):
            continue
        # Another party may answer VERSION_RESPONSE in the oldest layout whatever was asked for.
        # And a guest leaves the silo out of TL_CONNECT_REQUEST as it likes.
        needed = {15: 16, 21: 40}.get(number) or size_of(number, version, features)
        head = number.to_bytes(4, "little")
        with pytest.raises(GuestProtocolError) as caught:
            parse_message_untrusted(
                head + bytes(needed - 5), direction=direction, version=version, features=features
            )
        assert caught.value.field == "size"
        for length in (needed, needed + 1, 239, 240):
            parsed = parse_message_untrusted(
                head + bytes(length - 4), direction=direction, version=version, features=features
            )
            assert type(parsed) is CLASSES[number]


@pytest.mark.parametrize("length", [0, 1, 4, 7, 241, 4096])
def test_no_message_is_shorter_than_its_header_or_longer_than_240_bytes(length):
    with pytest.raises(GuestProtocolError) as caught:
        parse_message_untrusted(
            (b"\x03" + bytes(length))[:length], direction=G2H, version=Version.V5_3
        )
    assert caught.value.field == "size"


@pytest.mark.parametrize("number", [0, 30, 255, 256 + 3, 0x0300_0000, 0xFFFF_FFFF])
def test_an_unknown_number_is_refused_and_all_32_bits_of_it_count(number):
    data = number.to_bytes(4, "little") + bytes(236)
    with pytest.raises(GuestProtocolError) as caught:
        parse_message_untrusted(data, direction=G2H, version=Version.V6_0, features=Feature(0xFF))
    assert caught.value.field == "type"


@pytest.mark.parametrize("number", GATES)
def test_a_guest_cannot_send_the_messages_of_the_host_nor_the_host_those_of_a_guest(number):
    wrong = H2G if GATES[number][1] is G2H else G2H
    with pytest.raises(GuestProtocolError, match="never goes from") as caught:
        parse_message_untrusted(
            number.to_bytes(240, "little"),
            direction=wrong,
            version=Version.V6_0,
            features=Feature(0xFF),
        )
    assert caught.value.field == "type"


# -- garbage and padding ---------------------------------------------------------------------------


def test_header_padding_and_reserved_bytes_may_hold_anything():
    """Checklist row 31: macOS leaves stack contents there."""
    for message, reserved, version in (
        (sample(1), range(40, 56), Version.V5_3),
        (sample(7), (), Version.V5_3),
        (sample(14), (), None),
        (m.VersionResponse(version_supported=True), (10, 11), Version.V5_3),
    ):
        clean = build_message(message, version=version)
        dirty = bytearray(clean)
        for position in (4, 5, 6, 7, *reserved):
            dirty[position] = 0xA5
        assert (
            parse_message_untrusted(bytes(dirty), direction=GATES[message.TYPE][1], version=version)
            == message
        )


def test_flag_fields_ignore_the_bits_that_mean_nothing():
    data = bytearray(build_message(sample(1), version=Version.V5_3))
    data[189] = 0xFE
    data[190:192] = b"\xfe\xff"
    offer = parse_message_untrusted(bytes(data), direction=H2G, version=Version.V5_3)
    assert isinstance(offer, m.OfferChannel)
    assert (offer.monitor_allocated, offer.is_dedicated_interrupt) == (False, False)
    answer = bytearray(16)
    answer[0], answer[8] = 15, 0x80
    response = parse_message_untrusted(bytes(answer), direction=H2G, version=None)
    assert isinstance(response, m.VersionResponse)
    assert response.version_supported is True


@pytest.mark.parametrize("number", sorted(set(GATES) - {8, 9, 14}))
def test_messages_padded_to_240_bytes_mean_the_same(number):
    """Checklist row 31: UEFI posts 240 bytes whatever is in them."""
    message = sample(number)
    version, features = Version.V6_0, Feature(0xFF)
    data = build_message(message, version=version, features=features)
    padded = data + b"\xee" * (240 - len(data))
    assert (
        parse_message_untrusted(
            padded, direction=GATES[number][1], version=version, features=features
        )
        == message
    )


def test_what_follows_a_gpadl_header_is_handed_on_with_its_junk():
    data = b"\x08" + bytes(15) + b"\x18\0\1\0" + b"\xee" * 220
    header = parse_message_untrusted(data, direction=G2H, version=Version.V3_0)
    assert isinstance(header, m.GpadlHeader)
    assert header.data == b"\xee" * 220
    assert len(header.data) == m.GPADL_HEADER_DATA
    data = b"\x09" + bytes(15) + b"\xee" * 224
    body = parse_message_untrusted(data, direction=G2H, version=Version.V3_0)
    assert isinstance(body, m.GpadlBody)
    assert len(body.data) == m.GPADL_BODY_DATA


# -- what cannot be built --------------------------------------------------------------------------

OFFER = sample(1)


@pytest.mark.parametrize(
    "message",
    [
        m.RescindChannelOffer(relid=-1),
        m.RescindChannelOffer(relid=1 << 32),
        m.GpadlHeader(relid=1, gpadl=1, range_buflen=1 << 16, range_count=1, data=b""),
        m.ModifyConnectionResponse(connection_state=256),
        dataclasses.replace(OFFER, user_defined=bytes(119)),  # type: ignore[type-var]
        dataclasses.replace(OFFER, user_defined=bytes(121)),  # type: ignore[type-var]
        dataclasses.replace(OFFER, class_id="no guid"),  # type: ignore[type-var]
        dataclasses.replace(OFFER, monitor_id="7"),  # type: ignore[type-var]
    ],
)
def test_a_value_that_does_not_fit_is_our_own_mistake(message):
    with pytest.raises(LocalProtocolError, match="cannot be written"):
        build_message(message, version=Version.V6_0, features=Feature(0xFF))


def test_range_data_that_does_not_fit_is_our_own_mistake():
    for size, fits in ((220, True), (221, False)):
        message = m.GpadlHeader(relid=1, gpadl=1, range_buflen=24, range_count=1, data=bytes(size))
        if fits:
            assert len(build_message(message, version=Version.V5_3)) == 240
        else:
            with pytest.raises(LocalProtocolError, match="240 fit"):
                build_message(message, version=Version.V5_3)


def test_a_refusal_can_leave_out_what_a_newer_layout_has():
    refusal = m.VersionResponse(version_supported=False)
    features = Feature.SERVER_SPECIFIED_MONITOR_PAGES
    assert len(build_message(refusal, version=Version.V6_0, features=features)) == 16


def test_a_guest_has_to_use_the_layout_of_its_connection():
    message = m.OpenChannel(relid=1, open_id=1, ring_gpadl=1, target_vp=0, downstream_page_offset=2)
    with pytest.raises(LocalProtocolError, match="connection_id"):
        build_message(
            message,
            version=Version.V6_0,
            features=Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS,
        )


def test_messages_cannot_be_changed_and_carry_nothing_else():
    message = m.RescindChannelOffer(relid=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.relid = 2  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(message, "extra", 1)
