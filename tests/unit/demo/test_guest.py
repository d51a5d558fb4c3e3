"""One life of a demo's guest, with halves that do next to nothing."""

from __future__ import annotations

import argparse

import trio

from tests.support.demo import Told, live, server_for
from tests.support.patience import LOOK, PATIENCE
from vmbus import demo
from vmbus.demo import DemoGuest, Half, Options, Story, guest as life
from vmbus.errors import VMBusError
from vmbus.guest import LINUX_6_1, Driver


class PokeHalf(Half[Driver]):
    """Opens the primary channel of a controller of its own, and does what a test wants."""

    def __init__(self, options, story, *, number=0, ram=0, use=None):
        super().__init__(options, argparse.Namespace(), story)
        self.number = number
        self.bytes = ram
        self.on_use = use
        self.drivers: list[Driver] = []

    @classmethod
    def add_options(cls, parser):
        pass

    @property
    def ram(self):
        return self.bytes

    async def attach(self, guest, offers):
        if self.number >= len(offers):
            raise VMBusError(f"there is no device {self.number}")
        driver = Driver(guest, offers[self.number], ring_pages=4, queue_depth=1)
        await driver.open()
        self.story.emit("attach", number=self.number)
        self.drivers.append(driver)
        return driver

    async def use(self, driver):
        assert driver is self.drivers[-1]
        self.story.emit("use", number=self.number)
        if self.on_use is not None:
            await self.on_use(driver)


def guest_with(path, *halves, personality=LINUX_6_1):
    """A guest with a half for each dict of arguments."""
    options = Options(socket=path, personality=personality, channels=2, seconds=0)
    story = Story()
    made = [PokeHalf(options, story, **{"number": n, **each}) for n, each in enumerate(halves)]
    return DemoGuest(options, made, story)


async def test_halves_attach_in_order_then_work_in_order_and_all_is_closed(tmp_path, capsys):
    closed = []

    async def watch(driver):
        ordinary = driver.close

        async def close():
            closed.append(driver.offer.relid)
            await ordinary()

        driver.close = close

    async with server_for(tmp_path, controllers=2) as (_, path, _nursery):
        guest = guest_with(path, {"use": watch}, {"use": watch})
        assert await live(guest)
    told = Told(capsys.readouterr().out)
    names = [f"{event['event']}{event.get('number', '')}" for event in told.events]
    assert names == ["start", "attached", "contact", "offer", "offer", "attach0", "channel",
                     "attach1", "channel", "use0", "use1", "left"]  # fmt: skip
    assert [event["relid"] for event in told.of("channel")] == [1, 2]
    assert closed == [2, 1]
    for event in told.of("channel"):
        assert (event["ring"], event["gpadl_pages"], event["subchannel"]) == (4 * 4096, 8, 0)
    documented = demo.__doc__ or ""
    for event in told.events:
        if event["event"] not in ("attach", "use"):
            assert event["event"] in documented
            assert all(f"``{name}``" in documented for name in event if name != "event")


async def test_a_guest_without_devices_comes_and_goes(tmp_path, capsys):
    async with server_for(tmp_path) as (_, path, _nursery):
        assert await live(guest_with(path))
    told = Told(capsys.readouterr().out)
    assert [event["event"] for event in told.events] == [
        "start", "attached", "contact", "offer", "left",
    ]  # fmt: skip
    assert told.events[-1] == {"event": "left", "interrupts": 0, "signals": 0}


async def test_ram_is_for_all_halves_in_whole_mebibytes(tmp_path, capsys):
    assert not await live(guest_with(str(tmp_path / "nothing"), {"ram": 1 << 20}, {"ram": 5}))
    (start,) = Told(capsys.readouterr().out).of("start")
    assert start["ram"] == life.BASE_RAM + (2 << 20)
    assert (start["guest"], start["vps"]) == ("Linux 6.1", 2)


async def test_no_server_is_a_problem(tmp_path, capsys):
    assert not await live(guest_with(str(tmp_path / "nothing")))
    ((where, text),) = Told(capsys.readouterr().out).problems
    assert where == "guest"
    assert "cannot connect" in text


async def test_a_half_without_its_device_is_a_problem(tmp_path, capsys):
    async with server_for(tmp_path) as (_, path, _nursery):
        assert not await live(guest_with(path, {}, {}))
    told = Told(capsys.readouterr().out)
    assert told.problems == [("guest", "there is no device 1")]
    assert not told.of("use")
    assert not told.of("left")


async def test_a_problem_that_a_half_tells_does_not_keep_the_guest_from_leaving(tmp_path, capsys):
    story: list[Story] = []

    async def fail(_driver):
        story[0].problem("part", "broken")

    async with server_for(tmp_path) as (_, path, _nursery):
        guest = guest_with(path, {"use": fail})
        story.append(guest.story)
        assert not await live(guest)
    told = Told(capsys.readouterr().out)
    assert told.problems == [("part", "broken")]
    assert told.of("left")


async def test_a_guest_at_work_does_not_outlive_its_server(tmp_path, capsys):
    async def hang(_driver):
        await trio.sleep_forever()

    async with server_for(tmp_path) as (server, path, nursery):

        async def stop_when_open():
            while not (guests := server.query("guests")["guests"]) or not guests[0]["channels"]:
                await trio.sleep(LOOK)
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_when_open)
        with trio.CancelScope(shield=True):
            assert not await live(guest_with(path, {"use": hang}))
    ((where, text),) = Told(capsys.readouterr().out).problems
    assert where == "guest"
    assert text.startswith("the server is gone: ")


async def test_a_panic_is_told_as_it_is_if_the_server_stays(tmp_path, capsys, monkeypatch):
    async def panic(driver):
        driver.guest.panic("the host is wrong")

    monkeypatch.setattr(life, "LEAVING_SECONDS", 0)
    async with server_for(tmp_path, "ram:1M") as (_, path, _nursery):
        assert not await live(guest_with(path, {"use": panic}))
    ((where, text),) = Told(capsys.readouterr().out).problems
    assert (where, text) == ("guest", "Linux 6.1: the host is wrong")


async def test_a_panic_that_the_end_of_the_server_has_caused_is_told_as_that(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(life, "LEAVING_SECONDS", PATIENCE)
    async with server_for(tmp_path) as (_, path, nursery):
        token = trio.lowlevel.current_trio_token()

        async def stop_a_little_later():
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

        async def panic(driver):
            token.run_sync_soon(nursery.start_soon, stop_a_little_later)
            driver.guest.panic("the doorbells are gone")

        with trio.CancelScope(shield=True):
            assert not await live(guest_with(path, {"use": panic}))
    ((where, text),) = Told(capsys.readouterr().out).problems
    assert where == "guest"
    assert text.startswith("the server is gone: ")


async def test_writes_into_memory_that_was_given_back_are_a_problem(tmp_path, capsys):
    async def spoil(driver):
        (pfn,) = driver.guest.ram.allocate(1)
        driver.guest.ram.free([pfn], poison=True)
        driver.guest.ram.page(pfn)[0] = 1

    async with server_for(tmp_path) as (_, path, _nursery):
        assert not await live(guest_with(path, {"use": spoil}))
    told = Told(capsys.readouterr().out)
    ((_, text),) = told.problems
    assert "after giving them back" in text
    assert told.of("left")
