"""The adapter as a device: its link, its address, its endpoint, its lives."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
import trio
import trio.testing

from netvsp.adapter import (
    MONITOR_LATENCY,
    QUIET,
    STOP_SENDING,
    NetworkAdapter,
    mac_of,
    parse_mac,
)
from netvsp.endpoint import Endpoint, EndpointError, EndpointInfo
from netvsp.endpoints.null import NullEndpoint
from netvsp.link import AdapterConfig
from netvsp.receive import MAX_CONTROL_QUEUE
from netvsp.wire import nvsp, oids, rndis
from tests.support.net_guest import (
    MAC,
    NetGuest,
    Network,
    incoming,
    message_of,
    plain_frame,
    running,
)
from vmbus.errors import ConfigError
from vmbus.testing import check_device
from vmbus.wire.guids import CLASS_NIC

OTHER = bytes.fromhex("00155d0a0b0c")


def told(guest: NetGuest) -> list[tuple[int, bytes]]:
    """What the guest was told since the last call: status and buffer."""
    found, guest.received = guest.received, []
    assert all(each.channel_type == nvsp.CHANNEL_CONTROL for each in found)
    indications = [rndis.parse_indication_untrusted(each.messages[0]) for each in found]
    return [(each.status, each.buffer) for each in indications]


def test_an_offer_says_what_there_can_be():
    adapter = NetworkAdapter(Network(), instance_id=UUID(int=0x112233445566))
    assert adapter.offer.class_id == CLASS_NIC
    assert adapter.offer.instance_id == UUID(int=0x112233445566)
    assert adapter.offer.max_subchannels == 7
    assert adapter.offer.monitor_latency is None
    assert adapter.link.mac == bytes.fromhex("00155d445566")
    other = NetworkAdapter(Network(), config=AdapterConfig(max_queues=1), monitor=True, mac=MAC)
    assert other.offer.max_subchannels == 0
    assert other.offer.monitor_latency == MONITOR_LATENCY
    assert other.mac == MAC
    assert other.offer.instance_id != NetworkAdapter(Network()).offer.instance_id


def test_addresses_are_read_and_made():
    assert (
        parse_mac("00:15:5D:01:02:03")
        == parse_mac("00-15-5d-01-02-03")
        == (parse_mac("00155d010203"))
    )
    assert mac_of(UUID(int=0xABCDEF)) == bytes.fromhex("00155dabcdef")
    for text in ("", "00:15:5d:01:02", "00155d01020304", "nonsense"):
        with pytest.raises(ConfigError, match="is not a MAC address"):
            parse_mac(text)
    with pytest.raises(ConfigError, match="of a station"):
        NetworkAdapter(Network(), mac=b"\xff" * 6)


async def test_it_is_a_device_as_the_bus_wants_them():
    await check_device(lambda: NetworkAdapter(NullEndpoint(), mac=MAC, instance_id=UUID(int=1)))


# -- link ------------------------------------------------------------------------------------------


async def test_a_guest_is_told_when_its_cable_goes_out_and_in():
    """linux: netvsc_linkstatus_callback."""
    network = Network()
    async with running(network) as (guest, adapter):
        adapter.set_link(up=False)
        await guest.settle()
        assert told(guest) == [(rndis.STATUS_MEDIA_DISCONNECT, b"")]
        assert network.port is not None
        network.port.link_changed(up=False)
        adapter.set_link(up=True)
        await guest.settle()
        assert told(guest) == [], "the network is gone still"
        network.port.link_changed(up=True)
        await guest.settle()
        assert told(guest) == [(rndis.STATUS_MEDIA_CONNECT, b"")]
        assert (await guest.query(oids.GEN_MEDIA_CONNECT_STATUS)).buffer == bytes(4)


async def test_a_guest_is_told_of_another_speed():
    network = Network()
    async with running(network) as (guest, _adapter):
        assert network.port is not None
        network.port.link_changed(up=True, speed=40_000_000_000)
        network.port.link_changed(up=False, speed=10**15)
        await guest.settle()
        assert told(guest) == [
            (rndis.STATUS_LINK_SPEED_CHANGE, (400_000_000).to_bytes(4, "little")),
            (rndis.STATUS_LINK_SPEED_CHANGE, b"\xff" * 4),
            (rndis.STATUS_MEDIA_DISCONNECT, b""),
        ]


async def test_a_guest_that_is_not_there_yet_asks_for_itself():
    async with running(started=False) as (guest, adapter):
        adapter.set_link(up=False)
        await guest.start()
        adapter.set_link(up=False)
        await guest.settle()
        guest.received.clear()
        assert (await guest.query(oids.GEN_MEDIA_CONNECT_STATUS)).buffer == b"\1\0\0\0"
        guest.received.clear()
        adapter.set_link(up=True)
        await guest.settle()
        assert told(guest) == [(rndis.STATUS_MEDIA_CONNECT, b"")]


async def test_a_guest_that_has_halted_is_told_nothing():
    async with running() as (guest, adapter):
        await guest.control(rndis.build_id_message(rndis.HALT, 5))
        adapter.set_link(up=False)
        await guest.settle()
        assert told(guest) == []


async def test_a_guest_that_takes_nothing_is_complained_of_and_no_more():
    async with running() as (guest, adapter):
        guest.gives_back = False
        for number in range(guest.part_count + MAX_CONTROL_QUEUE + 1):
            adapter.set_link(up=bool(number & 1))
            await guest.settle()
        assert len(guest.received) == guest.part_count
        assert guest.host.complaints == ["too many RNDIS replies that the guest does not take"]


async def test_a_guest_is_told_to_stop_before_its_adapter_goes(autojump_clock):
    async with running() as (guest, adapter):
        async with trio.open_nursery() as nursery:
            start = trio.current_time()
            nursery.start_soon(adapter.retire)
            await trio.sleep(STOP_SENDING - QUIET / 2)
            await guest.exchange(guest.section(0, message_of(plain_frame())))
            assert told(guest) == [(rndis.STATUS_MEDIA_DISCONNECT, b"")]
            guest.received.clear()
        waited = trio.current_time() - start
        assert STOP_SENDING + QUIET / 2 <= waited <= STOP_SENDING + 2 * QUIET, "until it is quiet"
        assert adapter.statistics.transmit.dropped == {"link down": 1}
        adapter.stay()
        await guest.settle()
        assert told(guest) == [(rndis.STATUS_MEDIA_CONNECT, b"")]


@pytest.mark.parametrize("state", ["not open", "not up", "link down"])
async def test_nobody_is_waited_for_who_does_not_send(state, autojump_clock):
    if state == "not open":
        adapter = NetworkAdapter(NullEndpoint())
        await adapter.retire()
        assert not adapter.link.up
        adapter.stay()
        assert adapter.link.up
        return
    async with running() as (guest, adapter):
        if state == "not up":
            await guest.set(oids.GEN_CURRENT_PACKET_FILTER, bytes(4))
        else:
            adapter.set_link(up=False)
        start = trio.current_time()
        await adapter.retire()
        assert trio.current_time() == start


# -- address ---------------------------------------------------------------------------------------


async def test_another_address_holds_at_once():
    network = Network()
    async with running(network) as (guest, adapter):
        adapter.set_mac(OTHER)
        with pytest.raises(ConfigError):
            adapter.set_mac(b"\1" + bytes(5))
        await guest.settle()
        assert guest.received == []
        assert (await guest.query(oids.E802_3_CURRENT_ADDRESS)).buffer == OTHER
        assert (await guest.query(oids.E802_3_PERMANENT_ADDRESS)).buffer == MAC
        guest.received.clear()
        await guest.exchange(guest.section(0, message_of(plain_frame())))
        await guest.exchange(guest.section(1, message_of(plain_frame(source=OTHER))))
        assert network.bytes() == [plain_frame(source=OTHER)]
        here = incoming()
        here.head = OTHER + here.head[6:]
        assert adapter.receive([incoming(), here]) == 2
        await guest.settle()
        assert guest.take_frames() == [here.tobytes()]
        assert adapter.snapshot()["mac"] == "00:15:5d:0a:0b:0c"


async def test_a_guest_that_may_changes_its_address():
    network = Network()
    async with running(network, config=AdapterConfig(allow_mac_change=True)) as (guest, adapter):
        parameter = rndis.build_parameter("NetworkAddress", OTHER.hex())
        assert not await guest.set(oids.GEN_RNDIS_CONFIG_PARAMETER, parameter)
        assert adapter.mac == OTHER
        await guest.exchange(guest.section(1, message_of(plain_frame(source=OTHER))))
        assert network.bytes() == [plain_frame(source=OTHER)]


# -- endpoints -------------------------------------------------------------------------------------


class Failing(Network):
    """Fails when it is told to."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error
        self.now = trio.Event()
        self.runs = 0

    async def run(self, port):
        self.runs += 1
        await self.now.wait()
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "says"),
    [(EndpointError("the cable is cut"), "the cable is cut"), (None, "it has ended")],
)
async def test_an_endpoint_that_ends_takes_the_link_down(error, says, caplog):
    network = Failing(error)
    adapter = NetworkAdapter(network, mac=MAC, instance_id=UUID(int=5), source="tap:x")
    for life in range(2):
        guest = NetGuest()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adapter.run, guest.channel)
            await guest.start()
            guest.received.clear()
            network.now.set()
            await guest.settle()
            if not life:
                assert told(guest) == [(rndis.STATUS_MEDIA_DISCONNECT, b"")]
            assert (await guest.query(oids.GEN_MEDIA_CONNECT_STATUS)).buffer == b"\1\0\0\0"
            found = adapter.snapshot()
            assert (found["failure"], found["link"]) == (says, "down")
            guest.channel.end()
        guest.channel.close_doorbell()
    assert network.runs == 1, "it is not asked again"
    assert caplog.messages == [f"tap:x: {says}; the link is down"]


async def test_an_error_that_is_none_of_an_endpoints_ends_the_life():
    """The bus says so, and offers the device anew."""
    network = Failing(OSError("a mistake"))
    adapter = NetworkAdapter(network, mac=MAC)
    guest = NetGuest()
    network.now.set()
    with pytest.raises(ExceptionGroup) as caught:
        await adapter.run(guest.channel)
    assert caught.group_contains(OSError, match="a mistake", depth=None)
    guest.channel.close_doorbell()


class Described(Endpoint):
    """Has something to say."""

    info = EndpointInfo(mtu=1400, speed=123)

    def transmit(self, queue, frames):
        return len(frames)

    def snapshot(self):
        return {"name": "x"}


async def test_a_snapshot_is_json_at_every_moment():
    adapter = NetworkAdapter(Described(), mac=MAC, source="described:")
    before = json.loads(json.dumps(adapter.snapshot()))
    assert before["stage"] == "not open"
    assert (before["mtu"], before["speed"], before["source"]) == (1400, 123, "described:")
    assert before["endpoint"] == {"name": "x"}
    async with running(Described()) as (guest, running_adapter):
        await guest.exchange(guest.section(0, message_of(plain_frame(60))))
        assert running_adapter.receive([incoming(61)]) == 1
        found = json.loads(json.dumps(running_adapter.snapshot()))
        assert found["receive_outstanding"] == 1
        assert (found["filter"], found["channels"], found["mtu"]) == (13, 1, 1400)
        assert (found["transmit"]["bytes"], found["receive"]["bytes"]) == (60, 61)
        await guest.settle()


async def test_frames_for_a_guest_that_is_not_there_are_dropped():
    adapter = NetworkAdapter(Network(), mac=MAC)
    assert adapter.receive([incoming()] * 3) == 3
    await adapter.wait_room()
    assert adapter.statistics.receive.dropped == {"not ready": 3}


async def test_closing_it_closes_the_endpoint():
    network = Network()
    adapter = NetworkAdapter(network)
    await adapter.aclose()
    assert network.closed == 1


async def test_what_an_operator_has_set_outlives_a_guest():
    network = Network()
    adapter = NetworkAdapter(network, mac=MAC)
    adapter.set_mac(OTHER)
    adapter.set_link(up=False)
    for _life in range(2):
        guest = NetGuest()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adapter.run, guest.channel)
            await guest.start()
            assert (await guest.query(oids.E802_3_CURRENT_ADDRESS)).buffer == OTHER
            assert (await guest.query(oids.GEN_MEDIA_CONNECT_STATUS)).buffer == b"\1\0\0\0"
            guest.channel.end()
        guest.channel.close_doorbell()
        assert adapter.snapshot()["stage"] == "not open"


async def test_a_life_ends_in_the_middle_of_anything():
    """With frames out, with frames that wait, and with somebody who waits for room."""
    network = Network(room=0)
    async with running(network) as (guest, adapter):
        guest.gives_back = False
        while adapter.receive([incoming()] * 64) == 64:
            await guest.settle()
        await guest.exchange(guest.section(0, message_of(plain_frame())))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adapter.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            guest.channel.end()
        await trio.testing.wait_all_tasks_blocked()
        assert len(guest.host.leases) == 0
        assert guest.channel.undertakings.load.total == 0
        assert adapter.snapshot()["stage"] == "not open"
        assert adapter.receive([incoming()]) == 1


async def test_a_guest_can_ask_how_many_frames_were_lost_for_want_of_room():
    network = Network()
    async with running(network) as (guest, adapter):
        assert network.port is not None
        network.port.lost(3)
        network.port.lost(4)
        found = await guest.query(oids.GEN_RCV_NO_BUFFER)
        assert int.from_bytes(found.buffer, "little") == 7
        assert adapter.statistics.receive.dropped == {"no buffer": 7}


async def test_a_guest_that_was_not_told_of_its_link_is_told_when_it_takes_messages_again():
    async with running() as (guest, adapter):
        guest.gives_back = False
        states = []
        for number in range(2 * guest.part_count):
            adapter.set_link(up=bool(number % 2))
        adapter.link_changed(up=True, speed=12_345_600)
        adapter.set_link(up=False)
        while True:
            await guest.settle()
            if not guest.received:
                break
            states += [each.messages[0] for each in guest.received]
            guest.give_back(*[each.transaction_id for each in guest.received])
            guest.received.clear()
        assert len(states) < 2 * guest.part_count, "it was not told of all"
        last, *_ = [parse(each) for each in reversed(states)]
        assert last == (rndis.STATUS_MEDIA_DISCONNECT, b"")
        speed = (123456).to_bytes(4, "little")
        assert (rndis.STATUS_LINK_SPEED_CHANGE, speed) in [parse(each) for each in states]


def parse(message: bytes) -> tuple[int, bytes]:
    found = rndis.parse_indication_untrusted(message)
    return found.status, found.buffer
