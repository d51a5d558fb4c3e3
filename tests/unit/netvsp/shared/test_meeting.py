"""Switches of the same name that are one, whichever comes or goes first."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from netvsp.endpoints.switch import SwitchEndpoint
from netvsp.shared import meeting as meeting_module
from netvsp.shared.hub import Hub
from netvsp.switch.port import PortConfig
from tests.support.patience import until
from tests.support.switch import BROADCAST, make_frame, station
from tests.support.switch_lines import Adapter
from vmbus.errors import ConfigError


class Server:
    """A switch of a server, with the adapters of its guests."""

    def __init__(self, directory: str, nursery: trio.Nursery) -> None:
        self.hub = Hub("lan")
        self.hub.join(directory)
        self._nursery = nursery

    def adapter(self, number: int, **options: Any) -> Adapter:
        config = PortConfig(**options)
        adapter = Adapter(SwitchEndpoint(self.hub, str(number), config), station(number))
        self._nursery.start_soon(adapter.endpoint.run, adapter)
        return adapter

    @property
    def joined(self) -> int:
        found = self.hub.describe()["joined"]
        assert isinstance(found, dict)
        return len(found["with"])

    def knows(self, number: int) -> bool:
        return station(number) in self.hub.switch._claims


@contextlib.asynccontextmanager
async def server(path, nursery: trio.Nursery) -> AsyncIterator[Server]:
    made = Server(str(path), nursery)
    try:
        yield made
    finally:
        with trio.CancelScope(shield=True):
            await made.hub.aclose()


@contextlib.asynccontextmanager
async def guests() -> AsyncIterator[trio.Nursery]:
    """Where the guests of a test run."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def test_guests_of_two_servers_are_on_one_switch(tmp_path):
    async with guests() as nursery, server(tmp_path, nursery) as a, server(tmp_path, nursery) as b:
        one, two, three = a.adapter(1), b.adapter(2), b.adapter(3, vlan=5)
        await until(lambda: a.joined and b.joined and a.knows(2) and b.knows(1) and a.knows(3))
        await one.send(make_frame(1, 2, b"there"))
        await two.until(make_frame(1, 2, b"there").head)
        await two.send(make_frame(2, 1, b"and back"))
        await one.until(make_frame(2, 1, b"and back").head)
        four = a.adapter(4, trunk=frozenset({5}))
        await until(lambda: b.knows(4))
        await one.send(make_frame(1, BROADCAST, b"not in their VLAN"))
        await four.send(make_frame(4, BROADCAST, b"tagged", tci=5))
        await three.until(make_frame(4, BROADCAST, b"tagged").head)
        await two.until(make_frame(1, BROADCAST, b"not in their VLAN").head)
        assert three.frames == four.frames == []


async def test_both_connect_at_once_and_one_connection_stays(tmp_path):
    async with guests() as nursery, server(tmp_path, nursery) as a, server(tmp_path, nursery) as b:
        one, two = a.adapter(1), b.adapter(2)
        await until(lambda: a.joined and b.joined and a.knows(2) and b.knows(1))
        await until(lambda: len(a.hub.switch.ports) == len(b.hub.switch.ports) == 2)
        await one.send(make_frame(1, BROADCAST, b"first"), make_frame(1, BROADCAST, b"last"))
        await until(lambda: len(two.frames) == 2)
        assert [frame.head[14:] for frame in two.frames] == [b"first", b"last"]


async def test_among_three_each_frame_arrives_once(tmp_path):
    async with (
        guests() as nursery,
        server(tmp_path, nursery) as a,
        server(tmp_path, nursery) as b,
        server(tmp_path, nursery) as c,
    ):
        servers = a, b, c
        adapters = [each.adapter(number) for number, each in enumerate(servers, 1)]
        await until(lambda: all(each.joined == 2 for each in servers))
        await until(lambda: all(each.knows(n) for each in servers for n in (1, 2, 3)))
        await until(lambda: all(len(each.hub.switch.ports) == 3 for each in servers))
        for number, adapter in enumerate(adapters, 1):
            await adapter.send(make_frame(number, BROADCAST))
        await until(lambda: all(len(each.frames) >= 2 for each in adapters))
        await trio.testing.wait_all_tasks_blocked()
        for number, adapter in enumerate(adapters, 1):
            sources = sorted(frame.head[6:12] for frame in adapter.frames)
            assert sources == [station(n) for n in (1, 2, 3) if n != number]


@pytest.mark.parametrize("first_goes", [True, False])
async def test_either_may_go_and_another_come(tmp_path, first_goes, caplog):
    caplog.set_level("WARNING")
    async with guests() as nursery, contextlib.AsyncExitStack() as stack:
        a = await stack.enter_async_context(server(tmp_path, nursery))
        b = await stack.enter_async_context(server(tmp_path, nursery))
        stay, leave = (b, a) if first_goes else (a, b)
        one, _ = stay.adapter(1), leave.adapter(2)
        await until(lambda: stay.knows(2) and leave.knows(1))
        await leave.hub.aclose()
        await until(lambda: not stay.joined)
        assert not stay.knows(2)
        async with server(tmp_path, nursery) as c:
            two = c.adapter(2)
            await until(lambda: stay.knows(2) and c.knows(1))
            await one.send(make_frame(1, 2))
            await two.until(make_frame(1, 2).head)
    assert not caplog.records


async def test_a_station_that_leaves_one_server_may_come_to_another(tmp_path):
    async with guests() as nursery, server(tmp_path, nursery) as a, server(tmp_path, nursery) as b:
        one = a.adapter(1)
        port = a.hub.switch.add_port("brief", PortConfig(), lambda: None)
        a.hub.set_station(port, station(2))
        await until(lambda: b.knows(2))
        two = b.adapter(2)
        await until(lambda: len(b.hub.switch._claims[station(2)]) == 2)
        a.hub.switch.remove_port(port)
        await until(lambda: len(b.hub.switch._claims[station(2)]) == 1)
        await two.send(make_frame(2, 1))
        await one.until(make_frame(2, 1).head)


async def test_a_connection_that_breaks_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting_module, "LOOK_AGAIN", 0)
    async with guests() as nursery, server(tmp_path, nursery) as a, server(tmp_path, nursery) as b:
        await until(lambda: a.joined and b.joined)
        meeting = a.hub._meeting
        assert meeting is not None
        (peer,) = meeting._peers.values()
        peer.scope.cancel()
        await until(lambda: peer not in meeting._peers.values() and a.joined and b.joined)


async def test_what_the_dead_have_left_is_removed(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "lan.0123456789abcdef"))
    (tmp_path / "lan.0123456789abcdeg").write_text("no socket of ours")
    async with guests() as nursery, server(tmp_path, nursery) as a:
        await until(lambda: not (tmp_path / "lan.0123456789abcdef").exists())
        assert not a.joined
    assert (tmp_path / "lan.0123456789abcdeg").exists()


async def test_who_has_another_key_is_not_let_in(tmp_path, caplog):
    async with guests() as nursery, server(tmp_path, nursery) as a:
        key = tmp_path / "lan.key"
        key.write_bytes(os.urandom(32))
        async with server(tmp_path, nursery) as b:
            await until(lambda: caplog.text.count("somebody without the key") >= 1)
            assert not a.joined
            assert not b.joined


async def test_who_says_nothing_is_not_waited_for(tmp_path, autojump_clock, caplog):
    async with guests() as nursery, server(tmp_path, nursery):
        (path,) = (each for each in tmp_path.iterdir() if each.suffix != ".key")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(path))
            while "somebody does not say who he is" not in caplog.text:
                await trio.sleep(1)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_where_others_may_write_is_refused(tmp_path, mode):
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(mode)

    async def main() -> None:
        with pytest.raises(ConfigError, match="nobody else may write there"):
            Hub("lan").join(str(place))

    trio.run(main)


async def test_a_key_that_others_can_read_is_refused(tmp_path):
    key = tmp_path / "lan.key"
    key.write_bytes(bytes(32))
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 600"):
        Hub("lan").join(str(tmp_path))
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(ConfigError, match="has no 32 bytes"):
        Hub("lan").join(str(tmp_path))


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"join=.*No such file"):
        Hub("lan").join(str(tmp_path / "a" / "b"))
    with pytest.raises(ConfigError, match="too long"):
        Hub("lan").join(str(tmp_path / ("x" * 120)))
