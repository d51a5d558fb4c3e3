"""A network that answers for itself survives whatever a guest sends, and answers with frames."""

from __future__ import annotations

import contextlib

from hypothesis import example, given, settings, strategies as st

from netvsp.endpoints import dhcp, dns
from netvsp.endpoints.responder import GATEWAY, GUEST, RESOLVER, Lookup, answer_untrusted
from netvsp.frames import internet as inet
from netvsp.frames.frame import PROTOCOL_UDP
from vmbus.errors import GuestProtocolError

MACS = bytes(6) + b"\2\0\0\0\0\1"
addresses = st.sampled_from([GATEWAY, RESOLVER, GUEST, b"\xff" * 4, b"\xe0\0\0\1"])
payloads = st.binary(max_size=400)


def ip_frame(target: bytes, protocol: int, payload: bytes) -> bytes:
    return inet.build_ipv4(MACS[6:], MACS[:6], GUEST, target, protocol=protocol, payload=payload)


def udp_frame(target: bytes, port: int, payload: bytes) -> bytes:
    udp = inet.build_udp(GUEST, target, inet.Udp(1000, port, payload))
    return ip_frame(target, PROTOCOL_UDP, udp)


dhcp_messages = st.builds(
    lambda fields, options: b"\x01\x01\x06\0" + fields + b"\x63\x82\x53\x63" + options,
    st.binary(min_size=232, max_size=232),
    st.binary(max_size=60) | st.builds(b"\x35\x01".__add__, st.binary(max_size=60)),
)
dns_messages = st.builds(
    lambda flags, question: b"\1\2" + flags + b"\0\1\0\0\0\0\0\0" + question,
    st.sampled_from([b"\1\0", b"\0\0"]) | st.binary(min_size=2, max_size=2),
    st.binary(max_size=300) | st.builds(b"\4host\0\0".__add__, st.binary(max_size=6)),
)
frames = st.one_of(
    st.builds(MACS.__add__, st.binary(max_size=100)),
    st.builds((MACS + b"\x08\x06").__add__, st.binary(max_size=60)),
    st.builds((MACS + b"\x08\x00E\0").__add__, st.binary(max_size=100)),
    st.builds(ip_frame, addresses, st.integers(0, 255), payloads),
    st.builds(udp_frame, addresses, st.sampled_from([53, 67, 123]), payloads),
    st.builds(udp_frame, addresses, st.just(67), dhcp_messages),
    st.builds(udp_frame, addresses, st.just(53), dns_messages),
)


@given(frames)
@example(udp_frame(RESOLVER, 53, b"\1\2\1\0\0\1\0\0\0\0\0\0\4host\0\0\1\0\1"))
@settings(max_examples=1000)
def test_any_frame_is_answered_or_refused(frame):
    try:
        answer = answer_untrusted(frame)
    except GuestProtocolError:
        return
    if isinstance(answer, Lookup):
        assert len(answer.query.name) < 255
        answer = answer.reply(dns.OK, [bytes(16)] * 50)
        assert len(answer) <= 14 + 20 + 8 + 512
    assert answer is None or 60 <= len(answer) <= 1514


@given(payloads)
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_refused(data):
    for parse in (
        dhcp.parse_request_untrusted,
        dns.parse_query_untrusted,
        inet.parse_arp_untrusted,
        inet.parse_ipv4_untrusted,
    ):
        with contextlib.suppress(GuestProtocolError):
            parse(data)
    with contextlib.suppress(GuestProtocolError):
        udp = inet.parse_udp_untrusted(inet.Ipv4(GUEST, GATEWAY, 17, bytes(20), data))
        assert len(udp.payload) <= len(data) - 8


@given(dhcp_messages)
def test_options_end_with_the_message(data):
    with contextlib.suppress(GuestProtocolError):
        found = dhcp._options_untrusted(data)
        assert sum(map(len, found.values())) <= len(data)
