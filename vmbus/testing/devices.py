"""What every device owes its bus, as a check that anybody can run on theirs."""

from __future__ import annotations

import json
from collections.abc import Callable

import trio
import trio.testing

from vmbus.errors import GuestProtocolError
from vmbus.host.device import Device
from vmbus.testing.channels import GuestEnd, channel_pair
from vmbus.wire.packets import COMPLETION, FLAG_COMPLETION_REQUESTED, IN_BAND, build_packet

GRACE = 10.0
"""Seconds a device gets for each step; far more than any needs."""

# Payloads that no device protocol defines: empty, odd, long, and full of ones.
HOSTILE = (b"", b"\xff" * 8, b"\0" * 64, b"\xff" * 64, bytes(range(256)) * 4)


async def check_device(make: Callable[[], Device]) -> None:
    """Run a device through several lives. Is a checkpoint.

    Checked are: the offer is constant; ``run`` returns when the channel ends, also in the middle
    of requests, and can be called again; every request with the completion flag gets exactly one
    completion with its transaction id, 0 and 2**64 - 1 included, whatever its payload, and none
    without it; ``snapshot`` is JSON at every moment; ``aclose`` is idempotent.

    A device may end its life over a hostile packet with :class:`GuestProtocolError`; then it owes
    no completion.

    Args:
        make: Makes a new device each time it is called.

    Raises:
        AssertionError: Says what was promised and what was seen.
    """
    device = make()
    _expect(device.offer == device.offer, "the offer is constant")
    for payload in (None, *HOSTILE):
        await _live_once(device, payload)
    await device.aclose()
    await device.aclose()
    json.dumps(device.snapshot())


async def _live_once(device: Device, payload: bytes | None) -> None:
    channel, guest = channel_pair(offer=device.offer)
    broken = False
    finished = trio.Event()

    async def run() -> None:
        nonlocal broken
        try:
            await device.run(channel)
        except* (GuestProtocolError, trio.EndOfChannel) as group:
            broken = group.subgroup(GuestProtocolError) is not None
        finished.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        json.dumps(device.snapshot())
        if payload is not None:
            await _exchange(guest, payload, finished)
        channel.end()
        with trio.move_on_after(GRACE) as scope:
            await finished.wait()
        _expect(not scope.cancelled_caught, "run() returns when its channel has ended")
        nursery.cancel_scope.cancel()
    channel.close_doorbell()
    channel.release_rings()


async def _exchange(guest: GuestEnd, payload: bytes, finished: trio.Event) -> None:
    wanted = [0, (1 << 64) - 1, 5]
    guest.send(build_packet(IN_BAND, payload, transaction_id=77))
    guest.send(
        *(
            build_packet(IN_BAND, payload, transaction_id=each, flags=FLAG_COMPLETION_REQUESTED)
            for each in wanted
        )
    )
    seen: list[int] = []
    with trio.move_on_after(GRACE):
        while len(seen) < len(wanted) and not finished.is_set():
            await trio.testing.wait_all_tasks_blocked()
            seen += [
                each.transaction_id for each in guest.receive_nowait() if each.kind == COMPLETION
            ]
    await trio.testing.wait_all_tasks_blocked()
    seen += [each.transaction_id for each in guest.receive_nowait() if each.kind == COMPLETION]
    if not finished.is_set():
        _expect(
            sorted(seen) == sorted(wanted),
            f"one completion for each request that wants one: {wanted} asked, {seen} answered",
        )


def _expect(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(f"broken promise: {promise}")
