"""A keeper that starts programs may; a guest's worker and any other keeper may not."""

from __future__ import annotations

import os

import pytest
import trio

from tests.support.cli import install_plugin
from tests.support.house import ROOT
from tests.support.patience import PATIENCE
from vmbus.server import DeviceSetup
from vmbus.supervisor import Plan, Supervisor

pytestmark = pytest.mark.slow

PLUGIN = '''
"""A device of which nothing is there but what its guests share: what a program says."""

import subprocess

import trio

from vmbus.plugins.sharing import Share

class Keeper:
    async def serve(self, line, initiator, spec):
        await trio.lowlevel.checkpoint()
        try:
            said = subprocess.run(["echo", spec], stdout=subprocess.PIPE).stdout
        except OSError as error:
            said = str(error.strerror).encode()
        line.sock.send(said)
        line.close()

    async def aclose(self):
        await trio.lowlevel.checkpoint()

class Plugin:
    backends = None
    demo = None

    async def from_specs(self, specs, *, instance_id, initiator, options, shared=None):
        raise AssertionError("no guest comes")

    def shared(self, specs, options):
        return {spec: Share(keeper=spec, programs=spec == "free") for spec in specs}

    async def open_keeper(self, specs, *, identity):
        return Keeper()

    async def command(self, device, request):
        raise AssertionError("no operator comes")

PLUGIN = Plugin()
'''


@pytest.fixture(autouse=True)
def _toy(tmp_path, monkeypatch):
    place = tmp_path / "site"
    place.mkdir()
    install_plugin(place, "vmbus.devices", "toyecho", "toy_echo:PLUGIN", PLUGIN)
    monkeypatch.syspath_prepend(place)
    paths = (str(place), str(ROOT), str(ROOT / "devices"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.parametrize("allowed", [None, ()])
async def test_only_a_keeper_that_says_so_starts_programs(allowed):
    plan = Plan(setups=(DeviceSetup("toyecho", ("free", "confined")),), allowed=allowed)
    said = {}
    async with Supervisor.open(plan) as server:
        for _ in range(2):  # the same keepers
            for key, line in (await server.keeping.lines("guest")).items():
                with trio.fail_after(PATIENCE):
                    await trio.lowlevel.wait_readable(line.sock)
                said[key.spec] = line.sock.recv(100)
                line.close()
            assert said == {"free": b"free\n", "confined": b"Operation not permitted"}
        assert len(server.keeping.workers) == 2
