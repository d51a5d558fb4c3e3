"""What guests share: which keeper has it, who needs a line to it, and who opens it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import trio

from tests.support.patience import until
from vmbus.errors import ConfigError
from vmbus.plugins import sharing
from vmbus.plugins.sharing import Line, Share
from vmbus.server import DeviceSetup, Keepers, keepers as keepers_module
from vmbus.server.devices import SharedKey
from vmbus.server.keepers import (
    KeeperKey,
    NoKeepers,
    kept_specs,
    shared_backends,
    shared_by_added,
    unshared,
)


class Toy:
    """A plug-in whose back-ends are shared as their names say."""

    def __init__(self) -> None:
        self.opened: list[tuple[list[str], bytes]] = []
        self.served: list[tuple[Hashable, str, bool]] = []
        self.closed = 0

    backends = None
    demo = None

    async def from_specs(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no guest comes")

    async def command(self, *_: Any) -> Any:
        raise AssertionError("no operator comes")

    def shared(self, specs, options):
        del options
        shares = {
            "own": Share(staging=4096),
            "common": Share(keeper="all"),
            "local": Share(keeper="all", within_process=False),
        }
        return {spec: shares[kind] for spec in specs if (kind := spec.partition(":")[0]) in shares}

    async def open_keeper(self, specs, *, identity):
        self.opened.append((list(specs), identity))
        return self

    async def serve(self, line: Line, initiator: Hashable, spec: str) -> None:
        self.served.append((initiator, spec, line.staging_fd is not None))
        line.close()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.closed += 1


SETUPS = [
    DeviceSetup("toy", ("own:a", "private", "common:b")),
    DeviceSetup("toy", ("own:a", "common:c", "local:d")),
    DeviceSetup("toy", ("common:b",)),
]
ALL = KeeperKey("toy", -1, "all")


@pytest.fixture
def toy(monkeypatch) -> Toy:
    made = Toy()
    monkeypatch.setattr(keepers_module, "load_device", lambda _: made)
    return made


def test_each_has_a_keeper_of_its_own_or_one_with_others(toy):
    assert sharing.can_share(toy)
    found = shared_backends(SETUPS)
    assert {key: how.keeper for key, how in found.items()} == {
        (0, "own:a"): ("toy", 0, "own:a"),
        (0, "common:b"): ALL,
        (1, "own:a"): ("toy", 1, "own:a"),
        (1, "common:c"): ALL,
        (1, "local:d"): ALL,
        (2, "common:b"): ALL,
    }
    assert {how.staging for how in found.values()} == {0, 4096}
    assert kept_specs(SETUPS, ALL) == ["common:b", "common:c", "local:d"]
    assert kept_specs(SETUPS, KeeperKey("toy", 1, "own:a")) == ["own:a"]
    assert SharedKey(1, "local:d") not in shared_backends(SETUPS, within_process=True)


def test_what_is_not_shared_is_each_guests_own(toy):
    assert [setup.specs for setup in unshared(SETUPS)] == [("private",), (), ()]


async def test_keepers_of_a_process_are_made_once_and_serve_each_guest(toy):
    async with Keepers.open(SETUPS) as keepers:
        assert sorted(specs for specs, _ in toy.opened) == [
            ["common:b", "common:c", "local:d"],
            ["own:a"],
            ["own:a"],
        ]
        assert len({identity for _, identity in toy.opened}) == 3
        lines = await keepers.lines("guest")
        assert len(lines) == 5
        await until(lambda: len(toy.served) == 5)
        assert set(toy.served) == {
            ("guest", "own:a", True),
            ("guest", "common:b", False),
            ("guest", "common:c", False),
        }
        for line in lines.values():
            assert len(line.filenos()) == 1 + (line.staging_fd is not None)
            line.close()
    assert toy.closed == 3


def test_what_several_devices_share_may_have_a_guests_name_in_its_options(toy):
    found = shared_backends([DeviceSetup("toy", ("common:{guest}",))])
    assert [how.keeper for how in found.values()] == [ALL]
    with pytest.raises(ConfigError, match="has no guest's name in it"):
        shared_backends([DeviceSetup("toy", ("own:{guest}",))])


def test_what_an_added_device_shares_has_a_keeper_of_that_name(toy):
    found = shared_by_added(DeviceSetup("toy", ("common:b", "local:d", "private")))
    assert {key: how.keeper for key, how in found.items()} == {
        (0, "common:b"): ALL,
        (0, "local:d"): ALL,
    }
    local = shared_by_added(DeviceSetup("toy", ("local:d",)), within_process=True)
    assert local == {}
    with pytest.raises(ConfigError, match="only by devices that the server was started with"):
        shared_by_added(DeviceSetup("toy", ("own:a",)))


async def test_keepers_of_a_process_serve_what_is_added_and_open_it_once(toy):
    added = DeviceSetup("toy", ("common:x", "common:y"))
    async with Keepers.open([DeviceSetup("toy", ("private",))]) as keepers:
        assert await keepers.lines("guest") == {}
        for _ in range(2):
            for line in (await keepers.lines("guest", added)).values():
                line.close()
        await until(lambda: len(toy.served) == 4)
        assert [specs for specs, _ in toy.opened] == [["common:x"]]
    assert toy.closed == 1


async def test_a_server_that_keeps_nothing_says_so(toy):
    assert await NoKeepers().lines("guest") == {}
    assert await NoKeepers().lines("guest", DeviceSetup("toy", ("local:d",))) == {}
    with pytest.raises(ConfigError, match="common:b: this server keeps nothing"):
        await NoKeepers().lines("guest", DeviceSetup("toy", ("common:b",)))
