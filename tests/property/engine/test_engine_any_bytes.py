"""Arbitrary bytes posted to an engine: nothing escapes, nothing piles up."""

from __future__ import annotations

from hypothesis import given, strategies as st

from tests.support.engine import Guest, make_offer
from vmbus.engine import Budgets, EngineConfig, Fault
from vmbus.wire.versions import Version

CONFIG = EngineConfig(
    vp_count=2,
    hv_sock=True,
    budgets=Budgets(max_gpadls=4, max_unfinished_gpadls=2, max_gpadl_pages=64),
)
u32 = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 0xE1E10, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF)
)
WORDS = st.lists(u32, max_size=58).map(
    lambda words: b"".join(word.to_bytes(4, "little") for word in words)
)


@st.composite
def posts(draw: st.DrawFn) -> bytes:
    """Noise, or a header with a known type before words that are often plausible."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    return (
        draw(st.integers(0, 31)).to_bytes(8, "little") + draw(WORDS) + draw(st.binary(max_size=8))
    )


@given(
    version=st.sampled_from([None, *Version]),
    posted=st.lists(st.tuples(st.sampled_from([1, 4, 4, 1, 2]), posts()), max_size=30),
)
def test_arbitrary_messages_end_in_an_effect_or_a_fault(version, posted) -> None:
    guest = Guest(CONFIG)
    guest.engine.offer(make_offer(1, max_subchannels=1, monitor_latency=1))
    guest.engine.offer(make_offer(2))
    if version is not None:
        guest.connect(version)
        guest.create()
        guest.opened()
    for connection_id, payload in posted:
        guest.engine.receive_untrusted(connection_id, payload)
        events = guest.engine.take()
        assert len(events) <= 20
        assert sum(isinstance(event, Fault) for event in events) <= 1
    guest.engine.reset()
