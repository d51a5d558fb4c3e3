"""The server of many guests: names, devices, operators, and guests that are gone at once."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE, until
from tests.support.worlds import FailingTransport, World, whole_life
from vmbus.errors import ConfigError
from vmbus.guest import LINUX_6_1
from vmbus.partition.soft_machine import SoftMachine
from vmbus.server import DeviceSetup, GuestServer

DISK = 4 << 20
SETUPS = (DeviceSetup("storvsp", (f"ram:{DISK}",)), DeviceSetup("storvsp", ("ram:1M", "ram:1M")))


@pytest.fixture
async def machines() -> AsyncIterator[list[SoftMachine]]:
    made = [SoftMachine(((0, 32 << 20),), vp_count=2) for _ in range(3)]
    with trio.fail_after(PATIENCE):
        yield made
    for machine in made:
        machine.close()


def transport(machine: SoftMachine, name: str = "vm", **fails: Exception) -> FailingTransport:
    made = FailingTransport(machine.synic, **fails)
    made.name = name
    return made


async def test_a_guest_is_served_until_it_is_gone(machines):
    server = GuestServer(SETUPS)
    there = transport(machines[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handle, there)
        await trio.testing.wait_all_tasks_blocked()
        bus = server._guests["vm"].bus
        assert bus is not None
        async with World(machines[0], there, bus).boot(LINUX_6_1) as guest:
            await whole_life(guest)
        there.close()
    assert server.query("status")["guests_attached"] == 0
    assert server.query("status")["guests_served"] == 1


async def test_a_guest_cannot_take_the_name_of_another(machines):
    server = GuestServer(SETUPS)
    first, second = (transport(machine) for machine in machines[:2])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handle, first)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConfigError, match="a guest called 'vm' is attached"):
            await server.handle(second)
        assert [guest["name"] for guest in server.query("guests")["guests"]] == ["vm"]
        json.dumps(server.query("guests"))
        first.close()
    assert server.query("guests")["guests"] == []


async def test_a_guest_that_is_gone_at_once_leaves_no_file_locked(machines, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    server = GuestServer([DeviceSetup("storvsp", (f"raw:{image}",))])
    with pytest.raises(trio.BrokenResourceError):
        await server.handle(transport(machines[0], message_port=trio.BrokenResourceError("gone")))
    await server.check()
    link = transport(machines[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handle, link)
        await until(lambda: "vm" in server._guests and server._guests["vm"].bus)
        with pytest.raises(ConfigError):
            await server.check()
        link.close()


async def test_a_back_end_that_cannot_be_opened_turns_the_guest_away(machines, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    setups = [
        DeviceSetup("storvsp", (f"raw:{image}",)),
        DeviceSetup("storvsp", (f"raw:{tmp_path}/missing",)),
    ]
    server = GuestServer(setups)
    with pytest.raises(ConfigError):
        await server.handle(transport(machines[0]))
    assert server._guests == {}
    # What was opened before is closed again.
    await GuestServer(setups[:1]).check()


async def test_the_check_finds_mistakes_and_leaves_files_of_guests_alone(tmp_path):
    with pytest.raises(ConfigError):
        await GuestServer([DeviceSetup("storvsp", ("ram:nonsense",))]).check()
    with pytest.raises(ConfigError, match="unknown device 'toaster'"):
        await GuestServer([DeviceSetup("toaster")]).check()
    await GuestServer([DeviceSetup("storvsp", (f"raw:{tmp_path}/{{guest}}.img",))]).check()


async def test_each_guest_has_files_of_its_own(machines, tmp_path):
    for name in ("vm", "vm-2"):
        (tmp_path / f"{name}.img").write_bytes(bytes(1 << 20))
    server = GuestServer([DeviceSetup("storvsp", (f"raw:{tmp_path}/{{guest}}.img",))])
    links = [transport(*each) for each in zip(machines, ("vm", "vm-2"), strict=False)]
    async with trio.open_nursery() as nursery:
        for link in links:
            nursery.start_soon(server.handle, link)
        guests = server._guests
        await until(lambda: guests and all(guest.bus for guest in guests.values()))
        assert len(server.query("guests")["guests"]) == 2
        for link in links:
            link.close()


@pytest.mark.parametrize(
    "name", ["../other", "/etc/passwd", "a/b", ".hidden", "-rf", "a b", "x,ro", "x]y", "é", "a\nb"]
)
async def test_a_guests_name_chooses_no_directory_and_no_option(machines, tmp_path, name):
    folder = tmp_path / "disks"
    folder.mkdir()
    (tmp_path / "other.img").write_bytes(bytes(1 << 20))
    server = GuestServer([DeviceSetup("storvsp", (f"raw:{folder}/{{guest}}.img",))])
    with pytest.raises(ConfigError, match="cannot stand for"):
        await server.handle(transport(machines[0], name))
    # Where nothing is made of it, a name is just a name.
    link = transport(machines[1], name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(GuestServer(SETUPS).handle, link)
        await trio.testing.wait_all_tasks_blocked()
        link.close()


async def test_operators_reach_the_devices_of_guests(machines):
    server = GuestServer(SETUPS)
    links = [transport(machines[0], "one"), transport(machines[1], "two")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handle, links[0])
        await trio.testing.wait_all_tasks_blocked()
        add = {"action": "add", "spec": "ram:1M"}
        # The only guest, and the first device, need not be named.
        assert await server.command(add) == {"address": "0:0:1"}
        assert await server.command({**add, "index": 1}) == {"address": "0:0:2"}
        nursery.start_soon(server.handle, links[1])
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConfigError, match="which guest"):
            await server.command(add)
        assert await server.command({**add, "guest": "two"}) == {"address": "0:0:1"}
        for wrong, text in (
            ({"guest": "three"}, "no guest 'three'; attached are: one, two"),
            ({"guest": 7}, "no guest 7"),
            ({"guest": "one", "index": 2}, "the guest has 2, numbers 0 to 1"),
            ({"guest": "one", "index": -1}, "the guest has 2, numbers 0 to 1"),
            ({"guest": "one", "index": "x"}, "the guest has 2, numbers 0 to 1"),
            ({"guest": "one", "device": "netvsp"}, "the guest has none"),
        ):
            with pytest.raises(ConfigError, match=text):
                await server.command({**add, **wrong})
        for link in links:
            link.close()
    with pytest.raises(ConfigError, match="no guest is attached"):
        await server.command(add)


async def test_what_operators_do_is_in_the_log_and_what_they_ask_is_not(machines, caplog):
    """A program that watches counters asks once a second."""
    server = GuestServer([DeviceSetup("netvsp", ("null:",))])
    link = transport(machines[0])
    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.handle, link)
            await trio.testing.wait_all_tasks_blocked()
            caplog.clear()
            assert "transmit" in await server.command({"action": "stats"})
            assert not caplog.records
            await server.command({"action": "link", "up": False})
            assert "an operator's command: {'action': 'link', 'up': False}" in caplog.text
            link.close()


async def test_a_device_that_has_failed_and_is_back_can_be_operated(machines):
    server = GuestServer(SETUPS)
    link = transport(machines[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handle, link)
        await trio.testing.wait_all_tasks_blocked()
        bus = server._guests["vm"].bus
        assert bus is not None
        async with World(machines[0], link, bus).boot(LINUX_6_1) as guest:
            offers = await guest.connection.connect()
            channel = await guest.connection.open_channel(offers[0], ring_pages=4)
            (runner,) = bus.runners.values()
            machines[0].memory.page(runner.event.gpadl.pages[0]).cast("I")[0] = 3
            assert runner.channel is not None
            runner.channel.poke()
            await guest.connection.wait_gone(channel.relid)
            assert await server.command({"action": "add", "spec": "ram:1M"}) == {"address": "0:0:1"}
        link.close()


async def test_a_guest_that_is_on_its_way_out_takes_no_commands(machines):
    server = GuestServer(SETUPS)
    link = transport(machines[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handle, link)
        await trio.testing.wait_all_tasks_blocked()
        entry = server._guests["vm"]
        link.close()
        while entry.bus is not None:
            await trio.lowlevel.checkpoint()
        with pytest.raises(ConfigError):
            await server.command({"action": "add", "spec": "ram:1M"})
        assert server.query("guests")["guests"] == []


def test_there_are_two_queries():
    server = GuestServer(())
    assert set(server.query("status")) == {
        "server",
        "pid",
        "guests_served",
        "guests_attached",
        "rss",
    }
    with pytest.raises(ConfigError, match="no query"):
        server.query("weather")
