"""A switch in a keeper's process: lines of guests to it, and two servers whose switches are one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import pytest
import trio

from netvsp.endpoint import EndpointError
from netvsp.endpoints.switch import connect
from tests.support.cli import install_plugin
from tests.support.house import ROOT
from tests.support.patience import PATIENCE, until
from tests.support.switch import BROADCAST, make_frame, station
from tests.support.switch_lines import Adapter
from vmbus.server import DeviceSetup
from vmbus.supervisor import Plan, Supervisor
from vmbus.supervisor.sandbox import landlock_version

pytestmark = pytest.mark.slow

PLUGIN = '''
"""A device of which nothing is there but what its guests share."""

from netvsp.endpoints import switch

class Plugin:
    backends = None
    demo = None

    async def from_specs(self, specs, *, instance_id, initiator, options, shared=None):
        raise AssertionError("no guest comes")

    def shared(self, specs, options):
        return switch.shared(specs)

    async def open_keeper(self, specs, *, identity):
        return await switch.open_keeper(specs)

    async def command(self, device, request):
        raise AssertionError("no operator comes")

PLUGIN = Plugin()
'''


@pytest.fixture(autouse=True)
def _toy(tmp_path, monkeypatch):
    place = tmp_path / "site"
    place.mkdir()
    install_plugin(place, "vmbus.devices", "toynet", "toynet_switch:PLUGIN", PLUGIN)
    monkeypatch.syspath_prepend(place)
    paths = (str(place), str(ROOT), str(ROOT / "devices"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def is_up(adapter: Adapter) -> bool:
    return bool(adapter.endpoint.snapshot().get("port", {}).get("up"))


@contextlib.asynccontextmanager
async def guest(supervisor: Supervisor, number: int) -> AsyncIterator[list[Adapter]]:
    """Adapters at the lines that a guest gets, in the order of its devices."""
    lines = await supervisor.lines(f"guest{number}")
    assert all(line.staging_fd is None for line in lines.values())
    adapters = [
        Adapter(connect(line), station(10 * number + place))
        for place, line in enumerate(lines.values())
    ]
    try:
        async with trio.open_nursery() as nursery:
            for adapter in adapters:
                nursery.start_soon(adapter.endpoint.run, adapter)
            await until(lambda: all(is_up(adapter) for adapter in adapters))
            yield adapters
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            for adapter in adapters:
                await adapter.endpoint.aclose()


def plan(*specs: str, allowed: tuple[str, ...] | None = None) -> Plan:
    setups = tuple(DeviceSetup("toynet", (spec,)) for spec in specs)
    return Plan(setups=setups, allowed=allowed)


async def test_adapters_of_all_guests_and_devices_are_on_one_switch():
    wanted = plan("switch:lan", "switch:[vlan=5]lan", "switch:dmz")
    async with Supervisor.open(wanted) as server, guest(server, 1) as one, guest(server, 2) as two:
        assert sorted(key.name for key in server.keeping.workers) == ["switch:dmz", "switch:lan"]
        for at in range(3):
            await one[at].send(make_frame(10 + at, BROADCAST, bytes([at])))
            await two[at].until(make_frame(10 + at, BROADCAST, bytes([at])).head)
        assert not [frame for each in (*one, *two) for frame in each.frames]
        for number in range(100):
            frame = make_frame(10, 20, number.to_bytes(2, "big") + bytes(5000))
            await one[0].send(frame)
            await two[0].until(frame.head)


async def test_a_keeper_that_dies_is_the_end_of_its_lines_and_another_comes(caplog):
    async with Supervisor.open(plan("switch:lan")) as server:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with guest(server, 1):
                (keeper,) = server.keeping.workers.values()
                server.kill(keeper.pid)
                await trio.sleep_forever()
        assert caught.group_contains(EndpointError, match="keeps the switch has ended")
        with trio.fail_after(PATIENCE):
            await keeper.gone.wait()
        async with guest(server, 1) as (one,), guest(server, 2) as (two,):
            await one.send(make_frame(10, 20))
            await two.until(make_frame(10, 20).head)
    assert "switch:lan: its worker was killed by SIGKILL" in caplog.text


@pytest.mark.parametrize("confined", [False, True])
async def test_switches_of_two_servers_are_one(tmp_path, confined):
    if confined and not landlock_version():
        pytest.skip("this kernel has no Landlock")
    place = tmp_path / "meeting"
    place.mkdir(mode=0o700)
    wanted = plan(f"switch:[join={place}]lan", allowed=() if confined else None)
    async with (
        Supervisor.open(wanted) as first,
        Supervisor.open(wanted) as second,
        guest(first, 1) as (one,),
        guest(second, 2) as (two,),
    ):
        heard = False
        while not heard:
            # Until they have met, nobody is there.
            await one.send(make_frame(10, BROADCAST, b"who is there?"))
            with trio.move_on_after(0):
                await two.until(make_frame(10, BROADCAST, b"who is there?").head)
                heard = True
            heard = heard or bool(two.frames)
            await trio.lowlevel.checkpoint()
        await two.send(make_frame(20, 10, b"I am"))
        await one.until(make_frame(20, 10, b"I am").head)
    assert {each.name for each in place.iterdir()} == {"lan.key"}
