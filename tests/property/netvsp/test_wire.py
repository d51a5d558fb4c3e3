"""Arbitrary bytes for everything that parses NVSP, RNDIS, per-packet information and NDIS."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings, strategies as st

from netvsp.wire import ndis, nvsp, ppi, rndis
from vmbus.errors import GuestProtocolError

T = TypeVar("T")

NVSP_PARSERS = [
    nvsp.parse_type_untrusted,
    nvsp.parse_init_untrusted,
    nvsp.parse_init_complete_untrusted,
    nvsp.parse_ndis_version_untrusted,
    nvsp.parse_ndis_config_untrusted,
    nvsp.parse_buffer_untrusted,
    nvsp.parse_revoke_untrusted,
    nvsp.parse_receive_buffer_complete_untrusted,
    nvsp.parse_send_buffer_complete_untrusted,
    nvsp.parse_rndis_packet_untrusted,
    nvsp.parse_rndis_packet_complete_untrusted,
    nvsp.parse_data_path_untrusted,
    nvsp.parse_subchannel_untrusted,
    nvsp.parse_subchannel_complete_untrusted,
    nvsp.parse_send_table_untrusted,
]
RNDIS_PARSERS = [
    rndis.parse_header_untrusted,
    rndis.parse_request_id_untrusted,
    rndis.parse_initialize_untrusted,
    rndis.parse_request_untrusted,
    rndis.parse_initialize_reply_untrusted,
    rndis.parse_query_reply_untrusted,
    rndis.parse_status_reply_untrusted,
    rndis.parse_indication_untrusted,
    rndis.parse_frame_untrusted,
    rndis.parse_parameter_untrusted,
]
NDIS_PARSERS = [
    ndis.parse_object_untrusted,
    ndis.parse_offload_capabilities_untrusted,
    ndis.parse_offload_parameters_untrusted,
    ndis.parse_rss_capabilities_untrusted,
    ndis.parse_rss_parameters_untrusted,
]


def attempt(parse: Callable[[bytes], T], data: bytes) -> T | GuestProtocolError:
    """Call a parser; its refusal is a result, too. Whatever else it raises fails the test."""
    try:
        return parse(data)
    except GuestProtocolError as error:
        return error


# Words that are often lengths and offsets, so that some of them fit.
word = st.integers(0, 80) | st.integers(0, 0xFFFFFFFF) | st.sampled_from([0xFFFFFFFF, 0xFFFFFFF8])
of_words = st.lists(word, max_size=24).map(lambda words: struct.pack(f"<{len(words)}I", *words))
anything = st.binary(max_size=200) | of_words


@pytest.mark.parametrize("parse", [*NVSP_PARSERS, *RNDIS_PARSERS], ids=lambda each: each.__name__)
@given(data=anything)
def test_only_the_protocol_error_escapes_from_messages(parse, data):
    found = attempt(parse, data)
    if isinstance(found, GuestProtocolError):
        assert found.field
    elif parse in NVSP_PARSERS:
        assert attempt(parse, data + b"more") == found, "what follows a message changes nothing"


objects = st.builds(
    lambda kind, revision, size, rest: struct.pack("<BBH", kind, revision, size) + rest,
    st.sampled_from([0x80, 0x88, 0x89, 0xA7, 0]),
    st.integers(0, 5),
    st.integers(0, 200),
    st.binary(max_size=200) | of_words,
)


@pytest.mark.parametrize("parse", NDIS_PARSERS, ids=lambda each: each.__name__)
@given(data=anything | objects)
def test_only_the_protocol_error_escapes_from_objects(parse, data):
    attempt(parse, data)


@given(data=anything)
@settings(max_examples=500)
def test_a_frame_is_within_its_message(data):
    where = attempt(rndis.parse_frame_untrusted, data)
    if isinstance(where, GuestProtocolError):
        return
    assert where.data_offset >= rndis.PACKET_HEADER_SIZE
    assert where.data_offset + where.data_length <= where.length
    if where.info_length:
        assert where.info_offset >= rndis.PACKET_HEADER_SIZE
        assert where.info_offset + where.info_length <= where.length


@given(data=anything)
@settings(max_examples=500)
def test_a_buffer_is_within_its_message(data):
    for parse in (rndis.parse_request_untrusted, rndis.parse_query_reply_untrusted):
        found: Any = attempt(parse, data)
        if not isinstance(found, GuestProtocolError):
            assert found.buffer in data


items = st.lists(
    st.tuples(st.integers(0, 40), word, st.integers(0, 20), st.binary(max_size=24)).map(
        lambda item: struct.pack("<III", *item[:3]) + item[3]
    ),
    max_size=20,
).map(b"".join)


@given(information=anything | items)
@settings(max_examples=500)
def test_any_list_of_items_is_read_or_refused(information):
    found = attempt(ppi.parse_items_untrusted, information)
    if isinstance(found, GuestProtocolError):
        return
    assert len(found) <= ppi.MAX_ITEMS
    for kind, value in found.items():
        assert struct.pack("<I", kind) in information
        assert struct.pack("<I", value) in information


@given(
    parts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 0xFFFFFFFF)), max_size=ppi.MAX_ITEMS)
)
def test_items_that_are_built_are_read(parts):
    built = b"".join(ppi.build_item(kind, value) for kind, value in parts)
    wanted: dict[int, int] = {}
    for kind, value in parts:
        wanted.setdefault(kind, value)
    assert ppi.parse_items_untrusted(built) == wanted


@given(mss=st.integers(0, 0xFFFFF), offset=st.integers(0, 0x3FF), ipv6=st.booleans())
def test_a_large_send_goes_both_ways(mss, offset, ipv6):
    large = ppi.LargeSend(mss, offset, ipv6)
    value = ppi.pack_large_send(large)
    assert value >> 32 == 0
    assert ppi.unpack_large_send(value) == large


@given(tci=st.integers(0, 0xFFFF))
def test_a_tag_goes_both_ways(tci):
    assert ppi.unpack_vlan(ppi.pack_vlan(ppi.vlan_of_tci(tci))).tci == tci


@given(name=st.text(max_size=40), value=st.text(max_size=40))
def test_a_parameter_goes_both_ways(name, value):
    built = rndis.build_parameter(name, value)
    assert rndis.parse_parameter_untrusted(built) == (name, value)


@given(
    flags=st.integers(0, 31),
    kinds=st.integers(0, 0xFFFFFFFF),
    table=st.lists(st.integers(0, 63), max_size=128).map(tuple),
    key=st.binary(max_size=40),
)
def test_scaling_goes_both_ways(flags, kinds, table, key):
    built = ndis.build_rss_parameters(flags=flags, hash_information=kinds, table=table, key=key)
    found = ndis.parse_rss_parameters_untrusted(built)
    off = flags & ndis.RSS_DISABLE
    assert found.flags == flags
    assert found.hash_information == kinds
    assert found.table == (() if off or flags & ndis.RSS_TABLE_UNCHANGED else table)
    assert found.key == (b"" if off or flags & ndis.RSS_KEY_UNCHANGED else key)
