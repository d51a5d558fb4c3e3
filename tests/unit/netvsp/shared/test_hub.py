"""One switch of each name in an event loop."""

from __future__ import annotations

import logging

import pytest

from netvsp.shared.hub import get_hub
from netvsp.switch.port import PortConfig
from tests.support.switch import BROADCAST, make_frame, station
from vmbus.errors import ConfigError


async def test_a_name_stands_for_one_switch_until_the_last_has_given_it_back():
    hub = get_hub("lan")
    assert get_hub("lan") is hub
    assert get_hub("dmz") is not hub
    await hub.release()
    assert get_hub("lan") is hub
    await hub.release()
    await hub.release()
    again = get_hub("lan")
    assert again is not hub
    await again.release()
    await get_hub("dmz").release()


async def test_a_second_directory_is_refused(tmp_path):
    hub = get_hub("lan", str(tmp_path))
    assert get_hub("lan") is hub
    with pytest.raises(ConfigError, match=r"cannot in .*elsewhere"):
        get_hub("lan", str(tmp_path / "elsewhere"))
    await hub.release()
    await hub.release()
    assert {each.name for each in tmp_path.iterdir()} == {"lan.key"}


async def test_what_people_should_know_is_logged(caplog):
    caplog.set_level(logging.INFO)
    hub = get_hub("lan")
    config = PortConfig(addresses=9)
    one, other = (hub.switch.add_port(name, config, lambda: None) for name in ("one", "other"))
    hub.set_station(one, station(1))
    hub.set_station(other, station(1))
    assert (
        "switch lan: 00:15:5d:00:00:01 is another port's address; other gets nothing" in caplog.text
    )
    hub.set_station(other, station(2))
    for port in (one, other):
        hub.switch.receive(port, [make_frame(7, BROADCAST)])
    assert "switch lan: 00:15:5d:00:00:07 has moved from one to other, VLAN 0" in caplog.text
    assert hub.describe()["moves"] == 1
    await hub.release()
