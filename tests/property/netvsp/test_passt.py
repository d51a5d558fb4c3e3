"""What a worker says to who starts passt for it: any bytes."""

from __future__ import annotations

from hypothesis import given, strategies as st

from netvsp.endpoints.passt_keeper import START, asked_untrusted
from vmbus.errors import PeerProtocolError


@given(st.binary() | st.just(START))
def test_a_worker_asks_or_has_ended_or_breaks_the_rule(message):
    try:
        asked = asked_untrusted(message)
    except PeerProtocolError:
        assert message not in {b"", START}
    else:
        assert asked == bool(message)
        assert message in {b"", START}
