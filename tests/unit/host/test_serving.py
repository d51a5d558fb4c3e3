"""The loop of a device that answers requests: batches, sub-channels, and their ends."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE
from tests.support.turns import Work, watched
from vmbus.errors import RingError, leaves
from vmbus.host.serving import BATCH, MOST_PARTS, Life
from vmbus.memory import GuestMemory
from vmbus.testing import LoneHost, channel_pair, make_offer
from vmbus.wire.packets import IN_BAND, build_packet
from vmbus.workers import _owner


def request(transaction_id: int) -> bytes:
    return build_packet(IN_BAND, bytes(8), transaction_id=transaction_id, flags=1)


class Answers:
    """Answers odd requests at once and even ones when told to."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.batches: list[int] = []
        self.late = 0

    def serve(self, channel, packets, nursery):
        self.batches.append(len(packets))
        for packet in packets:
            if packet.transaction_id % 2:
                channel.complete(packet.transaction_id, b"now")
            else:
                nursery.start_soon(self.later, channel, packet.transaction_id)

    async def later(self, channel, transaction_id):
        await self.go.wait()
        self.late += 1
        channel.complete(transaction_id, b"later")
        await channel.flush()


async def test_what_came_together_is_served_together_and_answered_with_one_signal():
    channel, guest = channel_pair()
    answers = Answers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, answers.serve).run)
        guest.send(*(request(number) for number in (1, 3, 5)))
        await trio.testing.wait_all_tasks_blocked()
        assert answers.batches == [3]
        assert [packet.transaction_id for packet in guest.receive_nowait()] == [1, 3, 5]
        assert guest.interrupts == 1
        channel.end()
    channel.close_doorbell()


async def test_a_life_ends_when_the_requests_that_wait_have_ended():
    channel, guest = channel_pair()
    answers = Answers()
    over = trio.Event()

    async def run():
        await Life(channel, answers.serve).run()
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        guest.send(request(2), request(4))
        await trio.testing.wait_all_tasks_blocked()
        channel.end()
        await trio.testing.wait_all_tasks_blocked()
        assert not over.is_set(), "tasks of this life may still use guest memory"
        answers.go.set()
        await over.wait()
    assert answers.late == 2
    channel.close_doorbell()


async def test_sub_channels_are_served_and_given_back_when_they_end():
    primary, _ = channel_pair()
    branch, guest = channel_pair()
    answers = Answers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(primary, answers.serve).run)
        primary.deliver_subchannel(branch)
        guest.send(request(7))
        assert [packet.transaction_id for packet in await guest.receive()] == [7]
        branch.end()
        await branch.wait_released()
        primary.end()
    for each in (primary, branch):
        each.close_doorbell()


async def test_a_corrupt_sub_channel_ends_alone_and_the_bus_hears_of_it():
    primary, guest = channel_pair()
    host = LoneHost(GuestMemory())
    branch, branch_guest = channel_pair(host=host)
    answers = Answers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(primary, answers.serve).run)
        primary.deliver_subchannel(branch)
        branch_guest.memory.page(0)[:4] = b"\xff" * 4  # write index
        branch_guest.ring_doorbell()
        await branch.wait_released()
        assert len(host.complaints) == 1
        guest.send(request(1))
        assert [packet.transaction_id for packet in await guest.receive()] == [1]
        primary.end()
    for each in (primary, branch):
        each.close_doorbell()


async def test_a_corrupt_primary_ends_the_life():
    primary, guest = channel_pair()
    guest.memory.page(0)[:4] = b"\xff" * 4
    guest.ring_doorbell()
    with pytest.raises(BaseExceptionGroup) as caught:
        await Life(primary, Answers().serve).run()
    assert [type(each) for each in leaves(caught.value)] == [RingError]
    primary.close_doorbell()


async def test_what_nobody_asked_for_is_flushed_in_a_task_of_the_life():
    channel, guest = channel_pair()
    life = Life(channel, Answers().serve)
    channel.send(b"too early")
    life.flush_soon()
    assert channel.pending == 1, "there is no life yet"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.run)
        await trio.testing.wait_all_tasks_blocked()
        life.flush_soon()
        assert channel.pending == 1, "not in the caller's own turn"
        assert len(await guest.receive()) == 1
        channel.end()
    channel.close_doorbell()


async def test_a_life_that_is_over_takes_no_more_tasks():
    """Whoever adds a disk in the moment in which a ring turns out to be corrupt gets no error."""
    primary, guest = channel_pair()
    life = Life(primary, Answers().serve)

    async def run() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            await life.run()
        assert [type(each) for each in leaves(caught.value)] == [RingError]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        guest.memory.page(0)[:4] = b"\xff" * 4
        guest.ring_doorbell()
        for _ in range(50):  # in each turn of its end
            life.flush_soon()
            await trio.lowlevel.checkpoint()
    primary.close_doorbell()


async def test_a_device_that_has_done_enough_gets_the_rest_when_others_had_their_turn():
    channel, guest = channel_pair()
    seen = []
    work = Work()

    def serve(channel, packets, nursery):
        work.done()
        seen.append([packet.transaction_id for packet in packets])
        for packet in packets[:2]:
            channel.complete(packet.transaction_id, b"")
        return 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, serve).run)
        guest.send(*(request(number) for number in range(1, 6)))
        with watched(work):
            await trio.testing.wait_all_tasks_blocked()
        assert seen == [[1, 2, 3, 4, 5], [3, 4, 5], [5]]
        assert work.most_in_turn == 1, "it is not called again before others were"
        assert [packet.transaction_id for packet in guest.receive_nowait()] == [1, 2, 3, 4, 5]
        assert channel.outstanding == 0
        channel.end()
    channel.close_doorbell()


async def test_channels_of_a_guest_are_parts_of_it_to_the_worker_threads():
    """Its controllers have channels of their own and the same memory; a neighbour has another."""
    owners: dict[str, object] = {}

    async def look(name, channel):
        owners[name] = _owner.get()
        channel.complete(2, b"")

    async def serve(name, channel, guest):
        def act(_channel, _packets, nursery):
            nursery.start_soon(look, name, channel)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(Life(channel, act).run)
            guest.send(request(2))
            while name not in owners:
                await trio.sleep(0)
            channel.end()

    for name in ("one", "other"):
        channel, guest = channel_pair()
        await serve(name, channel, guest)
        assert owners[name] == (channel.memory, channel)
        channel.close_doorbell()
    assert owners["one"] != owners["other"]


async def test_the_rest_of_a_batch_waits_while_undertakings_weigh_too_much_and_a_pause_takes_none():
    channel, guest = channel_pair()
    channel.undertakings.load.limit = 1000
    seen: list[list[int]] = []
    heavy = []

    def serve(channel, packets, _nursery):
        seen.append([packet.transaction_id for packet in packets])
        heavy.append(channel.undertakings.begin(1000, lambda: "heavy"))
        channel.complete(packets[0].transaction_id, b"")
        return 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, serve).run)
        guest.send(*(request(number) for number in (1, 2, 3)))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [[1, 2, 3]]
        heavy.pop().end()
        await trio.testing.wait_all_tasks_blocked()
        assert seen[1:] == [[2, 3]]
        channel.hold()
        await trio.testing.wait_all_tasks_blocked()
        await channel.pause()
        assert seen[2:] == [], "what was put back is not under way"
        for each in heavy:
            each.end()
        channel.end()
    channel.close_doorbell()


class OneByOne:
    """Acts on one packet in a turn, and answers it if asked to."""

    def __init__(self, answer: bytes = b"") -> None:
        self.served: list[int] = []
        self._answer = answer

    def serve(self, channel, packets, nursery):
        packet = packets[0]
        self.served.append(packet.transaction_id)
        if packet.wants_completion:
            channel.complete(packet.transaction_id, self._answer)
        return 1


@asynccontextmanager
async def one_by_one(*, flags: int, answer: bytes = b""):
    """A batch of 20 packets, of which the first has been acted on."""
    channel, guest = channel_pair()
    device = OneByOne(answer)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            life = Life(channel, device.serve)
            nursery.start_soon(life.run)
            packets = [
                build_packet(IN_BAND, bytes(8), transaction_id=number, flags=flags)
                for number in range(20)
            ]
            assert guest.send(*packets) == 20
            while not device.served:
                await trio.lowlevel.checkpoint()
            yield channel, guest, device
            channel.end()
    channel.close_doorbell()


@pytest.mark.parametrize("flags", [0, 1])
async def test_what_is_left_of_a_batch_is_not_acted_on_while_the_channel_is_paused(flags):
    async with one_by_one(flags=flags) as (channel, guest, device):
        await channel.pause()
        done = len(device.served)
        assert done < 20
        await trio.testing.wait_all_tasks_blocked()
        assert len(device.served) == done
        channel.resume()
        await trio.testing.wait_all_tasks_blocked()
        assert device.served == [*range(20)]
        answers = [each.transaction_id for each in guest.receive_nowait()]
        assert answers == ([*range(20)] if flags else [])
        assert channel.outstanding == 0


async def test_a_pause_does_not_wait_for_the_guest_to_make_room_for_the_answers_of_a_batch():
    async with one_by_one(flags=1, answer=bytes(10_000)) as (channel, guest, device):
        await trio.testing.wait_all_tasks_blocked()
        assert len(device.served) < 20, "the ring is full"
        await channel.pause()
        channel.resume()
        answers = 0
        while answers < 20:
            answers += len(await guest.receive())
        assert device.served == [*range(20)]


@pytest.mark.parametrize("flags", [0, 1])
async def test_draining_waits_for_what_is_left_of_a_batch(flags):
    async with one_by_one(flags=flags) as (channel, guest, device):
        await channel.drain()
        assert device.served == [*range(20)]
        assert len(guest.receive_nowait()) == 20 * flags
        guest.send(request(99))
        await trio.testing.wait_all_tasks_blocked()
        assert len(device.served) == 20, "nothing more is taken"


async def test_what_is_left_of_a_batch_waits_for_the_limit_of_requests():
    channel, guest = channel_pair(max_outstanding=1)
    begun: list[int] = []

    def serve(_channel, packets, _nursery):
        begun.append(packets[0].transaction_id)
        return 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Life(channel, serve).run)
        guest.send(request(1), request(2))
        await trio.testing.wait_all_tasks_blocked()
        assert begun == [1]
        channel.complete(1, b"")
        await trio.testing.wait_all_tasks_blocked()
        assert begun == [1, 2]
        channel.end()
    channel.close_doorbell()


async def test_nothing_is_kept_of_a_sub_channel_that_has_ended():
    primary, _ = channel_pair()
    life = Life(primary, Answers().serve)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.run)
        for _ in range(3):
            branch, _guest = channel_pair()
            primary.deliver_subchannel(branch)
            await trio.testing.wait_all_tasks_blocked()
            branch.end()
            await branch.wait_released()
            branch.close_doorbell()
        assert [*life._load._parts] == [primary.undertakings.load]
        primary.end()
    primary.close_doorbell()


async def test_channels_that_are_busy_share_a_turn_and_one_alone_has_it_all():
    primary, guest = channel_pair(offer=make_offer(max_subchannels=7))
    branches = [channel_pair() for _ in range(7)]
    answers = Answers()
    life = Life(primary, answers.serve)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.run)
        for branch, _ in branches:
            primary.deliver_subchannel(branch)
        await trio.testing.wait_all_tasks_blocked()
        full = [request(1)] * 2 * BATCH
        for _, each in branches:
            assert each.send(*full) == len(full)
        await trio.testing.wait_all_tasks_blocked()
        assert sum(answers.batches) == 7 * len(full)
        # Before it is known that they are busy, and when the last ones are, they get more.
        assert answers.batches.count(BATCH // MOST_PARTS) > len(answers.batches) // 2
        for _, each in branches:
            each.receive_nowait()
            each.send(request(1))
        await trio.testing.wait_all_tasks_blocked()
        assert life.parts == 1
        answers.batches.clear()
        guest.send(*full)
        await trio.testing.wait_all_tasks_blocked()
        assert answers.batches[0] == BATCH
        primary.end()
    for channel, _ in ((primary, guest), *branches):
        channel.close_doorbell()
