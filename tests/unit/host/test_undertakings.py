"""Requests that take their time: weighed, held up, at rest or not, and named."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from vmbus.host import undertakings
from vmbus.host.serving import Life
from vmbus.host.undertakings import Load, Undertakings
from vmbus.testing import channel_pair
from vmbus.wire.packets import IN_BAND, build_packet


def request(transaction_id: int) -> bytes:
    return build_packet(IN_BAND, bytes(8), transaction_id=transaction_id, flags=1)


class Slow:
    """A device whose requests are undertakings that wait to be let through."""

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.go = trio.Event()
        self.acting = 0
        self.begun: list[int] = []

    def serve(self, channel, packets, nursery):
        for packet in packets:
            self.begun.append(packet.transaction_id)
            nursery.start_soon(self.work, channel, packet.transaction_id)

    async def work(self, channel, number):
        undertaking = channel.undertakings.begin(self.weight, lambda: f"request {number}")
        try:
            await undertaking.enter()
            self.acting += 1
            try:
                await self.go.wait()
            finally:
                self.acting -= 1
                undertaking.leave()
        except trio.EndOfChannel:
            return
        finally:
            undertaking.end()
        channel.complete(number, b"")
        await channel.flush()


async def test_a_ring_is_not_read_while_what_waits_is_too_heavy(monkeypatch):
    """Requests are weighed, not counted: a few can hold as much as thousands."""
    monkeypatch.setattr(undertakings, "CHANNEL_LOAD", 1000)
    channel, guest = channel_pair()
    device = Slow(weight=600)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, device.serve).run)
        for number in range(1, 6):
            guest.send(request(number))
            await trio.testing.wait_all_tasks_blocked()
        assert device.begun == [1, 2], "the others are in the ring still"
        device.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert device.begun == [1, 2, 3, 4, 5], "and none of them is lost"
        assert channel.undertakings.load.total == 0
        channel.end()
    channel.close_doorbell()


async def test_channels_of_a_device_have_a_limit_together_and_free_each_other():
    whole = Load(1000)
    told: list[str] = []
    parts = {name: Load(700, lambda name=name: told.append(name)) for name in "abc"}  # type: ignore[misc]
    for part in parts.values():
        part.part_of(whole)
    parts["a"].change(600)
    assert not any(part.full for part in parts.values())
    parts["b"].change(600)
    assert all(part.full for part in parts.values()), "c holds nothing, and is not read either"
    parts["a"].change(-600)
    assert sorted(told) == ["a", "b", "c"]
    parts["b"].change(200)
    assert [name for name, part in parts.items() if part.full] == ["b"]
    parts["b"].part_of(None)
    assert whole.total == 0
    assert parts["b"].full
    parts["b"].part_of(whole)
    assert whole.total == 800


async def test_a_channel_of_a_device_that_is_full_is_read_when_another_one_has_ended():
    device = Slow(weight=undertakings.DEVICE_LOAD)
    channel, guest = channel_pair()
    other, other_guest = channel_pair()
    life = Life(channel, device.serve)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life._serve, channel)
        nursery.start_soon(life._serve, other)
        guest.send(request(1))
        await trio.testing.wait_all_tasks_blocked()
        other_guest.send(request(2))
        await trio.testing.wait_all_tasks_blocked()
        assert device.begun == [1]
        device.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert device.begun == [1, 2]
        channel.end()
        other.end()
    for each in (channel, other):
        each.close_doorbell()


async def test_a_pause_waits_for_what_acts_and_not_for_what_rests():
    channel, guest = channel_pair()
    device = Slow(weight=1)
    paused = trio.Event()

    async def pause():
        await channel.pause()
        paused.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, device.serve).run)
        guest.send(request(1))
        await trio.testing.wait_all_tasks_blocked()
        assert device.acting == 1
        assert channel.undertakings.names == ["request 1"]
        resting = channel.undertakings.begin(1, lambda: "at rest")
        channel._outstanding += 1  # its request
        nursery.start_soon(pause)
        await trio.testing.wait_all_tasks_blocked()
        assert not paused.is_set()
        device.go.set()
        await paused.wait()
        entered = trio.Event()

        async def enter():
            await resting.enter()
            entered.set()

        nursery.start_soon(enter)
        await trio.testing.wait_all_tasks_blocked()
        assert not entered.is_set()
        assert resting.held
        channel.resume()
        await entered.wait()
        assert not resting.held, "what acts goes on"
        channel.undertakings.hold()
        await resting.enter()  # a part of what it does
        resting.leave()
        resting.leave()
        resting.end()
        channel.end()
    channel.close_doorbell()


async def test_draining_waits_for_the_answers_of_what_rests():
    """A pause ends, a removal does not: what has begun is answered before."""
    channel, guest = channel_pair()
    device = Slow(weight=1)
    drained = trio.Event()

    async def drain():
        await channel.drain()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, device.serve).run)
        guest.send(request(1))
        await trio.testing.wait_all_tasks_blocked()
        undertaking = channel.undertakings.begin(1, str)
        channel._outstanding += 1
        nursery.start_soon(drain)
        device.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not drained.is_set()
        await undertaking.enter()  # is not held up
        undertaking.leave()
        undertaking.end()
        channel.complete(2, b"")
        await drained.wait()
        channel.end()
    channel.close_doorbell()


async def test_nothing_acts_any_more_when_the_channel_is_over():
    all_of_them = Undertakings(lambda: None, lambda: None)
    acting, waiting, held = (all_of_them.begin(1, str) for _ in range(3))
    ended: list[str] = []
    await acting.enter()

    async def wait():
        with pytest.raises(trio.EndOfChannel):
            await waiting.rest(trio.sleep_forever)
        ended.append("waiting")

    async def hold():
        with pytest.raises(trio.EndOfChannel):
            await held.enter()
        ended.append("held")

    async with trio.open_nursery() as nursery:
        all_of_them.hold()
        nursery.start_soon(wait)
        nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()
        assert all_of_them.resting == 2
        all_of_them.end()
    assert sorted(ended) == ["held", "waiting"]
    assert held.over
    assert not acting.over
    await acting.enter()
    for _ in range(2):
        acting.leave()
    with pytest.raises(trio.EndOfChannel):
        await acting.enter()
    with pytest.raises(trio.EndOfChannel):
        await acting.rest(trio.lowlevel.checkpoint)


async def test_what_rests_in_the_middle_of_an_action_is_held_up_before_it_goes_on():
    settled: list[int] = []
    all_of_them = Undertakings(lambda: settled.append(all_of_them.resting), lambda: None)
    undertaking = all_of_them.begin(1, str)
    go = trio.Event()
    over: list[bool] = []

    async def act():
        await undertaking.enter()
        await undertaking.rest(go.wait)
        over.append(True)
        undertaking.leave()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(act)
        await trio.testing.wait_all_tasks_blocked()
        assert settled == [1]
        all_of_them.hold()
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not over
        assert all_of_them.resting == 1
        all_of_them.go_on()
    assert over
    assert all_of_them.resting == 1
    assert not all_of_them.names


async def test_what_is_no_undertaking_can_wait_as_well():
    """A packet that comes from elsewhere holds nothing, but must not touch a paused guest."""
    channel, _guest = channel_pair()
    assert not channel.undertakings.held
    await channel.undertakings.wait_released()
    channel.stand_still()
    assert channel.undertakings.held
    seen: list[str] = []

    async def wait() -> None:
        try:
            await channel.undertakings.wait_released()
            seen.append("released")
        except trio.EndOfChannel:
            seen.append("over")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        channel.resume()
    channel.stand_still()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        channel.end()
    assert seen == ["released", "over"]
    channel.close_doorbell()
