"""Devices that an operator adds to guests that run, and takes away."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE, until
from tests.support.worlds import FailingTransport
from vmbus.engine import Budgets, EngineConfig
from vmbus.errors import BudgetError, ConfigError
from vmbus.host import BusConfig
from vmbus.partition.soft_machine import SoftMachine
from vmbus.plugins.sharing import make_line
from vmbus.server import DeviceSetup, GuestServer
from vmbus.server.attached import wanted_setup

ADD = {"backend": "endpoint", "action": "add-device", "specs": ["null:"]}
REMOVE = {"backend": "endpoint", "action": "remove-device"}
SETUPS = (DeviceSetup("storvsp", ("ram:1M",)), DeviceSetup("netvsp", ("null:[name=first]",)))


class Served:
    """A server, and guests that are attached to it."""

    def __init__(self, server: GuestServer, nursery: trio.Nursery) -> None:
        self.server = server
        self.nursery = nursery
        self.machines: list[SoftMachine] = []

    async def attach(self, name: str = "vm") -> FailingTransport:
        machine = SoftMachine(((0, 8 << 20),))
        self.machines.append(machine)
        transport = FailingTransport(machine.synic)
        transport.name = name
        self.nursery.start_soon(self.server.handle, transport)
        await until(lambda: self.devices(name))
        return transport

    def devices(self, guest: str = "vm") -> list[dict[str, Any]]:
        """The devices of a guest, as a query describes them."""
        for each in self.server.query("guests")["guests"]:
            if each["name"] == guest:
                found: list[dict[str, Any]] = each["devices"]
                return found
        return []

    def names(self, guest: str = "vm") -> list[str]:
        """What commands call them."""
        return [f"{each['plugin']} {each['index']}" for each in self.devices(guest)]

    async def add(self, **changes: Any) -> dict[str, Any]:
        return await self.server.command({**ADD, **changes})

    async def remove(self, index: int = 0, **changes: Any) -> dict[str, Any]:
        return await self.server.command({**REMOVE, "index": index, **changes})


@contextlib.asynccontextmanager
async def serving(server: GuestServer) -> AsyncIterator[Served]:
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            found = Served(server, nursery)
            try:
                yield found
            finally:
                nursery.cancel_scope.cancel()
    for machine in found.machines:
        machine.close()


async def test_a_device_that_is_added_has_the_place_that_it_would_have_from_the_start():
    async with serving(GuestServer((*SETUPS, DeviceSetup("netvsp", ("null:",))))) as longer:
        await longer.attach()
        wanted = [(each["instance"], each.get("mac")) for each in longer.devices()]
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        answer = await served.add()
        json.dumps(answer)
        assert (answer["plugin"], answer["index"], answer["backend"]) == ("netvsp", 1, "endpoint")
        assert [(each["instance"], each.get("mac")) for each in served.devices()] == wanted
        assert answer["mac"] == wanted[2][1]


async def test_a_device_that_comes_back_is_the_same_one_and_numbers_do_not_move():
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        second, third = await served.add(), await served.add()
        before = {each["index"]: each["instance"] for each in served.devices()[1:]}
        assert await served.remove(1) == {}
        assert served.names() == ["storvsp 0", "netvsp 0", "netvsp 2"]
        assert await served.server.command({**REMOVE, "index": 2, "action": "stats"})
        with pytest.raises(ConfigError, match="number 1; the guest has 2, numbers 0 and 2"):
            await served.remove(1)
        again = await served.add()
        assert (again["index"], again["instance"]) == (1, before[1])
        assert (again["mac"], third["index"]) == (second["mac"], 2)
        # Of those that were there from the start, too.
        for index in (2, 1, 0):
            await served.remove(index)
        assert served.names() == ["storvsp 0"]
        with pytest.raises(ConfigError, match="number 0; the guest has none"):
            await served.remove(0)
        first = await served.add()
        assert (first["index"], first["instance"]) == (0, before[0])


async def test_a_device_of_any_plug_in_can_be_added_and_used():
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        answer = await served.add(
            backend="disk", specs=["ram:1M", "ram:2M"], options={"monitor": True}
        )
        assert [unit["size"] for unit in answer["units"]] == [1 << 20, 2 << 20]
        added = await served.server.command(
            {"backend": "disk", "index": 1, "action": "add", "spec": "ram:1M"}
        )
        assert added == {"address": "0:0:2"}
        by_name = await served.server.command({"device": "netvsp", "action": "add-device"})
        assert (by_name["link"], by_name["source"]) == ("down", "")
        await served.server.command({**REMOVE, "backend": "disk", "index": 1})
        assert served.names() == ["storvsp 0", "netvsp 0", "netvsp 1"]


async def test_each_guest_has_what_was_added_to_it_only():
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach("one")
        await served.attach("two")
        with pytest.raises(ConfigError, match="which guest"):
            await served.add()
        await served.add(guest="two")
        assert (len(served.names("one")), len(served.names("two"))) == (2, 3)
        macs = {each["mac"] for name in ("one", "two") for each in served.devices(name)[1:]}
        assert len(macs) == 3


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"specs": "null:"}, "specs is a list of texts"),
        ({"specs": [7]}, "specs is a list of texts"),
        ({"options": []}, "options is an object"),
        ({"specs": ["nul:"]}, "unknown endpoint scheme 'nul'"),
        ({"specs": ["null:", "null:"]}, "one endpoint, not 2"),
        ({"specs": ["null:[mtu=1]"]}, "mtu is 68 to 9202"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"backend": "toast"}, "no installed device has a toast"),
        ({"backend": None}, "device is a plug-in's name"),
        ({"guest": "other"}, "no guest 'other'"),
        ({"backend": "disk", "specs": ["raw:[shared]{folder}/a.img"]}, "started with"),
    ],
)
async def test_what_cannot_be_added_is_refused_and_changes_nothing(tmp_path, changes, hint):
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    if isinstance(changes.get("specs"), list):
        specs = [str(each).format(folder=tmp_path) for each in changes["specs"]]
        changes = {**changes, "specs": specs if changes["specs"] != [7] else [7]}
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match=hint):
            await served.add(**changes)
        assert len(os.listdir("/proc/self/fd")) == open_before
        assert served.names() == ["storvsp 0", "netvsp 0"]


async def test_a_bus_that_is_full_takes_no_more_and_nothing_stays_open(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = BusConfig(engine=EngineConfig(budgets=Budgets(max_channels=2)))
    async with serving(GuestServer(SETUPS, config)) as served:
        await served.attach()
        with pytest.raises(BudgetError, match="2 channels are allowed"):
            await served.add(backend="disk", specs=[f"raw:{image}"])
        await served.remove(0)
        # The image is not locked any more.
        assert (await served.add(backend="disk", specs=[f"raw:{image}"]))["index"] == 1


async def test_a_guest_that_leaves_meanwhile_gets_nothing_and_what_was_made_is_closed(
    tmp_path, monkeypatch
):
    closed = []
    begun, go_on = trio.Event(), trio.Event()
    from netvsp.endpoints import null

    class SlowEndpoint(null.NullEndpoint):
        async def aclose(self) -> None:
            closed.append(self)

    async def open_slowly(_spec: object) -> SlowEndpoint:
        begun.set()
        await go_on.wait()
        return SlowEndpoint()

    async with serving(GuestServer(SETUPS)) as served:
        link = await served.attach()
        monkeypatch.setattr(null, "open_spec", open_slowly)
        async with trio.open_nursery() as nursery:

            async def add() -> None:
                with pytest.raises(ConfigError, match="vm has left"):
                    await served.add()

            nursery.start_soon(add)
            await begun.wait()
            link.close()
            await until(lambda: not served.devices())
            go_on.set()
        assert len(closed) == 1


async def test_two_operators_at_once_get_two_devices():
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(served.add)
        assert served.names() == ["storvsp 0", "netvsp 0", "netvsp 1", "netvsp 2", "netvsp 3"]
        assert len({each["instance"] for each in served.devices()}) == 5


async def test_lines_that_come_with_a_command_are_the_devices_own_or_are_closed():
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        for changes in ({"guest": "other"}, {"specs": "no list"}, {"specs": ["nul:"]}):
            ours, theirs = make_line(4096)
            with pytest.raises(ConfigError):
                await served.server.command({**ADD, **changes}, {"switch:lan": theirs})
            assert ours.sock.recv(1) == b"", "the other end is closed"
            ours.close()
        ours, theirs = make_line(0)
        answer = await served.server.command(
            {**ADD, "specs": ["switch:lan"]}, {"switch:lan": theirs}
        )
        assert answer["source"] == "switch:lan"
        await served.remove(answer["index"])
        assert ours.sock.recv(1) == b""
        ours.close()


async def test_what_an_operator_should_know_of_a_new_device_is_told(tmp_path):
    image = tmp_path / "odd.img"
    image.write_bytes(bytes((1 << 20) + 7))
    async with serving(GuestServer(SETUPS)) as served:
        await served.attach()
        answer = await served.add(backend="disk", specs=[f"raw:{image}"])
        (warning,) = answer["warnings"]
        assert str(image) in warning


def test_other_commands_want_no_device():
    assert wanted_setup({"action": "add", "spec": "ram:1M"}) is None
    assert wanted_setup({}) is None
    assert wanted_setup({**ADD, "options": {"a": 1}}) == DeviceSetup("netvsp", ("null:",), {"a": 1})
