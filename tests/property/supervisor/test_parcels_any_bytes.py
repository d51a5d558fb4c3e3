"""Whatever a worker that was taken over sends up, the supervisor answers with one kind of error."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import trio
from hypothesis import given, strategies as st

from tests.support.supervisor import FakeOwner, fake_worker
from vmbus.errors import PeerProtocolError
from vmbus.supervisor import relay
from vmbus.supervisor.parcels import MAX_UP, Unpacker, pack, parse_untrusted

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
WORDS = st.sampled_from(["log", "ready", "ask", "admit", "claim", "attached", "leaving", "left",
                         "answer", "ended", "error", "errno", "value"])  # fmt: skip
PARCELS = st.dictionaries(WORDS, JSON | st.just(True), max_size=4)


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_any_bytes(data, cut):
    unpacker = Unpacker()
    with contextlib.suppress(PeerProtocolError):
        for part in (data[:cut], data[cut:]):
            for parcel in unpacker.feed_untrusted(part):
                assert isinstance(parcel, dict)


@given(parcels=st.lists(PARCELS, max_size=5), size=st.integers(1, 64))
def test_what_was_packed_comes_out_whole_however_it_is_cut(parcels, size):
    data = b"".join(map(pack, parcels))
    unpacker = Unpacker()
    found = [
        parcel
        for at in range(0, len(data), size)
        for parcel in unpacker.feed_untrusted(data[at : at + size])
    ]
    assert list(map(json.dumps, found)) == list(map(json.dumps, parcels))


@given(data=st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_object_is_refused(data):
    with contextlib.suppress(PeerProtocolError):
        assert isinstance(parse_untrusted(data), dict)


def test_deep_nesting_and_great_lengths_are_refused():
    for data in (b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(PeerProtocolError):
            parse_untrusted(data)
    with pytest.raises(PeerProtocolError, match="bytes"):
        list(Unpacker().feed_untrusted((MAX_UP + 1).to_bytes(4, "little")))


@given(line=JSON | st.dictionaries(st.sampled_from(
    ["text", "level", "logger", "error", "traceback"]), JSON))  # fmt: skip
def test_any_line_of_a_log_is_written_or_refused(line):
    assert relay.is_detail_untrusted(line) in {True, False}
    try:
        relay.replay_untrusted(line)
    except PeerProtocolError:
        assert (
            not isinstance(line, dict)
            or not all(
                isinstance(line.get(field, ""), str) for field in ("text", "logger", "error")
            )
            or not {"text", "logger"} <= set(line)
            or not isinstance(line.get("traceback", ""), str)
        )


@given(parcels=st.lists(PARCELS, max_size=8))
def test_any_message_is_taken_or_ends_the_worker(parcels):
    async def main():
        owner = FakeOwner()
        async with fake_worker(owner) as (worker, ends):
            for parcel in parcels:
                os.write(ends.up, pack(parcel))
            ends.hang_up()
            await worker.gone.wait()

    trio.run(main)
