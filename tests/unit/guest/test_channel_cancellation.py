"""Requests of the Python guest that are cancelled in the very moment in which they end."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.fake_host import Machine, offer
from vmbus.guest import LINUX_6_1, boot


@pytest.mark.parametrize("first", ["cancelled", "ended"])
async def test_a_request_that_ends_as_it_is_cancelled_is_woken_once(first):
    machine = Machine()
    machine.host.offers = [offer(1)]
    machine.host.on_packet = lambda channel, packet: None
    async with boot(machine, LINUX_6_1) as guest:
        (found,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(found, ring_pages=4)
        outcomes = []

        async def request() -> None:
            try:
                await channel.request(b"")
            except trio.BrokenResourceError:
                outcomes.append("ended")
            except trio.Cancelled:
                outcomes.append("cancelled")
                raise

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request)
            await trio.testing.wait_all_tasks_blocked()
            steps = [
                nursery.cancel_scope.cancel,
                lambda: channel.end(trio.BrokenResourceError("the channel is gone")),
            ]
            for step in steps if first == "cancelled" else reversed(steps):
                step()
        assert outcomes == [first]
