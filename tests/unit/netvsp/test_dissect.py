"""NVSP and RNDIS in words."""

from __future__ import annotations

import pytest

from netvsp.dissect import NetvspDissector
from netvsp.wire import nvsp, rndis
from tests.support.nics import MAC, PEER, plain_frame
from vmbus.dissect import RingPacket
from vmbus.errors import GuestProtocolError
from vmbus.wire.packets import COMPLETION, IN_BAND, TRANSFER_PAGES


def line(payload: bytes, kind: int = IN_BAND) -> str:
    packet = RingPacket(kind == IN_BAND, kind, 1, 7, payload, None)
    (layer,) = NetvspDissector().packet_untrusted(packet)
    return layer.summary


@pytest.mark.parametrize(
    ("payload", "kind", "said"),
    [
        (nvsp.build_init(nvsp.VERSION_6_1, nvsp.VERSION_6_1), IN_BAND, "INIT 6.1"),
        (nvsp.build_init(5, 0x12345), IN_BAND, "INIT 0x12345"),
        (
            nvsp.build_init_complete(nvsp.VERSION_6_1, nvsp.SUCCESS),
            COMPLETION,
            "INIT_COMPLETE SUCCESS",
        ),
        (
            nvsp.build_ndis_config(1514, 3),
            IN_BAND,
            "SEND_NDIS_CONFIG MTU 1514, capabilities 0x3",
        ),
        (
            nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, 0xE1E10, 0xCAFE),
            IN_BAND,
            "SEND_RECEIVE_BUFFER GPADL 0xe1e10",
        ),
        (
            nvsp.build_rndis_packet(nvsp.CHANNEL_DATA, 3, 104),
            IN_BAND,
            "SEND_RNDIS_PACKET data, 104 bytes in section 3",
        ),
        (
            nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL),
            TRANSFER_PAGES,
            "SEND_RNDIS_PACKET control",
        ),
        (
            nvsp.build_rndis_packet_complete(nvsp.INVALID_RNDIS_PACKET),
            COMPLETION,
            "SEND_RNDIS_PACKET_COMPLETE INVALID_RNDIS_PACKET",
        ),
        (nvsp.build_subchannel(3), IN_BAND, "SUBCHANNEL"),
        ((99).to_bytes(4, "little"), IN_BAND, "type 99"),
        (bytes(8), COMPLETION, "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_says_what_it_is(payload, kind, said):
    assert line(payload, kind) == said


def test_a_frame_is_seen_in_its_message():
    frame = plain_frame(100, to=MAC, source=PEER)
    message = rndis.build_packet_header(len(frame)) + frame
    rndis_layer, ethernet = NetvspDissector().memory_untrusted(message, len(message) + 8, None)
    assert rndis_layer.summary == "PACKET, 100 bytes, and 8 bytes more"
    assert ethernet.fields["source"] == "00:15:5d:0d:0e:0f"
    assert ethernet.fields["target"] == "00:15:5d:0a:0b:0c"


def test_a_control_message_says_what_is_asked():
    message = rndis.build_request(rndis.QUERY, 5, 0x00010106)
    (layer,) = NetvspDissector().memory_untrusted(message, len(message), None)
    assert layer.summary == "QUERY OID 0x00010106"
    assert layer.fields["request_id"] == 5


def test_what_is_no_message_is_refused():
    with pytest.raises(GuestProtocolError):
        line(b"x")
    with pytest.raises(GuestProtocolError):
        NetvspDissector().memory_untrusted(b"x", 1, None)
