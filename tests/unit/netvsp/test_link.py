"""The link: what an adapter agrees to, and who hears of changes."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from netvsp.link import AdapterConfig, Link, check_mac
from tests.support.net_guest import MAC
from vmbus.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_queues": 0}, "queues is 1 to 64, not 0"),
        ({"max_queues": 65}, "queues"),
        ({"max_mtu": 67}, "mtu is 68 to 9202, not 67"),
        ({"max_mtu": 9203}, "mtu"),
        ({"vlan": 0}, "vlan is 1 to 4094, not 0"),
        ({"vlan": 4095}, "vlan"),
        ({"vlan": 5, "trunk": frozenset({5})}, "exclude each other"),
        ({"friendly_name": "caf\udce9"}, "a name with NUL or undecodable bytes"),
        ({"friendly_name": "a\0b"}, "a name with NUL or undecodable bytes"),
    ],
)
def test_values_out_of_their_range_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        AdapterConfig(**options)


def test_the_ends_of_the_ranges_are_in_them():
    AdapterConfig(max_queues=1, max_mtu=68, vlan=1)
    AdapterConfig(max_queues=64, max_mtu=9202, vlan=4094)
    AdapterConfig(trunk=frozenset({0, 4094}))


def make() -> tuple[Link, list[tuple[bool, int]]]:
    link = Link(MAC, mtu=1500, speed=100)
    seen: list[tuple[bool, int]] = []
    link.changed = lambda: seen.append((link.up, link.speed))
    return link, seen


def test_a_link_is_up_if_both_ends_are():
    link, seen = make()
    assert link.up
    link.set_operator(up=False)
    link.set_endpoint(up=False)
    link.set_operator(up=True)
    assert not link.up
    link.set_endpoint(up=True)
    assert link.up
    assert seen == [(False, 100), (True, 100)], "told of changes only"
    link.set_operator(up=True)
    assert len(seen) == 2


def test_a_link_is_down_while_its_adapter_is_about_to_leave():
    link, seen = make()
    link.set_leaving(leaving=True)
    link.set_operator(up=False)
    link.set_leaving(leaving=False)
    assert not link.up
    link.set_operator(up=True)
    assert seen == [(False, 100), (True, 100)]


async def test_what_waits_for_a_network_is_cancelled_when_the_link_goes_down():
    link, _ = make()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with trio.CancelScope() as scope, link.ends(scope):
                await trio.sleep_forever()

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        link.set_endpoint(up=False)
    await wait()  # it is down already
    link.set_endpoint(up=True)
    with trio.CancelScope() as scope, link.ends(scope):
        assert not scope.cancel_called


def test_another_speed_is_told():
    link, seen = make()
    link.set_endpoint(up=True, speed=100)
    assert not seen
    link.set_endpoint(up=True, speed=1000)
    assert seen == [(True, 1000)]
    link.set_endpoint(up=False, speed=10)
    assert seen[1:] == [(True, 10), (False, 10)]


def test_nobody_need_listen():
    link = Link(MAC, mtu=1500, speed=100)
    link.set_operator(up=False)
    link.set_mac(bytes.fromhex("00155d0a0b0c"))
    assert link.permanent_mac == MAC
    assert link.max_frame == 1514


@pytest.mark.parametrize("mac", [b"", bytes(6), b"\1" + bytes(5), b"\xff" * 6, bytes(5), bytes(7)])
def test_an_address_that_no_station_has_is_refused(mac):
    link, seen = make()
    with pytest.raises(ConfigError, match="is not an address of a station"):
        check_mac(mac)
    with pytest.raises(ConfigError):
        Link(mac, mtu=1500, speed=1)
    with pytest.raises(ConfigError):
        link.set_mac(mac)
    assert link.mac == MAC
    assert not seen
