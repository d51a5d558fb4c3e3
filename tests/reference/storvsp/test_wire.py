"""The vstor layouts declared a second time, with construct, and proven equal both ways."""

from __future__ import annotations

import construct as c
import pytest
from hypothesis import given, strategies as st

from storvsp import wire

U8, U16, U32 = c.Int8ul, c.Int16ul, c.Int32ul

HEAD = c.Struct("operation" / U32, "flags" / U32, "status" / U32)
SRB_HEAD = c.Struct(
    "length" / U16,
    "srb_status" / U8,
    "scsi_status" / U8,
    "port" / U8,
    "path" / U8,
    "target" / U8,
    "lun" / U8,
    "cdb_length" / U8,
    "sense_length" / U8,
    "data_in" / U8,
    c.Padding(1),
    "transfer_length" / U32,
)
SRB_TAIL = c.Struct(
    c.Padding(2),
    "queue_tag" / U8,
    "queue_action" / U8,
    "srb_flags" / U32,
    "timeout" / U32,
    "sort_key" / U32,
)
REQUEST = c.Struct(
    *HEAD.subcons, *SRB_HEAD.subcons, "cdb" / c.Bytes(16), c.Padding(4), *SRB_TAIL.subcons
)
REPLY = c.Struct(*HEAD.subcons, *SRB_HEAD.subcons, "sense" / c.Bytes(20), *SRB_TAIL.subcons)
PROPERTIES = c.Struct(
    c.Padding(4),
    "max_channel_count" / U16,
    c.Padding(2),
    "flags" / U32,
    "max_transfer_bytes" / U32,
    c.Padding(8),
)
PROTOCOL_VERSION = c.Struct("version" / U16, "revision" / U16)
SUB_CHANNELS = c.Struct("count" / U16)
FIBRE_CHANNEL = c.Struct(
    "primary_port_active" / U8,
    c.Padding(3),
    "port_name" / c.Bytes(8),
    "node_name" / c.Bytes(8),
    "second_port_name" / c.Bytes(8),
    "second_node_name" / c.Bytes(8),
)

TWINS = [
    pytest.param(wire.HEADER, HEAD, id="header"),
    pytest.param(wire.REQUEST, REQUEST, id="request"),
    pytest.param(wire.REPLY, REPLY, id="reply"),
    pytest.param(wire.PROPERTIES, PROPERTIES, id="properties"),
    pytest.param(wire.PROTOCOL_VERSION, PROTOCOL_VERSION, id="version"),
    pytest.param(wire.SUB_CHANNELS, SUB_CHANNELS, id="sub-channels"),
    pytest.param(wire.FIBRE_CHANNEL, FIBRE_CHANNEL, id="fibre-channel"),
]


@pytest.mark.parametrize(("layout", "twin"), TWINS)
@given(data=st.data())
def test_both_declarations_read_and_write_the_same_bytes(layout, twin, data):
    assert layout.size == twin.sizeof()
    raw = data.draw(st.binary(min_size=layout.size, max_size=layout.size))
    values = layout.unpack(raw)
    parsed = twin.parse(raw)
    names = [sub.name for sub in twin.subcons if sub.name]
    assert values == tuple(parsed[name] for name in names)
    assert layout.pack(*values) == twin.build(dict(zip(names, values, strict=True)))


def test_the_named_tuples_have_the_fields_of_their_layouts():
    for fields, twin in (
        (wire.Srb._fields, REQUEST),
        (wire.SrbReply._fields, REPLY),
        (wire.Properties._fields, PROPERTIES),
        (wire.FibreChannelData._fields, FIBRE_CHANNEL),
    ):
        assert list(fields) == [sub.name for sub in twin.subcons if sub.name]
