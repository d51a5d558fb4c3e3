"""Adapters on a switch: from one guest's ring into another's, in a process and through a line."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from uuid import UUID

import pytest
import trio
import trio.testing

from netvsp.adapter import NetworkAdapter
from netvsp.endpoint import Endpoint, EndpointError
from netvsp.endpoints.switch import (
    SwitchLineEndpoint,
    connect,
    open_keeper,
    open_spec,
    shared,
)
from netvsp.frames.frame import Frame
from netvsp.shared.line import FrameLine, make_buffer
from netvsp.switch import switch as switch_module
from netvsp.wire import ppi, rndis
from tests.bench.nic import RECEIVE_PAGES, RING_PAGES, SEND_PAGES, Guest as _Guest
from tests.support.patience import until
from tests.support.switch import BROADCAST, make_frame, station
from tests.support.switch_lines import Adapter, kept
from vmbus.errors import ConfigError
from vmbus.memory import PAGE_SIZE, allocate_memory
from vmbus.plugins.sharing import make_line
from vmbus.plugins.specs import Spec
from vmbus.testing import channel_pair
from vmbus.testing.channels import LoneHost
from vmbus.wire.packets import COMPLETION, RANGES_OFFSET, TRANSFER_PAGES

Connect = Callable[[str], Awaitable[Endpoint]]
"""Returns an endpoint for a specification."""


@contextlib.asynccontextmanager
async def in_process(nursery: trio.Nursery) -> AsyncIterator[Connect]:
    del nursery
    yield lambda text: open_spec(Spec.parse(text))


@contextlib.asynccontextmanager
async def by_line(nursery: trio.Nursery) -> AsyncIterator[Connect]:
    keeper = await open_keeper(["switch:lan"])

    async def make(text: str) -> Endpoint:
        ours, theirs = make_line(0)
        nursery.start_soon(keeper.serve, ours, "guest", text)
        return connect(theirs)

    yield make
    await keeper.aclose()


WAYS = pytest.mark.parametrize("way", [in_process, by_line])


class Guest(_Guest):
    """A driver that sends frames and takes those that arrive."""

    frames: list[tuple[bytes, dict[int, int]]]
    completed = 0

    def take(self) -> None:
        """Take what is in the ring."""
        for packet in self.end.receive_nowait():
            if packet.kind == COMPLETION:
                self.completed += 1
                continue
            assert packet.kind == TRANSFER_PAGES
            ranges = packet.data[RANGES_OFFSET : packet.payload_offset]
            for length, offset in struct.iter_unpack("<II", ranges):
                at = self.receive_pages[0] * PAGE_SIZE + offset
                message = self.end.memory.read(at, length)
                where = rndis.parse_frame_untrusted(message)
                info = message[where.info_offset :][: where.info_length]
                items = ppi.parse_items_untrusted(info) if info else {}
                frame = message[where.data_offset :][: where.data_length]
                self.frames.append((frame, items))
            self.give_back(packet.transaction_id)

    async def until(self, count: int) -> list[bytes]:
        """Wait for so many frames."""

        def arrived() -> bool:
            self.take()
            return len(self.frames) >= count

        await until(arrived)
        found, self.frames = [each for each, _ in self.frames], []
        return found

    def send(self, index: int, frame: Frame) -> None:
        message = rndis.build_packet_header(len(frame)) + frame.tobytes()
        assert self.end.send(self.section_packet(index, message)) == 1


@contextlib.asynccontextmanager
async def guest_on(endpoint: Endpoint, number: int) -> AsyncIterator[Guest]:
    """A guest with an adapter at an endpoint."""
    pages = 2 * RING_PAGES + RECEIVE_PAGES + SEND_PAGES + 2048 + 64
    memory = allocate_memory(pages * PAGE_SIZE)
    host = LoneHost(memory)
    channel, end = channel_pair(ring_pages=RING_PAGES, memory=memory, host=host)
    guest = Guest(end)
    guest.frames = []
    host.gpadls.update(guest.gpadls())
    adapter = NetworkAdapter(endpoint, mac=station(number), instance_id=UUID(int=number))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(adapter.run, channel)
        await guest.start()
        yield guest
        assert not host.complaints, host.complaints
        channel.end()
    await adapter.aclose()
    channel.close_doorbell()


@WAYS
async def test_two_guests_talk_to_each_other(way):
    async with trio.open_nursery() as nursery, way(nursery) as connect_to:
        first, second = await connect_to("switch:lan"), await connect_to("switch:lan")
        async with guest_on(first, 1) as one, guest_on(second, 2) as two:
            one.send(0, make_frame(1, BROADCAST, b"who is there?"))
            assert await two.until(1) == [make_frame(1, BROADCAST, b"who is there?").head]
            two.send(0, make_frame(2, 1, b"I am"))
            assert await one.until(1) == [make_frame(2, 1, b"I am").head]
            for number in range(100):
                one.send(number, make_frame(1, 2, bytes([number])))
            frames = await two.until(100)
            assert [frame[-1] for frame in frames] == list(range(100))
            await one.until(0)
            assert one.completed == 101


@WAYS
async def test_a_segment_arrives_whole(way):
    async with trio.open_nursery() as nursery, way(nursery) as connect_to:
        first, second = await connect_to("switch:lan"), await connect_to("switch:lan")
        async with guest_on(first, 1) as one, guest_on(second, 2) as two:
            ip = bytes.fromhex("4500000000000000400600000a0000010a000002")
            tcp = bytes.fromhex("0001000200000001000000015010ffff00000000")
            frame = station(2) + station(1) + b"\x08\x00" + ip + tcp + bytes(range(200)) * 100
            item = ppi.build_item(
                ppi.LARGE_SEND, ppi.pack_large_send(ppi.LargeSend(1448, 34, ipv6=False))
            )
            header = rndis.build_packet_header(len(frame), item)
            one.end.send(one.pages_packet(0, header, frame))
            # It is in several parts of the receive buffer, marked first to last: it was not cut.
            parts = await two.until(2)
            assert len(b"".join(parts)) == len(frame)
            assert b"".join(parts)[54:] == frame[54:]


@WAYS
async def test_a_flooding_neighbour_leaves_others_their_share(way):
    async with trio.open_nursery() as nursery, way(nursery) as connect_to:
        ends = [await connect_to("switch:lan") for _ in range(3)]
        async with (
            guest_on(ends[0], 1) as one,
            guest_on(ends[1], 2) as two,
            guest_on(ends[2], 3) as flooding,
        ):
            stop = trio.Event()

            async def flood() -> None:
                packets = [
                    flooding.section_packet(
                        index, rndis.build_packet_header(1514) + make_frame(3, 2, bytes(1500)).head
                    )
                    for index in range(64)
                ]
                while not stop.is_set():
                    flooding.end.send(*packets)
                    flooding.take()
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(flood)
            mine: list[int] = []
            for number in range(50):
                one.send(number, make_frame(1, 2, bytes([number])))
            while len(mine) < 50:
                frames = await two.until(1)
                mine += [frame[-1] for frame in frames if frame[6:12] == station(1)]
            assert mine == list(range(50))
            stop.set()


async def test_an_adapter_that_changes_its_address_is_found_by_the_new_one():
    async with kept() as keeper, trio.open_nursery() as nursery:
        one, two = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
        local = Adapter(await open_spec(Spec.parse("switch:lan")), station(3))
        nursery.start_soon(local.endpoint.run, local)
        await until(lambda: station(3) in keeper.hub.switch.own_stations())
        for adapter, number in ((two, 20), (local, 30)):
            adapter.mac = station(number)
            await adapter.send(make_frame(number, 1, b"new"))
            await one.until(make_frame(number, 1, b"new").head)
            await one.send(make_frame(1, number))
            await adapter.until(make_frame(1, number).head)
        nursery.cancel_scope.cancel()
    await local.endpoint.aclose()


async def test_a_life_that_is_over_gets_nothing_and_the_next_one_does():
    async with kept() as keeper, trio.open_nursery() as nursery:
        one = await keeper.adapter(nursery, 1)
        two = Adapter(connect(keeper.line("two")), station(2))
        three = Adapter(await open_spec(Spec.parse("switch:lan")), station(3))

        def is_up(adapter: Adapter) -> bool:
            return adapter.mac in keeper.hub.switch.own_stations()

        for adapter in (two, three):
            for life in range(2):
                async with trio.open_nursery() as inner:
                    inner.start_soon(adapter.endpoint.run, adapter)
                    await until(partial(is_up, adapter))
                    frame = make_frame(1, BROADCAST, bytes([life]))
                    await one.send(frame)
                    await adapter.until(frame.head)
                    inner.cancel_scope.cancel()
                while is_up(adapter):
                    await trio.lowlevel.checkpoint()
                await one.send(make_frame(1, BROADCAST, b"nobody"))
            assert adapter.frames == []
            await adapter.endpoint.aclose()
        nursery.cancel_scope.cancel()


async def test_what_an_earlier_life_did_not_read_is_not_for_the_next():
    async with kept() as keeper, trio.open_nursery() as nursery:
        one, two = (
            await keeper.adapter(nursery, 1),
            Adapter(connect(keeper.line("two")), station(2)),
        )
        two.room = 0
        async with trio.open_nursery() as inner:
            inner.start_soon(two.endpoint.run, two)
            await until(lambda: station(2) in keeper.hub.switch.own_stations())
            await one.send(*[make_frame(1, 2, bytes([number])) for number in range(200)])
            await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        await until(lambda: station(2) not in keeper.hub.switch.own_stations())
        two.room = 1 << 30
        nursery.start_soon(two.endpoint.run, two)
        await until(lambda: station(2) in keeper.hub.switch.own_stations())
        await one.send(make_frame(1, 2, b"for the next"))
        await until(lambda: two.frames)
        assert two.frames[0].head == make_frame(1, 2, b"for the next").head
        nursery.cancel_scope.cancel()
    await two.endpoint.aclose()


async def test_an_adapter_without_room_holds_up_nobody_in_its_process():
    ends = [await open_spec(Spec.parse("switch:lan")) for _ in range(3)]
    one, two, three = (Adapter(end, station(n)) for n, end in enumerate(ends, 1))
    two.room = 5
    async with trio.open_nursery() as nursery:
        for adapter in (one, two, three):
            nursery.start_soon(adapter.endpoint.run, adapter)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(8):
            await one.send(*[make_frame(1, BROADCAST, bytes(60_000))] * 100)
            await one.send(make_frame(1, 3, bytes([number])))
            await three.until(make_frame(1, 3, bytes([number])).head)
        assert len(two.frames) == 5
        assert two.endpoint.snapshot()["port"]["dropped"]["queue full"]
        two.make_room(1 << 30)
        await until(lambda: not two.endpoint.snapshot()["port"]["waiting"])
        await until(lambda: two.missed == two.endpoint.snapshot()["port"]["dropped"]["queue full"])
        assert two.missed + len(two.frames) == 800
        nursery.cancel_scope.cancel()
    for end in ends:
        await end.aclose()
        await end.aclose()


async def test_a_switch_that_is_gone_is_the_end_of_the_endpoint():
    ours, theirs = make_line(0)
    endpoint = connect(ours)
    adapter = Adapter(endpoint, station(1))
    theirs.close()
    with pytest.raises(EndpointError, match="keeps the switch has ended"):
        await endpoint.run(adapter)
    assert endpoint.transmit(0, [make_frame(1, 2)] * 3) == 3
    assert endpoint.snapshot()["dropped"] == 3
    await endpoint.aclose()


async def test_a_switch_that_talks_nonsense_is_the_end_of_the_endpoint():
    ours, theirs = make_line(0)
    endpoint = SwitchLineEndpoint(FrameLine(ours.sock, make_buffer()))
    theirs.sock.send(b"nonsense")
    with pytest.raises(EndpointError, match="a message of kind 110"):
        await endpoint.run(Adapter(endpoint, station(1)))
    await endpoint.aclose()
    theirs.close()


async def test_a_switch_that_does_not_read_makes_the_guest_wait():
    ours, theirs = make_line(0)
    endpoint = connect(ours)
    frames = [make_frame(1, 2, bytes(1000))] * 1000
    done = endpoint.transmit(0, frames)
    assert 0 < done < 1000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.wait_writable, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        theirs.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.sock.recv(1)
    assert endpoint.transmit(0, frames) > 0
    await endpoint.aclose()
    theirs.close()


# -- what is shared ------------------------------------------------------------------------------


def test_switches_of_one_name_are_in_one_place_and_need_no_line_in_one_process():
    specs = ["switch:lan", "null:", "switch:[vlan=5]lan", "switch:dmz", "not a spec"]
    found = shared(specs)
    assert list(found) == ["switch:lan", "switch:[vlan=5]lan", "switch:dmz"]
    assert {each.keeper for each in found.values()} == {"switch:lan", "switch:dmz"}
    assert not any(each.staging or each.within_process for each in found.values())


async def test_what_cannot_be_honoured_is_said_before_anybody_is_served(tmp_path):
    with pytest.raises(ConfigError, match="vlan is 1 to 4094"):
        shared(["switch:[vlan=0]lan"])
    with pytest.raises(ConfigError, match="join is one directory, not /a and /b"):
        await open_keeper(["switch:[join=/a]lan", "switch:lan", "switch:[join=/b]lan"])
    keeper = await open_keeper(["switch:lan", f"switch:[join={tmp_path}]lan"])
    assert keeper.hub.describe()["joined"] == {"directory": str(tmp_path), "with": []}
    await keeper.aclose()


async def test_a_switch_is_found_by_its_name_in_a_process():
    one, two, other = [
        await open_spec(Spec.parse(text)) for text in ("switch:a", "switch:[vlan=7]a", "switch:b")
    ]
    assert one.snapshot()["ports"] == two.snapshot()["ports"] == 2
    assert other.snapshot()["ports"] == 1
    assert two.snapshot()["port"]["vlan"] == 7
    for endpoint in (one, two, other):
        await endpoint.aclose()
    with pytest.raises(ConfigError):
        await open_spec(Spec.parse("switch:[vlan=0]a"))


async def test_a_switch_without_a_port_left_refuses(monkeypatch):
    monkeypatch.setattr(switch_module, "MAX_PORTS", 1)
    one = await open_spec(Spec.parse("switch:a"))
    with pytest.raises(ConfigError, match="1 ports at most"):
        await open_spec(Spec.parse("switch:a"))
    await one.aclose()
    # Nobody has it any more: the next one is another.
    again = await open_spec(Spec.parse("switch:[vlan=5]a"))
    assert again.snapshot()["ports"] == 1
    await again.aclose()


def test_a_switch_within_another_endpoint_is_shared_as_well():
    specs = ["pcap:[write=a.pcapng]switch:[vlan=5]lan", "pcap:[write=b]null:", "script:a.py"]
    assert {spec: share.keeper for spec, share in shared(specs).items()} == {specs[0]: "switch:lan"}
