"""No record makes taking it apart raise, whatever it says and whatever came before."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, strategies as st

from netvsp.dissect import NetvspDissector
from storvsp.dissect import StorvspDissector
from vmbus.dissect import Dissector, RingPacket
from vmbus.dissect.control import ControlDissector
from vmbus.errors import GuestProtocolError
from vmbus.trace import Kind, Record, Way
from vmbus.wire.messages import Direction
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, IN_BAND, TRANSFER_PAGES

KINDS = [IN_BAND, TRANSFER_PAGES, GPA_DIRECT, COMPLETION]
payloads = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda kind, rest: struct.pack("<I", kind) + rest,
        st.one_of(st.integers(0, 15), st.integers(100, 136)),
        st.binary(max_size=76),
    ),
)
packets = st.builds(
    lambda kind, offset, flags, number, payload: (
        struct.pack(
            "<HHHHQ", kind, offset, 2 + (len(payload) + 7) // 8, flags, number
        )
        + payload
    ),
    st.sampled_from([*KINDS, 0, 99]), st.integers(0, 4), st.integers(0, 1), st.integers(0, 3),
    payloads,
)  # fmt: skip
data = st.one_of(
    packets,
    payloads,
    st.sampled_from([b'{"name": "scsi"}', b'{"name": "net"}', b"[]", b"{", b'{"name": 5}']),
)
records = st.builds(
    Record, st.one_of(st.sampled_from(list(Kind)), st.integers(0, 255)), data,
    way=st.sampled_from(list(Way)), relid=st.integers(0, 2), life=st.integers(0, 1),
    ref=st.integers(0, 3), offset=st.integers(0, 1), total=st.integers(0, 100),
    flags=st.integers(0, 15),
)  # fmt: skip


@given(st.lists(records, max_size=20))
def test_any_records_are_taken_apart(some):
    dissector = Dissector()
    for each in some:
        found = dissector.dissect(each)
        assert found.summary
        json.dumps([[layer.name, layer.summary, dict(layer.fields)] for layer in found.layers])


@pytest.mark.parametrize("dissector", [StorvspDissector(), NetvspDissector()], ids=["scsi", "net"])
@given(st.sampled_from(KINDS), st.booleans(), payloads, st.none() | payloads, st.integers(0, 100))
def test_any_payload_and_any_memory_of_a_device_is_taken_apart_or_refused(
    dissector, kind, to_host, payload, asked, total
):
    packet = RingPacket(to_host, kind, 1, 7, payload, asked)
    for attempt in (
        lambda: dissector.packet_untrusted(packet),
        lambda: dissector.memory_untrusted(payload, total, asked),
    ):
        try:
            found = attempt()
        except GuestProtocolError:
            continue
        assert all(layer.name and layer.summary for layer in found)


@given(st.lists(st.tuples(payloads, st.sampled_from(Direction)), max_size=6))
def test_any_control_messages_are_taken_apart_or_refused(some):
    dissector = ControlDissector()
    for message, direction in some:
        try:
            layer = dissector.message_untrusted(message, direction)
        except GuestProtocolError:
            continue
        assert layer.fields["type"]
