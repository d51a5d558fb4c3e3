"""What guests share, in workers of its own: devices that are added have lines to it, too."""

from __future__ import annotations

import pytest

from tests.support.net_attached import attached_guest, bring_up, cross
from tests.support.patience import until
from tests.support.supervisor import supervised
from vmbus.errors import ConfigError
from vmbus.server import DeviceSetup
from vmbus.supervisor import Plan
from vmbus.supervisor.sandbox import landlock_version

pytestmark = pytest.mark.slow

ADD = {"backend": "endpoint", "action": "add-device"}
REMOVE = {"backend": "endpoint", "action": "remove-device"}
MEGABYTE = 1 << 20


@pytest.mark.parametrize("allowed", [None, ()])
async def test_guests_in_two_processes_are_given_adapters_of_one_switch_and_lose_them(
    tmp_path, allowed
):
    if allowed is not None and not landlock_version():
        pytest.skip("this kernel has no Landlock")
    plan = Plan(setups=(DeviceSetup("storvsp", ("ram:1M",)),), allowed=allowed)
    async with (
        supervised(tmp_path, plan) as served,
        attached_guest(served.path, "one") as one,
        attached_guest(served.path, "two") as two,
    ):
        server = served.supervisor
        specs = ["switch:lan"]
        added = [
            await server.command({**ADD, "guest": name, "specs": specs}) for name in ("one", "two")
        ]
        assert [each["index"] for each in added] == [0, 0]
        assert [key.name for key in server.keeping.workers] == ["switch:lan"]
        first = await bring_up(one, added[0]["instance"])
        second = await bring_up(two, added[1]["instance"])
        assert first.address != second.address
        await cross(first, second)
        await cross(second, first)

        assert await server.command({**REMOVE, "guest": "one", "index": 0}) == {}
        await one.connection.wait_gone(first.offer.relid)
        again = await server.command({**ADD, "guest": "one", "specs": specs})
        assert (again["instance"], again["mac"]) == (added[0]["instance"], added[0]["mac"])
        first = await bring_up(one, again["instance"])
        await cross(first, second)
        for guest in (one, two):
            guest.check_memory()


async def test_an_added_adapter_is_on_the_switch_of_those_that_were_there_from_the_start(tmp_path):
    plan = Plan(setups=(DeviceSetup("netvsp", ("switch:[vlan=5]lan",)),))
    async with (
        supervised(tmp_path, plan) as served,
        attached_guest(served.path, "one") as one,
        attached_guest(served.path, "two") as two,
    ):
        server = served.supervisor
        keepers = dict(server.keeping.workers)
        answer = await server.command({**ADD, "guest": "two", "specs": ["switch:[vlan=5]lan"]})
        assert answer["index"] == 1
        assert server.keeping.workers == keepers
        (device,) = (await served.guest("one"))["devices"]
        await cross(
            await bring_up(one, device["instance"]), await bring_up(two, answer["instance"])
        )


async def test_what_cannot_be_shared_by_added_devices_is_refused(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MEGABYTE))
    async with supervised(tmp_path) as served, attached_guest(served.path, "vm"):
        server = served.supervisor
        for request, hint in (
            ({"backend": "disk", "specs": [f"raw:[shared]{image}"]}, "started with"),
            ({"specs": ["switch:{guest}"]}, "a switch needs a name"),
            ({"specs": ["switch:[vlan=5000]lan"]}, "vlan"),
            ({"specs": ["switch:[join=/proc/nowhere]lan"]}, "join=/proc"),
            ({"specs": ["null:"], "guest": "other"}, "no guest 'other'"),
        ):
            with pytest.raises(ConfigError, match=hint):
                await server.command({**ADD, **request})
        assert len((await served.guest("vm"))["devices"]) == 1


async def test_a_keeper_that_has_died_is_made_anew_for_what_is_added(tmp_path):
    async with supervised(tmp_path) as served, attached_guest(served.path, "vm") as guest:
        server = served.supervisor
        wanted = {**ADD, "specs": ["switch:lan"]}
        lost = await server.command(wanted)
        adapter = await bring_up(guest, lost["instance"])
        (keeper,) = server.keeping.workers.values()
        server.kill(keeper.pid)
        await keeper.gone.wait()
        await until(lambda: not adapter.link)
        assert (await server.command(wanted))["failure"] == ""
        assert list(server.keeping.workers.values()) != [keeper]
