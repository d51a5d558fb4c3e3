"""Arbitrary control requests: each has a reply that drivers take, or is none."""

from __future__ import annotations

import struct

from hypothesis import given, settings, strategies as st

from netvsp.control import Control, State
from netvsp.link import AdapterConfig, Link
from netvsp.statistics import AdapterStatistics
from netvsp.wire import ndis, nvsp, oids, rndis
from tests.support.net_guest import MAC
from vmbus.errors import GuestProtocolError

small = st.integers(0, 40)
word = small | st.integers(0, 0xFFFFFFFF)
SPECIAL = [
    oids.GEN_CURRENT_PACKET_FILTER,
    oids.GEN_RECEIVE_SCALE_PARAMETERS,
    oids.GEN_RNDIS_CONFIG_PARAMETER,
    oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES,
    oids.TCP_OFFLOAD_PARAMETERS,
]
numbers = st.sampled_from(SPECIAL) | st.sampled_from(SPECIAL * 12 + sorted(oids.NAMES)) | word
kinds = st.sampled_from([rndis.QUERY, rndis.SET])
buffers = (
    st.binary(max_size=80)
    | st.binary(min_size=4, max_size=4)
    | st.builds(
        ndis.build_rss_parameters,
        flags=st.integers(0, 63),
        hash_information=st.sampled_from([0x1701, 0x1702, 0]) | word,
        table=st.lists(st.integers(0, 9), max_size=130).map(tuple),
        key=st.binary(max_size=44),
    )
    | st.builds(
        lambda one, two, size: ndis.build_offload_parameters(
            ndis.OffloadParameters(rsc_ipv4=one, rsc_ipv6=two), size=size
        ),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(18, 28),
    )
    | st.builds(rndis.build_parameter, st.just("NetworkAddress"), st.text(max_size=14))
    | st.integers(1, 3).map(ndis.build_offload_query)
)


@st.composite
def requests(draw) -> bytes:
    message = bytearray(
        draw(
            st.builds(rndis.build_request, kinds, word, numbers, buffers)
            | st.builds(rndis.build_request, kinds, word, numbers, buffers)
            | st.builds(rndis.build_initialize, word, word)
            | st.builds(rndis.build_id_message, st.integers(0, 9), word)
            | st.binary(max_size=60)
        )
    )
    if not draw(st.integers(0, 3)) and len(message) > 4:
        place = draw(st.integers(0, min(len(message), 40) - 4))
        message[place : place + 4] = draw(word).to_bytes(4, "little")
    return bytes(message)


@given(
    st.lists(requests(), max_size=12),
    st.sampled_from(nvsp.VERSIONS),
    st.booleans(),
    st.integers(1, 8),
)
@settings(max_examples=400)
def test_a_request_has_one_reply_that_drivers_take(messages, version, allowed, queues):
    config = AdapterConfig(max_queues=queues, allow_mac_change=allowed)
    link = Link(MAC, mtu=1500, speed=10**10)
    control = Control(config, link, AdapterStatistics())
    control.version = version
    control.coalesces = True
    for message in [rndis.build_initialize(1, 0x4000), *messages]:
        before = control.filter, control.scaling, control.rsc
        try:
            reply = control.request_untrusted(message)
        except GuestProtocolError:
            assert before == (control.filter, control.scaling, control.rsc)
            continue
        kind, _length = rndis.HEADER.unpack_from(message)
        if kind == rndis.HALT:
            assert reply == b""
            assert control.state is State.DOWN
            continue
        assert rndis.parse_header_untrusted(reply) == (kind | rndis.COMPLETE, len(reply))
        assert len(reply) <= 24 + 512
        if kind != rndis.RESET:
            assert reply[8:12] == message[8:12], "its id"
        if kind == rndis.QUERY:
            answer = rndis.parse_query_reply_untrusted(reply)
            assert struct.unpack_from("<I", reply, 20) == (16,)
            assert answer.status == 0 or not answer.buffer
        elif kind == rndis.SET and struct.unpack_from("<I", reply, 12) != (0,):
            assert before == (control.filter, control.scaling, control.rsc)
    if control.scaling is not None:
        assert max(control.scaling.table) < queues
        assert 1 <= len(control.scaling.table) <= ndis.RSS_TABLE_ENTRIES
    assert allowed or link.mac == MAC
