"""Two stations of the demo in this process, and what they tell of a network that is not good."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from netvsp.demo import half, talk
from netvsp.demo.half import PROGRAM
from tests.support.cli import child_environment
from tests.support.demo import Told, live
from vmbus import demo
from vmbus.attach.server import open_listener, serve
from vmbus.demo import DemoGuest
from vmbus.server import DeviceSetup, GuestServer


@contextlib.asynccontextmanager
async def server_for(folder: Path, spec: str) -> AsyncIterator[str]:
    """A server whose guests have an adapter each; yields its socket's path."""
    path = folder / "s"
    server = GuestServer([DeviceSetup("netvsp", (spec,))])
    with open_listener(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve, listener, server.handle, query=server.query_own))
            yield str(path)
            nursery.cancel_scope.cancel()


def station(path: str, number: int, **options: str) -> DemoGuest:
    arguments = {"socket": path, "name": f"s{number}", "station": str(number), "seconds": "0",
                 "channels": "2", **options}  # fmt: skip
    return PROGRAM.parse([f"--{name}={value}" for name, value in arguments.items()])


async def both(path: str, **options: str) -> list[bool]:
    """Have two stations live; return whether all was well for each."""
    results: dict[int, bool] = {}

    async def one(number: int) -> None:
        results[number] = await live(station(path, number, **options))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 1)
        nursery.start_soon(one, 2)
    return [results[1], results[2]]


@pytest.mark.parametrize("guest", ["linux-6.1", "freebsd", "uefi", "macos"])
async def test_two_stations_meet_ping_and_stream_both_ways(tmp_path, capsys, guest):
    async with server_for(tmp_path, "switch:lan") as path:
        assert await both(path, guest=guest) == [True, True]
    story = Told(capsys.readouterr().out)
    assert len(story.of("met")) == len(story.of("left")) == 2
    assert {str(event["address"]) for event in story.of("met")} == {"10.0.0.1", "10.0.0.2"}
    assert [event["answered"] for event in story.of("ping")] == [half.PINGS] * 2
    streams = [(event["way"], event["lost"], event["damaged"]) for event in story.of("stream")]
    assert sorted(streams) == [("received", 0, 0)] * 2 + [("sent", 0, 0)] * 2
    assert all(int(str(event["frames"])) >= talk.LEAST for event in story.of("stream"))
    documented = f"{demo.__doc__}{half.__doc__}"
    for event in story.events:
        assert str(event["event"]) in documented
        assert all(f"``{name}``" in documented for name in event if name != "event")


async def test_a_station_without_another_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(talk, "PATIENCE", 0.3)
    async with server_for(tmp_path, "null:") as path:
        assert not await live(station(path, 1))
    assert Told(capsys.readouterr().out).problems == [("guest", "nobody answers for 10.0.0.2")]


async def test_a_bus_without_an_adapter_is_a_problem(tmp_path, capsys):
    path = tmp_path / "s"
    server = GuestServer([DeviceSetup("storvsp", ("ram:1M",))])
    with open_listener(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve, listener, server.handle, query=server.query_own))
            assert not await live(station(str(path), 1))
            nursery.cancel_scope.cancel()
    assert Told(capsys.readouterr().out).problems == [
        ("guest", "the bus offers no network adapter that this driver serves")
    ]


def test_a_guest_whose_network_driver_is_not_played_is_told_apart():
    done = subprocess.run(
        [sys.executable, "-m", "netvsp.demo", "--socket=s", "--station=1", "--guest=haiku"],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("its network driver is not played\n")
