"""The contract of an endpoint: what one is that says nothing of its own."""

from __future__ import annotations

import trio
import trio.testing

from netvsp.endpoint import Endpoint, EndpointInfo, Offloads
from tests.support.net_guest import incoming, running
from tests.support.patience import waits


class Plain(Endpoint):
    """Takes everything."""

    def transmit(self, queue, frames):
        return len(frames)


async def test_an_endpoint_need_say_no_more_than_what_it_does_with_frames():
    endpoint = Plain()
    assert endpoint.info == EndpointInfo(
        offloads=Offloads(), queues=1, mtu=None, speed=10_000_000_000
    )
    assert endpoint.snapshot() == {}
    with trio.testing.assert_checkpoints():
        await endpoint.wait_writable(0)
    async with running(endpoint) as (guest, adapter):
        assert await waits(lambda: endpoint.run(adapter))
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]
    await endpoint.aclose()
    await endpoint.aclose()
