"""``vmbus nic`` with a server and guests in processes of their own: adapters that come and go."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from tests.support.cli import run_cli, serving
from tests.support.net_attached import attached_guest, bring_up, cross

pytestmark = pytest.mark.slow

MODES = [[], ["--single-process"]]
"""A process per guest, and one for all."""


async def nic(path: str, *arguments: str) -> Any:
    """Carry out ``vmbus nic``; return what it prints as JSON."""
    action, *rest = arguments
    result = await trio.to_thread.run_sync(
        lambda: run_cli("nic", action, "--socket", path, "--json", *rest)
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("mode", MODES)
async def test_adapters_come_to_two_guests_are_connected_and_go(path, mode):
    with serving("--socket", path, "--disk", "ram:1M", "--net", "null:", *mode) as server:
        async with attached_guest(path, "one") as one, attached_guest(path, "two") as two:
            added = [
                await nic(path, "add", "--guest", each, "switch:lan") for each in ("one", "two")
            ]
            assert [each["index"] for each in added] == [1, 1]
            first = await bring_up(one, added[0]["instance"])
            second = await bring_up(two, added[1]["instance"])
            await cross(first, second)
            listed = [(each["guest"], each["adapter"]) for each in await nic(path, "list")]
            assert listed == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
            counted = await nic(path, "stats", "--guest", "one", "--adapter", "1")
            assert counted["transmit"]["frames"] > 0
            assert await nic(path, "remove", "--guest", "one", "1") == {}
            await one.connection.wait_gone(first.offer.relid)
            again = await nic(path, "add", "--guest", "one", "null:")
            assert (again["index"], again["mac"]) == (1, added[0]["mac"])
        assert server.stop() == 0
