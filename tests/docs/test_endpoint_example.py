"""The example of docs/howto/write-an-endpoint.md works as it is printed there."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import trio
import trio.testing

from netvsp.endpoints.specs import ENDPOINTS, open_endpoint
from netvsp.frames.frame import Frame
from netvsp.testing import ListeningPort, check_endpoint
from netvsp.testing.frames import PEER, Packet
from netvsp.testing.port import MAC
from tests.support.house import ROOT
from tests.support.patience import until
from vmbus.errors import ConfigError

HOWTO = ROOT / "docs" / "howto"


@pytest.fixture
def example(monkeypatch):
    """Import the example and register it as its entry point would."""
    location = importlib.util.spec_from_file_location(
        "example_endpoint", HOWTO / "example_endpoint.py"
    )
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    monkeypatch.setitem(sys.modules, "example_endpoint", module)
    location.loader.exec_module(module)
    installed = importlib.metadata.entry_points(group=ENDPOINTS.group)
    point = importlib.metadata.EntryPoint("wire", "example_endpoint:open_spec", ENDPOINTS.group)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: importlib.metadata.EntryPoints([*installed, point]),
    )
    return module


async def test_the_example_keeps_the_contract_with_nobody_at_the_other_end(example):
    await check_endpoint(lambda: open_endpoint("wire:lab"))


async def test_the_example_keeps_the_contract_with_somebody_there(example):
    async with trio.open_nursery() as nursery:
        others = []

        async def make():
            other = await open_endpoint("wire:lab")
            nursery.start_soon(other.run, ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            others.append(other)
            return await open_endpoint("wire:lab")

        def provoke(_endpoint):
            data = Packet(source_mac=PEER, target_mac=MAC).build()
            assert others[-1].transmit(0, [Frame(data) for _ in range(5)]) == 5

        await check_endpoint(make, provoke=provoke)
        nursery.cancel_scope.cancel()


async def test_the_example_has_a_link_while_both_ends_are_there(example):
    one, other = await open_endpoint("wire:lab"), await open_endpoint("wire:lab")
    ports = ListeningPort(), ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, ports[0])
        await until(lambda: ports[0].up is False)
        async with trio.open_nursery() as inner:
            inner.start_soon(other.run, ports[1])
            await until(lambda: ports[0].up and ports[1].up)
            assert one.transmit(0, [Frame(b"x" * 60)]) == 1
            await until(lambda: ports[1].frames)
            inner.cancel_scope.cancel()
        assert ports[0].up is False
        assert one.transmit(0, [Frame(b"x" * 60)]) == 1
        nursery.cancel_scope.cancel()
    with pytest.raises(ConfigError, match="needs a name"):
        await open_endpoint("wire:")


def code_blocks(language):
    text = (HOWTO / "write-an-endpoint.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_page_quotes_the_example_word_for_word():
    source = (HOWTO / "example_endpoint.py").read_text()
    quoted = [block for block in code_blocks("python") if "trio.run" not in block]
    assert len(quoted) == 4
    for block in quoted:
        assert block in source


def test_the_last_program_of_the_page_runs(tmp_path):
    (program,) = [block for block in code_blocks("python") if "trio.run" in block]
    (registration,) = code_blocks("toml")
    info = tmp_path / "example_endpoint-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-endpoint\nVersion: 1\n")
    table = re.sub(r"[][\"]|project\.entry-points\.", "", registration)
    group, line = table.splitlines()
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), str(HOWTO), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
