"""Any bytes as frames, at any ports: each is dropped with a reason, or comes out as it was."""

from __future__ import annotations

from hypothesis import given, strategies as st

from netvsp.frames.frame import ETHERNET_HEADER, Frame
from netvsp.switch.port import PortConfig
from netvsp.switch.switch import JOINT
from tests.support.switch import BROADCAST, Net, station

TAGS = st.sampled_from([b"", b"\x81\x00", b"\x81\x00\x00\x05", b"\x81\x00\x00\x05\x81\x00\x00\x06"])
ENDS = st.sampled_from([station(1), station(2), station(9), BROADCAST, bytes(6)])
HEADS = st.binary(max_size=30) | st.builds(
    lambda target, source, tags, rest: target + source + tags + rest,
    ENDS,
    ENDS,
    TAGS,
    st.binary(max_size=20),
)
FRAMES = st.builds(
    lambda head, rest, tci: Frame(head, [memoryview(each) for each in rest], None, tci),
    HEADS,
    st.lists(st.binary(max_size=10), max_size=2),
    st.none() | st.integers(0, 0xFFFF),
)
CONFIGS = st.one_of(
    st.builds(PortConfig, vlan=st.sampled_from([0, 5]), isolated=st.booleans()),
    st.builds(PortConfig, trunk=st.frozensets(st.sampled_from([0, 5, 6]), min_size=1)),
    st.just(PortConfig(uplink=True, addresses=10)),
    st.just(JOINT),
)


def seen(frame: Frame, vlan: int) -> tuple[bytes, int]:
    """Return a frame's bytes without its outermost tag, and the VLAN it is in at a port."""
    plain = frame.own().untagged()
    return plain.tobytes(), (plain.tci or 0) & 0xFFF or vlan


@given(
    configs=st.lists(CONFIGS, min_size=2, max_size=4),
    sent=st.lists(st.tuples(st.integers(1, 2), FRAMES), max_size=8),
)
def test_a_frame_is_dropped_with_a_reason_or_comes_out_as_it_was(configs, sent):
    net = Net()
    for number, config in enumerate(configs, 1):
        net.add(number, config)
    for at, frame in sent:
        came = net.ports[at].config.vlan
        for number in net.ports:
            net.dropped(number)  # of the frame before: where it was to go out
        net.send(at, frame)
        out = {number: net.take(number) for number in net.ports}
        assert not out[at]
        reasons = net.dropped(at)
        if reasons:
            assert not any(out.values())
            assert list(reasons.values()) == [1]
            continue
        for number, frames in out.items():
            port = net.ports[number]
            for each in frames:
                assert len(each.head) >= ETHERNET_HEADER
                assert not each.rest
                assert seen(each, port.config.vlan) == seen(frame, came)
                assert seen(each, port.config.vlan)[1] in port.vlans
                if port.config.trunk is None:
                    assert each.tci is None
    for port in net.ports.values():
        assert not port.queue.count
