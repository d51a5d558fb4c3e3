"""The how-to's device keeps the contract, and a guest can use it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from uuid import UUID

import pytest
import trio

from tests.support.cli import child_environment
from tests.support.house import ROOT
from tests.support.patience import PATIENCE
from vmbus.cli.serve import parse_device
from vmbus.errors import ConfigError
from vmbus.guest.kernel import boot
from vmbus.guest.personality import LINUX_6_1
from vmbus.host import open_bus
from vmbus.partition.loopback import LoopbackTransport
from vmbus.partition.soft_machine import SoftMachine
from vmbus.testing import check_device

HOWTO = ROOT / "docs/howto"
INSTANCE = UUID(int=5)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_device", HOWTO / "example_device.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_example_keeps_the_contract(example):
    await check_device(lambda: example.MirrorDevice(INSTANCE))


async def test_a_guest_gets_its_bytes_back_reversed(example):
    device = await example.MirrorDevice.from_specs(
        [], instance_id=INSTANCE, initiator=None, options={}
    )
    machine = SoftMachine(((0, 4 << 20),))
    with trio.fail_after(PATIENCE), LoopbackTransport(machine.synic) as transport:
        async with open_bus(transport, [device]), boot(machine, LINUX_6_1) as guest:
            (offer,) = await guest.connection.connect()
            assert offer.class_id == example.CLASS_MIRROR
            channel = await guest.connection.open_channel(offer, ring_pages=4)
            answer = await channel.request(b"backward")
            assert answer.payload == b"drawkcab"
            await guest.connection.unload()
    assert device.snapshot() == {"answered": 1}
    machine.close()


async def test_the_options_that_the_page_shows_are_those_of_the_example(example):
    page = (HOWTO / "write-a-device.md").read_text()
    (text,) = set(re.findall(r"--device '(mirror \S+ \S+)'", page))
    setup = parse_device(text)
    assert {option.name for option in example.OPTIONS} == set(setup.options)
    device = await example.MirrorDevice.from_specs(
        setup.specs, instance_id=INSTANCE, initiator=None, options=setup.options
    )
    machine = SoftMachine(((0, 4 << 20),))
    with trio.fail_after(PATIENCE), LoopbackTransport(machine.synic) as transport:
        async with open_bus(transport, [device]), boot(machine, LINUX_6_1) as guest:
            (offer,) = await guest.connection.connect()
            channel = await guest.connection.open_channel(offer, ring_pages=4)
            assert (await channel.request(b"backward")).payload == b"DRAWKCAB"
            await guest.connection.unload()
    machine.close()
    await check_device(lambda: example.MirrorDevice(INSTANCE, delay=0.001, loud=True))


async def test_the_example_refuses_what_it_cannot_do(example):
    with pytest.raises(ConfigError, match=r"unknown option 'colour'; .*known: delay and loud"):
        await example.MirrorDevice.from_specs(
            [], instance_id=INSTANCE, initiator=0, options={"colour": "red"}
        )
    with pytest.raises(ConfigError, match="no back-ends"):
        await example.MirrorDevice.from_specs(["x"], instance_id=INSTANCE, initiator=0, options={})
    with pytest.raises(ConfigError, match="nothing but mirror"):
        await example.MirrorDevice.command(example.MirrorDevice(INSTANCE), {})


def test_the_program_in_which_a_guest_talks_to_it_runs_as_it_stands():
    page = (HOWTO / "write-a-device.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (program,) = (each for each in programs if "connect()" in each)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HOWTO,
        env=child_environment(PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (printed,) = re.findall(r"this prints `(.*?)`", page)
    assert done.stdout == f"{printed}\n"


def test_the_page_shows_the_code_as_it_is():
    page = (HOWTO / "write-a-device.md").read_text()
    source = (HOWTO / "example_device.py").read_text()
    shown = [block.split("```")[0] for block in page.split("```python\n")[1:3]]
    assert len(shown) == 2
    for block in shown:
        assert block in source
