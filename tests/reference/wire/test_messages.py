"""The control messages, declared a second time in ``struct``, from the published structures.

Bytes are encoded by one declaration and decoded by the other, both ways, over arbitrary bytes.
"""

from __future__ import annotations

import dataclasses
import struct
from uuid import UUID

import pytest
from hypothesis import given, strategies as st

from vmbus.wire import messages as m
from vmbus.wire.versions import NO_FEATURES, Feature, Version

H2G = m.Direction.HOST_TO_GUEST
G2H = m.Direction.GUEST_TO_HOST


@dataclasses.dataclass(frozen=True)
class Twin:
    """One layout behind the header; ``*`` before a name: a GUID, ``?``: bit 0, ``!``: not 0."""

    number: int
    direction: m.Direction
    layout: str
    fields: str
    version: Version | None = Version.V5_3
    features: Feature = NO_FEATURES
    trailing: bool = False

    @property
    def struct(self) -> struct.Struct:
        return struct.Struct("<II" + self.layout)

    def decode(self, data: bytes) -> dict[str, object]:
        values = self.struct.unpack(data)[2:]
        result: dict[str, object] = {}
        for name, value in zip(self.fields.split(), values, strict=True):
            if name == "-":
                continue
            if name[0] == "*":
                result[name[1:]] = UUID(bytes_le=value)
            elif name[0] == "?":
                result[name[1:]] = value & 1 == 1
            elif name[0] == "!":
                result[name[1:]] = value != 0
            else:
                result[name] = value
        return result

    def encode(self, message: m.Message) -> bytes:
        values: list[object] = []
        for name, kind in zip(self.fields.split(), self.kinds, strict=True):
            if name == "-":
                values.append(bytes(int(kind[:-1])) if kind.endswith("s") else 0)
                continue
            value = getattr(message, name.lstrip("*?!"))
            values.append(value.bytes_le if name[0] == "*" else value)
        return self.struct.pack(self.number, 0, *values)

    @property
    def kinds(self) -> list[str]:
        kinds = []
        count = ""
        for letter in self.layout:
            if letter.isdigit():
                count += letter
            else:
                kinds.append(count + letter)
                count = ""
        return kinds


V6 = Version.V6_0
TWINS = [
    Twin(
        1,
        H2G,
        "16s16s16sHH120sHHIBBHI",
        "*class_id *instance_id - flags mmio_megabytes user_defined subchannel_index "
        "mmio_megabytes_optional relid monitor_id ?monitor_allocated ?is_dedicated_interrupt "
        "connection_id",
    ),
    Twin(2, H2G, "I", "relid"),
    Twin(3, G2H, "", ""),
    Twin(4, H2G, "", ""),
    Twin(
        5, G2H, "IIIII120s", "relid open_id ring_gpadl target_vp downstream_page_offset user_data"
    ),
    Twin(
        5,
        G2H,
        "IIIII120sIHH",
        "relid open_id ring_gpadl target_vp downstream_page_offset user_data connection_id "
        "event_flag open_flags",
        V6,
        Feature.CHANNEL_INTERRUPT_REDIRECTION,
    ),
    Twin(6, H2G, "III", "relid open_id status"),
    Twin(7, G2H, "I", "relid"),
    Twin(8, G2H, "IIHH", "relid gpadl range_buflen range_count", trailing=True),
    Twin(9, G2H, "II", "message_number gpadl", trailing=True),
    Twin(10, H2G, "III", "relid gpadl status"),
    Twin(11, G2H, "II", "relid gpadl"),
    Twin(12, H2G, "I", "gpadl"),
    Twin(13, G2H, "I", "relid"),
    Twin(14, G2H, "IIQQQ", "version target_vp target_info monitor_page_1 monitor_page_2", None),
    Twin(
        14,
        G2H,
        "IIQQQ16s",
        "version target_vp target_info monitor_page_1 monitor_page_2 *client_id",
        None,
    ),
    Twin(15, H2G, "BBHI", "!version_supported connection_state - message_connection_id", None),
    Twin(
        15,
        H2G,
        "BBHII",
        "!version_supported connection_state - message_connection_id supported_features",
        V6,
    ),
    Twin(
        15,
        H2G,
        "BBHIIIQQ",
        "!version_supported connection_state - message_connection_id supported_features - "
        "host_monitor_page_1 host_monitor_page_2",
        V6,
        Feature.SERVER_SPECIFIED_MONITOR_PAGES,
    ),
    Twin(16, G2H, "", ""),
    Twin(17, H2G, "", ""),
    Twin(18, G2H, "IIIII", "relid target_vp target_sint ring_gpadl downstream_page_offset"),
    Twin(19, G2H, "III", "relid target_vp target_sint", None),
    Twin(20, H2G, "I", "relid", None),
    Twin(21, G2H, "16s16s", "*endpoint_id *service_id", Version.V4_0),
    Twin(21, G2H, "16s16s16s", "*endpoint_id *service_id *silo_id", Version.V5_2),
    Twin(22, G2H, "II", "relid target_vp"),
    Twin(23, H2G, "16s16sI", "*endpoint_id *service_id status"),
    Twin(24, H2G, "II", "relid status"),
    Twin(25, G2H, "QQ", "monitor_page_1 monitor_page_2", V6, Feature.MODIFY_CONNECTION),
    Twin(26, H2G, "B", "connection_state", V6, Feature.MODIFY_CONNECTION),
    Twin(27, G2H, "", "", V6, Feature.PAUSE_RESUME),
    Twin(28, H2G, "", "", V6, Feature.PAUSE_RESUME),
    Twin(29, G2H, "", "", V6, Feature.PAUSE_RESUME),
]


def twin_name(twin: Twin) -> str:
    return f"{m.message_name(twin.number)}-{twin.struct.size}"


def test_every_row_of_the_table_has_a_twin_of_its_size():
    rows = {(spec.message.TYPE, spec.size) for spec in m.MESSAGES}
    twins = {(twin.number, twin.struct.size) for twin in TWINS}
    # A contact with a client id is the same row with 16 bytes behind it.
    assert twins - rows == {(14, 56)}
    assert rows <= twins


@pytest.mark.parametrize("twin", TWINS, ids=twin_name)
@given(data=st.data())
def test_both_declarations_read_and_write_the_same(twin: Twin, data):
    size = twin.struct.size
    body = data.draw(st.binary(min_size=size - 4, max_size=size - 4))
    tail = data.draw(st.binary(max_size=240 - size)) if twin.trailing else b""
    raw = twin.number.to_bytes(4, "little") + body
    message = m.parse_message_untrusted(
        raw + tail, direction=twin.direction, version=twin.version, features=twin.features
    )
    assert twin.number == message.TYPE
    for name, value in twin.decode(raw).items():
        assert getattr(message, name) == value
        assert type(getattr(message, name)) is type(value)
    if twin.trailing:
        assert isinstance(message, m.GpadlHeader | m.GpadlBody)
        assert message.data == tail
    built = m.build_message(message, version=twin.version, features=twin.features)
    assert built == twin.encode(message) + tail
    assert (
        m.parse_message_untrusted(
            twin.encode(message) + tail,
            direction=twin.direction,
            version=twin.version,
            features=twin.features,
        )
        == message
    )
