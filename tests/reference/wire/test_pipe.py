"""Pipe framing, declared a second time in ``construct``, and against arbitrary bytes."""

from __future__ import annotations

import construct as c
import pytest
from hypothesis import given, strategies as st

from vmbus.errors import GuestProtocolError
from vmbus.wire import pipe

MESSAGE = c.Struct("kind" / c.Const(1, c.Int32ul), "data" / c.Prefixed(c.Int32ul, c.GreedyBytes))


@given(st.binary(max_size=300), st.integers(0, 7))
def test_a_built_message_reads_in_the_twin_and_back_with_any_padding(data, padding):
    built = pipe.build_pipe_message(data)
    assert MESSAGE.parse(built).data == data
    assert MESSAGE.build({"data": data}) == built
    assert pipe.parse_pipe_message_untrusted(built + bytes(padding)) == data


@given(st.binary(max_size=40))
def test_both_declarations_accept_the_same_bytes(payload):
    try:
        expected = MESSAGE.parse(payload).data
    except c.ConstructError:
        with pytest.raises(GuestProtocolError):
            pipe.parse_pipe_message_untrusted(payload)
    else:
        assert pipe.parse_pipe_message_untrusted(payload) == expected


def test_the_end_of_a_stream_is_a_message_of_nothing():
    # hvs_shutdown_lock_held sends a header that announces 0 bytes.
    assert pipe.build_pipe_message(b"") == bytes.fromhex("01000000 00000000")
    assert pipe.parse_pipe_message_untrusted(bytes.fromhex("01000000 00000000")) == b""


def test_no_message_is_longer_than_a_peer_has_room_for():
    longest = bytes(pipe.MAX_PIPE_MESSAGE)
    assert pipe.parse_pipe_message_untrusted(pipe.build_pipe_message(longest)) == longest
    with pytest.raises(ValueError, match="16385"):
        pipe.build_pipe_message(longest + b"x")
    with pytest.raises(GuestProtocolError, match="data_size 16385"):
        pipe.parse_pipe_message_untrusted(pipe.PIPE_HEADER.pack(1, 16385) + longest + bytes(8))
