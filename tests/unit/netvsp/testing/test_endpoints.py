"""The conformance suite notices each way of breaking the contract."""

import pytest
import trio

from netvsp.frames.frame import Offload
from netvsp.testing import check_endpoint
from tests.support import broken_endpoints as broken
from tests.support.broken_endpoints import bad_info, brings


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (broken.NoInfo, "not an EndpointInfo"),
        (bad_info(queues=0), "info.queues is 0"),
        (bad_info(queues=65), "info.queues is 65"),
        (bad_info(mtu=60), "info.mtu is 60"),
        (bad_info(speed=0), "info.speed is 0"),
        (broken.RestlessInfo, "changes by itself"),
        (broken.SnapshotOfBytes, "more than JSON types"),
        (broken.SnapshotOfNothing, "snapshot returned no dict"),
        (broken.SaysNothing, "transmit returned None"),
        (broken.SaysTrue, "transmit returned (True|False)"),
        (broken.TakesTooMany, "took 1 frames of the 0"),
        (broken.Scribbles, "transmit changed a frame"),
        (broken.Truncates, "transmit changed a frame"),
        (broken.KeepsBytes, "what was in the guest's memory when transmit had returned"),
        (broken.Insists, "before there was room"),
        (broken.Repeats, "that had been taken"),
        (broken.Remembers, "of an earlier life"),
        (broken.Ends, "run returned"),
        (broken.Fails, "run came to an end: the cable is cut"),
        (broken.OneLife, "run came to an end: no more lives"),
        (broken.WaitsForNothing, "wait_writable is no checkpoint"),
        (brings(b"x" * 13), "a frame of 13 bytes"),
        (brings(b"x" * 300, [b"x" * 65536]), "a frame of 65836 bytes"),
        (brings(b"x" * 60, [b"x"]), "60 bytes of a frame of 61 in its head"),
        (brings(bytearray(60)), "no bytes object"),
        (brings(bytes(60), (), None, 1 << 16), "a tag of 65536"),
        (brings(bytes(60), (), Offload(4)), "means nothing"),
        (brings(bytes(60), (), Offload(1, 2, 54, 1000, 34, 16)), "means nothing"),
        (brings(bytes(60), (), Offload(1, 0, 0, 0, 34, 26)), "whose sum is not in its head"),
        (brings(bytes(60), (), Offload(1, 1, 54, 0, 34, 16)), "cannot be cut"),
        (broken.TakesNothingWhenClosed, "after aclose did not take all"),
    ],
)
async def test_a_broken_promise_is_named(endpoint, text):
    with pytest.RaisesGroup(
        pytest.RaisesExc(AssertionError, match=text), allow_unwrapped=True, flatten_subgroups=True
    ):
        await check_endpoint(made(endpoint))


@pytest.mark.parametrize(
    ("endpoint", "error"),
    [
        (broken.Keeps, ValueError),
        (broken.Chokes, ValueError),
        (broken.ClosesOnce, Exception),
    ],
)
async def test_what_is_raised_against_the_rules_escapes(endpoint, error):
    with pytest.RaisesGroup(error, allow_unwrapped=True, flatten_subgroups=True):
        await check_endpoint(made(endpoint))


async def test_a_queue_for_one_sender_is_too_little():
    with pytest.raises(BaseExceptionGroup) as caught:
        await check_endpoint(made(broken.OneWaiter))
    assert caught.value.split(trio.BusyResourceError)[1] is None


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (broken.WakesNobody, "wait_writable does not return"),
        (broken.ForgetsThoseWhoWait, "wait_writable, when it is closed, does not return"),
    ],
)
async def test_a_hang_is_named(endpoint, text, autojump_clock):
    with pytest.raises(AssertionError, match=text):
        await check_endpoint(made(endpoint), patience=60)


async def test_what_is_provoked_has_to_come_in(autojump_clock):
    provoked: list[object] = []
    with pytest.raises(AssertionError, match="a frame that was provoked does not return"):
        await check_endpoint(made(broken.Hears), provoke=provoked.append)
    assert provoked


def made(endpoint):
    async def make():
        await trio.lowlevel.checkpoint()
        return endpoint()

    return make


@pytest.mark.parametrize("endpoint", [broken.Plain, broken.Brings])
async def test_a_plain_endpoint_that_keeps_the_contract_passes(endpoint):
    await check_endpoint(made(endpoint))
