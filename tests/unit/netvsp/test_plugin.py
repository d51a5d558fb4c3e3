"""Adapters from specifications, and operators' requests."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from netvsp.adapter import NetworkAdapter
from netvsp.endpoints import switch
from netvsp.endpoints.null import NullEndpoint
from netvsp.plugin import PLUGIN
from vmbus.errors import ConfigError
from vmbus.plugins.devices import device_with, load_device
from vmbus.plugins.sharing import can_share, make_line

INSTANCE = UUID(int=0xE7)


async def make(*specs: str, guest: str = "vm", **options: Any) -> NetworkAdapter:
    return await PLUGIN.from_specs(specs, instance_id=INSTANCE, initiator=guest, options=options)


def test_it_is_the_device_whose_back_ends_are_endpoints():
    assert device_with("endpoint") == "netvsp"
    assert load_device("netvsp") is PLUGIN
    assert can_share(PLUGIN)


async def test_options_are_those_of_the_specification_or_of_the_device():
    adapter = await make(
        "null:[mac=02:00:00:00:00:07,mtu=4000,channels=3,name=wan,spoof,nic-trunk=0+7+20-22]",
        monitor=True,
        name="not this",
    )
    config = adapter.config
    assert adapter.mac.hex() == "020000000007"
    assert (config.max_mtu, config.max_queues, config.friendly_name) == (4000, 3, "wan")
    assert config.allow_spoofing
    assert not config.allow_mac_change
    assert config.trunk == frozenset({0, 7, 20, 21, 22})
    assert adapter.offer.monitor_latency
    assert adapter.source == "null:"
    assert adapter.offer.instance_id == INSTANCE
    await adapter.aclose()


async def test_each_guest_has_an_address_of_its_own_and_keeps_it():
    found = [(await make("null:", guest=name)).mac for name in ("a", "b", "a")]
    assert found[0] == found[2] != found[1]
    assert all(mac.startswith(bytes.fromhex("00155d")) for mac in found)


async def test_without_an_endpoint_the_cable_is_out():
    adapter = await make()
    assert isinstance(adapter.endpoint, NullEndpoint)
    assert not adapter.link.up
    assert (await make("null:")).link.up


@pytest.mark.parametrize(
    ("specs", "options", "hint"),
    [
        (("null:", "null:"), {}, "one endpoint, not 2"),
        (("null",), {}, "does not begin with a scheme"),
        (("nul:",), {}, "nul"),
        (("null:[speed=1]",), {}, "speed"),
        (("null:",), {"speed": "1"}, "speed"),
        (("null:[mac=1]",), {}, "not a MAC address"),
        (("null:[mac=01:00:00:00:00:01]",), {}, "not an address of a station"),
        (("null:[mtu=10]",), {}, "mtu is 68 to 9202"),
        (("null:[channels=65]",), {}, "queues is 1 to 64"),
        (("null:[nic-vlan=4095]",), {}, "vlan is 1 to 4094"),
        (("null:[nic-vlan=1,nic-trunk=2]",), {}, "exclude each other"),
        (("null:[nic-trunk=5-3]",), {}, "no VLAN and no range"),
        (("null:[offloads=perhaps]",), {}, "offloads"),
    ],
)
async def test_what_makes_no_sense_is_refused(specs, options, hint):
    with pytest.raises(ConfigError, match=hint):
        await make(*specs, **options)


async def test_requests_of_operators():
    adapter = await make("null:")
    assert await PLUGIN.command(adapter, {"action": "link", "up": False}) == {"link": "down"}
    assert not adapter.link.up
    assert await PLUGIN.command(adapter, {"action": "link", "up": True}) == {"link": "up"}
    answer = await PLUGIN.command(adapter, {"action": "mac", "mac": "02-00-00-00-00-09"})
    assert answer == {"mac": "02:00:00:00:00:09"}
    assert adapter.mac.hex() == "020000000009"
    found = await PLUGIN.command(adapter, {"action": "stats"})
    assert set(found) == {"transmit", "receive", "endpoint"}
    for request in ({"action": "dance"}, {"action": "link"}, {"action": "link", "up": 1}, {}):
        with pytest.raises(ConfigError, match="can: link"):
            await PLUGIN.command(adapter, request)
    with pytest.raises(ConfigError, match="not a MAC address"):
        await PLUGIN.command(adapter, {"action": "mac", "mac": "x"})


async def test_switches_are_shared_and_nothing_else():
    specs = ["switch:[vlan=5,name=wan]lan", "null:"]
    shared = PLUGIN.shared(specs, {})
    assert list(shared) == specs[:1]
    assert shared[specs[0]].keeper == "switch:lan"
    keeper = await PLUGIN.open_keeper(specs[:1], identity=bytes(16))
    await keeper.aclose()


@pytest.mark.parametrize("spec", ["switch:lan", "pcap:[write={folder}/a.pcapng]switch:lan"])
async def test_a_line_is_the_switchs_wherever_it_is_and_ends_with_the_adapter(tmp_path, spec):
    text = spec.format(folder=tmp_path)
    ours, theirs = make_line(0)
    adapter = await PLUGIN.from_specs(
        [text], instance_id=INSTANCE, initiator="vm", options={}, shared={text: theirs}
    )
    ours.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.sock.recv(1)
    await adapter.aclose()
    assert ours.sock.recv(1) == b""
    ours.close()


async def test_a_line_that_nobody_wants_is_closed():
    ours, theirs = make_line(0)
    with switch.connecting(theirs):
        pass
    assert ours.sock.recv(1) == b""
    ours.close()
