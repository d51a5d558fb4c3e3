"""Observers: they hear everything in order, cost nothing when they are not there, harm nobody."""

from __future__ import annotations

import logging

import pytest
import trio

from tests.support.worlds import EchoDevice, RawGuest, world
from vmbus.host.observer import Observer, Observers
from vmbus.testing import channel_pair
from vmbus.wire import messages as m
from vmbus.wire.messages import Direction
from vmbus.wire.packets import IN_BAND, build_packet


class Everything(Observer):
    """Writes down what it hears."""

    def __init__(self):
        self.heard = []

    def control(self, direction, payload):
        who = "guest" if direction is Direction.GUEST_TO_HOST else "host"
        self.heard.append((who, int.from_bytes(payload[:4], "little")))

    def channel_opened(self, channel):
        self.heard.append(("opened", channel.relid))

    def channel_ended(self, channel):
        self.heard.append(("ended", channel.relid))

    def packets_in(self, channel, packets):
        self.heard += [("in", packet.transaction_id) for packet in packets]

    def packets_out(self, channel, packets):
        self.heard += [("out", len(packet)) for packet in packets]

    def signal(self, channel, direction):
        self.heard.append(("signal", direction))

    def fault(self, relid, text):
        self.heard.append(("fault", relid, text))


class Faults(Observer):
    def __init__(self):
        self.heard = []

    def fault(self, relid, text):
        self.heard.append(text)


async def test_a_whole_life_is_heard_in_order():
    device = EchoDevice(1)
    async with world(device) as there:
        observer = Everything()
        there.bus.observe(observer)
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        device.lives[0].send(bytes(8))
        await device.lives[0].flush()
        await guest.post(m.CloseChannel(relid=1))
        await there.settle()
        assert [what for what in observer.heard if what[0] != "signal"] == [
            ("guest", m.InitiateContact.TYPE),
            ("host", m.VersionResponse.TYPE),
            ("guest", m.RequestOffers.TYPE),
            ("host", m.OfferChannel.TYPE),
            ("host", m.AllOffersDelivered.TYPE),
            ("guest", m.GpadlHeader.TYPE),
            ("host", m.GpadlCreated.TYPE),
            ("guest", m.OpenChannel.TYPE),
            ("opened", 1),
            ("host", m.OpenChannelResult.TYPE),
            ("out", 24),
            ("guest", m.CloseChannel.TYPE),
            ("ended", 1),
        ]
        assert ("signal", Direction.HOST_TO_GUEST) in observer.heard


async def test_packets_and_signals_of_both_directions_are_heard():
    channel, guest = channel_pair()
    observer = Everything()
    observers = Observers(lambda: None)
    observers.add(observer)
    channel.observe(observers)
    request = build_packet(IN_BAND, b"12345678", transaction_id=5, flags=1)
    async with trio.open_nursery() as nursery:

        async def serve():
            for packet in await channel.receive_batch():
                channel.complete(packet.transaction_id, b"")
            await channel.flush()

        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        guest.send(request)
    assert observer.heard == [
        ("signal", Direction.GUEST_TO_HOST),
        ("in", 5),
        ("out", 16),
        ("signal", Direction.HOST_TO_GUEST),
    ]
    channel.close_doorbell()


async def test_a_channel_has_an_observer_only_while_somebody_listens_to_rings():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        channel = device.lives[0]
        assert channel.observer is None
        stop_faults = there.bus.observe(Faults())
        assert channel.observer is None, "who hears faults only makes no channel slower"
        stop = there.bus.observe(Everything())
        assert channel.observer is not None
        stop()
        stop()
        assert channel.observer is None
        stop_faults()


async def test_faults_and_complaints_of_devices_are_heard_and_counted():
    device = EchoDevice(1)
    async with world(device) as there:
        observer = Faults()
        there.bus.observe(observer)
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(m.CloseChannel(relid=9))
        await guest.open()
        device.lives[0].complain("no such command", 0x42)
        assert observer.heard[-1] == "transaction 0x42: no such command"
        assert len(observer.heard) == there.bus.faults == there.bus.snapshot()["faults"] == 2
        (channel,) = there.bus.snapshot()["channels"]
        assert channel["complaints"] == 1


@pytest.mark.parametrize("kind", ["control", "packets_in", "fault"])
async def test_an_observer_that_fails_is_dropped_and_logged_and_the_others_hear_on(kind, caplog):
    class Broken(Everything):
        pass

    def fail(self, *_arguments):
        raise RuntimeError("broken observer")

    setattr(Broken, kind, fail)
    changes = []
    observers = Observers(lambda: changes.append(1))
    observers.add(Broken())
    good = Everything()
    observers.add(good)
    with caplog.at_level(logging.ERROR, "vmbus.bus"):
        for _ in range(3):
            observers.control(Direction.GUEST_TO_HOST, b"\1\0\0\0")
            observers.packets_in(channel_like(), [])
            observers.fault(None, "text")
    assert caplog.text.count("an observer failed and hears no more") == 1
    assert "broken observer" in caplog.text
    assert good.heard.count(("fault", None, "text")) == 3
    assert len(changes) == 3, "two came and one went"


def channel_like():
    return channel_pair.__class__  # nobody looks at it


async def test_the_same_observer_may_listen_twice():
    observers = Observers(lambda: None)
    observer = Faults()
    first = observers.add(observer)
    observers.add(observer)
    observers.fault(None, "once")
    assert observer.heard == ["once", "once"]
    first()
    observers.fault(1, "more")
    assert observer.heard == ["once", "once", "more"]
