"""A switch in one process, its guests in others: what crosses, and what a hostile one can do."""

from __future__ import annotations

import trio
import trio.testing

from netvsp.frames.frame import GSO_TCPV4, NEEDS_CHECKSUM, Offload
from netvsp.shared import keeper as keeper_module
from netvsp.shared.messages import pack_frames, pack_station
from tests.support.patience import until
from tests.support.switch import BROADCAST, make_frame, station
from tests.support.switch_lines import kept


def message(*frames) -> bytes:
    return b"".join(pack_frames(frames)[0])


async def test_frames_cross_as_they_are():
    ipv4 = b"\x45" + bytes(8) + b"\6" + bytes(10) + bytes(12) + b"\x50" + bytes(7)
    segment = make_frame(1, 2, ipv4 + bytes(60_000))
    segment.head = segment.head[:12] + b"\x08\0" + segment.head[14:]
    segment.offload = Offload(NEEDS_CHECKSUM, GSO_TCPV4, 54, 1448, 34, 16)
    segment.flow = 77
    async with kept() as keeper, trio.open_nursery() as nursery:
        one, other = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
        third = await keeper.adapter(nursery, 3)
        await one.send(segment, *[make_frame(1, 2, bytes([n])) for n in range(200)])
        await until(lambda: len(other.frames) == 201)
        first, *rest = other.frames
        assert (first.tobytes(), first.offload, first.flow) == (
            segment.head, segment.offload, 77,
        )  # fmt: skip
        assert [frame.head[-1] for frame in rest] == list(range(200))
        await other.send(make_frame(2, BROADCAST))
        await one.until(make_frame(2, BROADCAST).head)
        await third.until(make_frame(2, BROADCAST).head)
        assert third.frames == []
        nursery.cancel_scope.cancel()


async def test_what_a_port_may_is_said_by_its_specification_alone():
    async with kept() as keeper, trio.open_nursery() as nursery:
        one = await keeper.adapter(nursery, 1, "[vlan=5]")
        two = await keeper.adapter(nursery, 2, "[trunk=5-6]")
        three = await keeper.adapter(nursery, 3, "[vlan=6]")
        await one.send(make_frame(1, BROADCAST, tci=6), make_frame(1, BROADCAST))
        await until(lambda: two.frames)
        assert [frame.tci for frame in two.frames] == [5]
        await two.send(make_frame(2, 3, tci=6))
        await three.until(make_frame(2, 3).head)
        nursery.cancel_scope.cancel()


async def test_a_guest_that_is_gone_leaves_no_port(caplog):
    async with kept() as keeper, trio.open_nursery() as nursery:
        await keeper.adapter(nursery, 1)
        line = keeper.line("brief")
        line.sock.send(pack_station(station(2)))
        await until(lambda: len(keeper.hub.switch.own_stations()) == 2)
        line.sock.close()
        await until(lambda: len(keeper.hub.switch.ports) == 1)
        assert keeper.hub.switch.own_stations() == [station(1)]
        assert not caplog.records
        nursery.cancel_scope.cancel()


async def test_nonsense_costs_its_sender_the_line(caplog):
    async with kept() as keeper, trio.open_nursery() as nursery:
        one, two = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
        line = keeper.line("hostile")
        line.sock.send(b"nonsense")
        await until(lambda: "hostile: switch: a message of kind 110" in caplog.text)
        while line.sock.recv(8192):
            continue
        await one.send(make_frame(1, 2))
        await two.until(make_frame(1, 2).head)
        line.sock.close()
        nursery.cancel_scope.cancel()


async def test_a_specification_that_makes_no_sense_costs_the_line(caplog):
    async with kept() as keeper:
        line = keeper.line("guest", "[vlan=0]")
        await until(lambda: "guest: switch:[vlan=0]lan: vlan is 1 to 4094" in caplog.text)
        line.sock.close()


async def test_neither_flood_nor_silence_holds_up_a_neighbour():
    """One sends and never reads; its neighbour's frames arrive, and so do their answers."""
    flood = message(*[make_frame(9, 2, bytes(1400))] * 64)
    async with kept() as keeper, trio.open_nursery() as nursery:
        one, two = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
        line = keeper.line("hostile")
        line.sock.setblocking(False)
        line.sock.send(pack_station(station(9)))

        async def hostile() -> None:
            while True:
                try:
                    line.sock.send(flood)
                    await trio.lowlevel.checkpoint()
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(line.sock)

        nursery.start_soon(hostile)
        port = next(each for each in keeper.hub.switch.ports if each.name == "guest2")
        for number in range(300):
            frame = make_frame(1, 2, number.to_bytes(2, "big"))
            await one.send(frame, make_frame(1, 9, bytes(60_000)))
            await two.until(frame.head)
            answer = make_frame(2, 1, number.to_bytes(2, "big"))
            await two.send(answer)
            await one.until(answer.head)
        (silent,) = (each for each in keeper.hub.switch.ports if each.name == "hostile")
        assert silent.dropped["queue full"]
        assert port.in_frames == 300
        nursery.cancel_scope.cancel()
    line.sock.close()


async def test_an_adapter_that_has_no_room_gets_the_rest_later_or_never():
    async with kept() as keeper, trio.open_nursery() as nursery:
        one, two = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
        two.room = 10
        port = next(each for each in keeper.hub.switch.ports if each.name == "guest2")
        while not port.dropped["queue full"]:
            await one.send(*[make_frame(1, 2, bytes(1400))] * 100)
            await trio.lowlevel.checkpoint()
        assert len(two.frames) == 10
        two.make_room(1 << 30)
        await until(lambda: not port.queue.count)
        await one.send(make_frame(1, 2, b"last"))
        await two.until(make_frame(1, 2, b"last").head)
        nursery.cancel_scope.cancel()


async def test_who_asks_a_guests_worker_hears_what_the_switch_has_counted(monkeypatch):
    monkeypatch.setattr(keeper_module, "TELL_EVERY", 0)
    async with kept() as keeper, trio.open_nursery() as nursery:
        one = await keeper.adapter(nursery, 1)
        await one.send(make_frame(7, 2))

        def told() -> bool:
            found = one.endpoint.snapshot()
            return bool(found) and found.get("port", {}).get("dropped") == {"spoofed": 1}

        await until(told)
        assert one.endpoint.snapshot()["switch"] == "lan"
        nursery.cancel_scope.cancel()
