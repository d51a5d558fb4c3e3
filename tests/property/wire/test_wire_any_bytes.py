"""Arbitrary bytes: only GuestProtocolError may escape, and what is accepted is in bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import given, settings, strategies as st

from vmbus.errors import GuestProtocolError, LocalProtocolError
from vmbus.host.account import describe_untrusted
from vmbus.wire import gpa, packets as p
from vmbus.wire.messages import (
    Direction,
    GpadlBody,
    GpadlHeader,
    InitiateContact,
    build_message,
    parse_message_untrusted,
)
from vmbus.wire.versions import Feature, Version

T = TypeVar("T")


def attempt(parse: Callable[..., T], *args: Any, **options: Any) -> T | GuestProtocolError:
    """Call a parser; its refusal is a result too. Whatever else it raises fails the test."""
    try:
        return parse(*args, **options)
    except GuestProtocolError as error:
        return error


versions = st.none() | st.sampled_from(Version)
features = st.integers(0, 0xFF).map(Feature)
directions = st.sampled_from(Direction)
known = st.integers(0, 31).map(lambda number: number.to_bytes(4, "little"))
message_bytes = st.binary(max_size=300) | st.builds(bytes.__add__, known, st.binary(max_size=260))


@given(message_bytes, directions, versions, features)
@settings(max_examples=500)
def test_any_bytes_are_a_message_or_refused(data, direction, version, feature_set):
    message = attempt(
        parse_message_untrusted, data, direction=direction, version=version, features=feature_set
    )
    if isinstance(message, GuestProtocolError):
        assert message.field in {"size", "type"}
        return
    rebuilt = build_message(message, version=version, features=feature_set)
    assert len(rebuilt) <= len(data)
    again = parse_message_untrusted(
        rebuilt, direction=direction, version=version, features=feature_set
    )
    assert again == message
    if isinstance(message, GpadlHeader | GpadlBody):
        assert rebuilt[8:] == data[8:]


@given(message_bytes, directions, versions, features)
def test_any_bytes_can_be_described_in_one_line(data, direction, version, feature_set):
    text = describe_untrusted(data, direction=direction, version=version, features=feature_set)

    assert text
    assert text.isprintable()


@given(st.binary(min_size=32, max_size=232))
def test_any_contact_can_be_asked_for_its_meanings(body):
    message = parse_message_untrusted(
        (14).to_bytes(8, "little") + body, direction=Direction.GUEST_TO_HOST, version=None
    )
    assert isinstance(message, InitiateContact)
    assert message.interrupt_page == int.from_bytes(body[8:16], "little")
    assert message.target_sint == body[8]
    assert message.target_vtl == body[9]
    assert int(message.feature_flags) == body[12]


@given(message_bytes, directions, versions, features, versions, features)
def test_a_message_of_one_connection_is_built_for_another_or_refused(
    data, direction, version, feature_set, other_version, other_features
):
    with contextlib.suppress(GuestProtocolError):
        message = parse_message_untrusted(
            data, direction=direction, version=version, features=feature_set
        )
        with contextlib.suppress(LocalProtocolError):
            built = build_message(message, version=other_version, features=other_features)
            again = parse_message_untrusted(
                built, direction=direction, version=other_version, features=other_features
            )
            assert type(again) is type(message)


small = st.integers(0, 6).map(lambda value: value.to_bytes(2, "little"))
descriptors = st.builds(
    lambda kind, offset8, length8, rest: kind + offset8 + length8 + rest,
    small,
    small,
    small,
    st.binary(max_size=40),
)


@given(st.binary(max_size=64) | descriptors, st.integers(0, 64))
def test_any_bytes_are_a_descriptor_or_refused(data, start):
    try:
        _kind, offset, length, flags, transaction_id = p.parse_descriptor_untrusted(data, start)
    except GuestProtocolError:
        return
    assert 16 <= offset <= length <= p.MAX_PACKET
    assert 0 <= flags <= 0xFFFF
    assert 0 <= transaction_id < 1 << 64


counts = st.integers(0, 5).map(lambda value: value.to_bytes(4, "little"))
lengths = st.integers(0, 9000).map(lambda value: value.to_bytes(4, "little"))
offsets = st.integers(0, 4200).map(lambda value: value.to_bytes(4, "little"))
plausible_range = st.builds(lambda a, b, c: a + b + c, lengths, offsets, st.binary(max_size=24))
plausible_ranges = st.builds(
    lambda head, count, ranges: head + count + b"".join(ranges),
    st.binary(min_size=20, max_size=20),
    counts,
    st.lists(plausible_range, max_size=4),
)


@given(
    st.binary(max_size=200) | plausible_ranges,
    st.integers(0, 0xFFFF * 8),
    st.integers(0, 6),
    st.booleans(),
)
@settings(max_examples=300)
def test_any_bytes_are_gpa_ranges_or_refused(data, header_end, limit, allow_empty):
    ranges = attempt(
        p.parse_gpa_ranges_untrusted,
        data,
        header_end,
        max_ranges=limit,
        allow_empty=allow_empty,
    )
    if isinstance(ranges, GuestProtocolError):
        assert ranges.field
        return
    assert 0 < len(ranges) <= limit
    end = 24
    for each in ranges:
        assert each.byte_offset < 4096
        assert each.byte_count or allow_empty
        assert len(each.pfns) == gpa.page_count(each.byte_offset, each.byte_count)
        assert gpa.build_range(*each) == data[end : end + 8 + 8 * len(each.pfns)]
        end += 8 + 8 * len(each.pfns)
    assert end <= min(header_end, len(data))


@given(st.binary(max_size=200) | plausible_ranges, st.integers(0, 0xFFFF * 8), st.integers(0, 30))
def test_any_bytes_are_transfer_pages_or_refused(data, header_end, limit):
    found = attempt(p.parse_transfer_pages_untrusted, data, header_end, max_ranges=limit)
    if isinstance(found, GuestProtocolError):
        assert found.field in {"data_offset8", "range_count"}
        return
    _set_id, ranges = found
    assert len(ranges) <= limit
    assert 24 + 8 * len(ranges) <= min(header_end, len(data))


@given(st.binary(max_size=100) | plausible_range, st.data())
def test_any_bytes_are_one_range_or_refused(data, draw):
    start = draw.draw(st.integers(0, len(data)))
    end = draw.draw(st.integers(0, len(data)))
    try:
        found, after = gpa.parse_range_untrusted(data, start, end)
    except GuestProtocolError:
        return
    assert start + 8 + 8 * len(found.pfns) == after <= end
    assert found.byte_count > 0
