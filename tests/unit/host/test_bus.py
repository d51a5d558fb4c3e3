"""The bus: what its users call, and what partitions do to it."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE, until, waits
from tests.support.worlds import (
    EchoDevice,
    FailingTransport,
    RawGuest,
    TapTransport,
    World,
    numbers,
    world,
)
from vmbus.engine import Budgets, EngineConfig
from vmbus.engine.channels import connection_id_of
from vmbus.errors import AttachError, BudgetError, ConfigError, GuestProtocolError
from vmbus.guest import LINUX_6_1
from vmbus.host import BusConfig, open_bus
from vmbus.partition.events import PartitionEvent
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire import messages as m
from vmbus.wire.packets import IN_BAND, build_packet
from vmbus.wire.versions import Version


@pytest.fixture
async def machine() -> AsyncIterator[SoftMachine]:
    made = SoftMachine(((0, 8 << 20),), vp_count=2)
    yield made
    made.close()


async def test_an_empty_bus_comes_and_goes():
    async with world() as there:
        assert there.bus.devices == {}
        assert there.bus.snapshot()["version"] is None


async def test_devices_have_numbers_for_good():
    first, second = EchoDevice(1), EchoDevice(2)
    async with world(first) as there:
        number = there.bus.add_device(second)
        assert there.bus.devices == {1: first, number: second}
        await there.bus.remove_device(1)
        assert there.bus.devices == {number: second}
        assert there.bus.add_device(first) not in {1, number}
    assert (first.closed, second.closed) == (2, 1)


async def test_an_instance_can_be_there_once():
    devices = [EchoDevice(1), EchoDevice(1), EchoDevice(3)]
    with pytest.raises(ConfigError, match="is on the bus already"):
        async with world(*devices):
            raise AssertionError("there is no bus")
    assert [device.closed for device in devices] == [1, 1, 1]


async def test_a_full_bus_takes_no_more():
    config = BusConfig(engine=EngineConfig(budgets=Budgets(max_channels=1)))
    async with world(EchoDevice(1), config=config) as there:
        with pytest.raises(BudgetError):
            there.bus.add_device(EchoDevice(2))


@pytest.mark.parametrize("error", [AttachError("no"), trio.BrokenResourceError("gone")])
async def test_a_partition_without_message_ports_is_no_bus(machine, error):
    device = EchoDevice()
    with pytest.raises(type(error)):
        async with open_bus(FailingTransport(machine.synic, message_port=error), [device]):
            raise AssertionError("there is no bus")
    assert device.closed == 1


async def test_a_device_that_cannot_be_closed_is_logged_and_the_others_are_closed(caplog):
    class Stuck(EchoDevice):
        async def aclose(self) -> None:
            raise OSError("stuck")

    other = EchoDevice(2)
    async with world(Stuck(1), other):
        pass
    assert other.closed == 1
    assert "closing a device failed" in caplog.text


async def test_the_version_can_be_waited_for():
    versions: list[Version] = []
    async with world() as there, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            versions.append(await there.bus.wait_version())

        await there.settle()
        guest = RawGuest(there)
        await guest.contact(Version.V4_1)
        await there.settle()
        assert versions == [Version.V4_1]
        assert await there.bus.wait_version() == Version.V4_1
        await guest.post(m.Unload())
        assert await waits(there.bus.wait_version)


async def test_a_snapshot_is_json_at_every_moment():
    device = EchoDevice(1, sub_channels=1, monitor=100)
    async with world(device) as there:

        def look() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(json.dumps(there.bus.snapshot()))
            return found

        assert look()["channels"] == []
        guest = RawGuest(there)
        await guest.connect()
        (raw,) = await guest.open()
        relid = guest.parse(raw).relid
        await guest.post(*guest.gpadl(relid, 8, range(0x80, 0x88)))
        await guest.post(guest.open_message(relid, 8, 4))
        channels = look()["channels"]
        assert [(c["device"], c["relid"], c["subchannel_index"]) for c in channels] == [
            (1, 1, 0),
            (1, relid, 1),
        ]
        await there.transport.pause()
        assert look()["paused"]
        await there.transport.resume()
        await guest.post(m.Unload())
        assert look()["version"] is None
        assert look()["channels"] == []


async def test_messages_of_other_types_are_faults():
    async with world() as there:
        guest = RawGuest(there)
        assert guest.synic.post(1, b"", message_type=5) == 0
        await there.settle()
        assert there.bus.snapshot()["faults"] == 1


async def test_connect_requests_are_for_the_listener():
    asked: list[Any] = []
    held: list[Any] = []

    def listen(event: Any) -> bool:
        asked.append(event.service.int)
        held[0].bus.add_device(EchoDevice(7, flags=0x2001))
        return bool(event.service.int == 1)

    config = BusConfig(engine=EngineConfig(hv_sock=True))
    async with world(config=config, tl_listener=listen) as there:
        held.append(there)
        guest = RawGuest(there)
        await guest.connect()
        replies = await guest.post(
            m.TlConnectRequest(endpoint_id=uuid.UUID(int=9), service_id=uuid.UUID(int=1))
        )
        assert asked == [1]
        # The offer comes behind what was to be said before it.
        assert numbers(replies)[0] == m.OfferChannel.TYPE


async def test_connect_requests_without_a_listener_are_refused():
    async with world(config=BusConfig(engine=EngineConfig(hv_sock=True))) as there:
        guest = RawGuest(there)
        await guest.connect()
        replies = await guest.post(
            m.TlConnectRequest(endpoint_id=uuid.UUID(int=9), service_id=uuid.UUID(int=1))
        )
        assert numbers(replies) == [m.TlConnectResult.TYPE]
        assert guest.parse(replies[0]).status != 0


async def test_devices_find_the_gpadls_of_their_channel():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        await guest.post(*guest.gpadl(1, 9, [0x90, 0x92, 0x91]))
        await there.settle()
        channel = device.lives[0]
        lease = channel.lease_gpadl(9)
        assert lease.gpadl.pages == (0x90, 0x92, 0x91)
        lease.release()
        with pytest.raises(GuestProtocolError, match="does not exist"):
            channel.lease_gpadl(10)


@pytest.mark.parametrize("version", [Version.V0_13, Version.V1_1])
async def test_old_guests_ring_by_page(version):
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect(version)
        await guest.open()
        await there.settle()
        seen: list[int] = []
        device.on_packet = lambda channel, packet: seen.append(packet.transaction_id)
        packet = build_packet(IN_BAND, bytes(8), transaction_id=9)
        memory = there.machine.memory
        memory.write(0x41000, packet + bytes(8))
        memory.page(0x40).cast("I")[0] = len(packet) + 8
        memory.page(0x10)[2048] = 2
        connection = 2 if version is Version.V0_13 else connection_id_of(1)
        assert guest.synic.signal(connection) == 0
        await there.settle()
        assert seen == [9]
        assert memory.page(0x10)[2048] == (0 if version is Version.V0_13 else 2)
        device.lives[0].send(bytes(8))
        await device.lives[0].flush()
        assert memory.page(0x10)[0] == 2
        assert guest.synic.flags() == {0}


async def test_a_vmm_without_a_port_for_0_13_costs_a_channel_and_no_more(machine):
    device = EchoDevice(1)
    transport = FailingTransport(machine.synic, event_port=AttachError("no such id here"))
    with trio.fail_after(PATIENCE), transport:
        async with open_bus(transport, [device]) as bus:
            guest = RawGuest(World(machine, transport, bus))
            await guest.connect(Version.V0_13)
            await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
            (raw,) = await guest.post(guest.open_message(1, 7, 4))
            assert guest.parse(raw).status != 0
            transport.fails.clear()
            (raw,) = await guest.post(guest.open_message(1, 7, 4))
            assert guest.parse(raw).status == 0
            assert len(device.lives) == 1


async def test_faults_are_logged_for_a_while_and_counted_for_ever(caplog):
    caplog.set_level(logging.WARNING)
    async with world() as there:
        guest = RawGuest(there)
        await guest.contact()
        for _ in range(300):
            while guest.post_bytes(b"junk"):
                await there.settle()
        await there.settle()
        assert there.bus.snapshot()["faults"] == 300
        assert 0 < len(caplog.records) < 100


async def test_what_comes_after_the_end_is_not_listened_to():
    """The guest closes one channel while the bus waits for the device of another."""
    quick, slow = EchoDevice(1), EchoDevice(2)

    class Slow(EchoDevice):
        async def serve(self, channel: Any) -> None:
            try:
                await super().serve(channel)
            finally:
                with trio.CancelScope(shield=True):
                    await hold.wait()

    hold = trio.Event()
    slow = Slow(2)
    posted: list[int] = []
    async with trio.open_nursery() as nursery, world(quick, slow) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open(1)
        await guest.post(*guest.gpadl(2, 8, range(0x80, 0x88)))
        await guest.post(guest.open_message(2, 8, 4))

        @nursery.start_soon
        async def late() -> None:
            runners = there.bus.runners
            await until(lambda: 1 not in {each.event.relid for each in runners.values()})
            messages = (m.CloseChannel(relid=1), guest.open_message(1, 7, 4), m.Unload())
            posted.extend(guest.post_bytes(guest.build(message)) for message in messages)
            await there.settle()
            hold.set()

    assert len(posted) == 3
    assert quick.closed == slow.closed == 1


async def test_a_reset_that_crosses_the_end_is_answered():
    class Slow(EchoDevice):
        async def serve(self, channel: Any) -> None:
            try:
                await super().serve(channel)
            finally:
                with trio.CancelScope(shield=True):
                    await hold.wait()

    hold = trio.Event()
    async with trio.open_nursery() as nursery, world(Slow(1), EchoDevice(2)) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open(1)
        nursery.start_soon(there.transport.reset)
        await there.settle()
        assert there.bus.runners
        hold.set()


async def test_events_that_lead_to_events_come_in_order():
    async with world(EchoDevice(1), EchoDevice(2)) as there, there.boot(LINUX_6_1) as guest:
        for offer in await guest.connection.connect():
            await guest.connection.open_channel(offer, ring_pages=2)
        there.bus.pump()
        await guest.connection.unload()


async def test_an_unknown_event_is_a_bug():
    async with world() as there:
        with pytest.raises(AssertionError, match="does not know"):
            there.bus._handle(object())  # type: ignore[arg-type]


async def test_a_transport_that_fails_ends_the_bus_with_its_error(machine):
    class Failing(TapTransport):
        def incoming(self) -> AsyncIterator[PartitionEvent]:
            async def events() -> AsyncIterator[PartitionEvent]:
                await trio.sleep(0)
                raise ZeroDivisionError
                yield  # an async generator, all the same

            return events()

    device = EchoDevice()
    with pytest.raises(ExceptionGroup) as caught:
        async with open_bus(Failing(machine.synic), [device]):
            await trio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError)
    assert device.closed == 1
