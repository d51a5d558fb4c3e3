"""The queue of events between a link and its handler."""

from __future__ import annotations

import trio

from vmbus.attach.server.events import EventQueue
from vmbus.partition.events import PartitionReset, PostedMessage


async def test_events_come_in_order_and_end() -> None:
    granted: list[int] = []
    begun: list[int] = []
    events = EventQueue(4, granted.append, lambda: begun.append(1))
    post = PostedMessage(1, 1, 0, b"", events.message_done)
    reset = PartitionReset(lambda: None)
    for _ in range(2):
        events.take_credit()
        events.put(post)
    events.put(reset)
    assert begun == []
    assert [await anext(events) for _ in range(3)] == [post, post, reset]
    assert begun == [1]
    assert granted == []
    post.done()
    post.done()
    assert granted == [1, 1]
    events.drop_messages()
    events.put(reset)
    events.end()
    events.end()
    post.done()
    assert granted == [1, 1]
    assert [event async for event in events] == []


async def test_waiting_for_an_event_is_woken_by_the_end() -> None:
    events = EventQueue(4, lambda _: None, lambda: None)
    async with trio.open_nursery() as nursery:

        async def consume() -> None:
            assert [event async for event in events] == []

        nursery.start_soon(consume)
        await trio.testing.wait_all_tasks_blocked()
        events.end()
