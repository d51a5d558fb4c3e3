"""A segment that is cut and summed in one go is what cutting first and summing then makes of it."""

from __future__ import annotations

from hypothesis import given, strategies as st

from netvsp.frames.frame import (
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    Frame,
    Offload,
)
from netvsp.frames.offload import complete, cut, fill_checksum

heads = st.builds(
    lambda addresses, kind, rest: addresses + kind + rest,
    st.binary(min_size=12, max_size=12),
    st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x08\x06"]),
    st.binary(min_size=60, max_size=120),
)


@given(
    heads,
    st.binary(min_size=1, max_size=400),
    st.sampled_from([GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_TCPV4 | GSO_ECN]),
    st.sampled_from([34, 54, 35, 58, 14]),
    st.sampled_from([8, 20, 21, 32, 7]),
    st.sampled_from([16, 6, 2, 40]),
    st.integers(1, 200),
    st.none() | st.integers(0, 0xFFFF),
)
def test_both_ways_lead_to_the_same_frames(head, payload, kind, start, more, offset, size, tci):
    end = start + more
    data = head.ljust(end, b"\x11")[:end] + payload
    offload = Offload(NEEDS_CHECKSUM, kind, end, size, start, offset)
    frame = Frame(data, (), offload, tci, 7)
    one = complete(frame)
    other = [fill_checksum(each) for each in cut(frame)]
    assert [each.head for each in one] == [each.head for each in other]
    assert [each.offload for each in one] == [each.offload for each in other]
    assert all((each.tci, each.flow, each.rest) == (tci, 7, ()) for each in one)
    assert all(isinstance(each.head, bytes) for each in one)
