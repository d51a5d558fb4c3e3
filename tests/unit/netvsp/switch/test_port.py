"""What a port is for, and how it is said."""

from __future__ import annotations

import pytest

from netvsp.switch.port import (
    EVERY_VLAN,
    FLOOD_BURST,
    FLOOD_PORTS,
    FLOOD_RATE,
    JOINT_FLOODS,
    PortConfig,
    SwitchPort,
    format_vlans,
    parse_vlans,
)
from tests.support.switch import make_frame
from vmbus.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "vlans"),
    [
        ("5", {5}),
        ("1-4", {1, 2, 3, 4}),
        ("0+10-12+4094", {0, 10, 11, 12, 4094}),
        ("3+1-4", {1, 2, 3, 4}),
        ("all", EVERY_VLAN),
    ],
)
def test_vlans_are_numbers_and_ranges(text, vlans):
    assert parse_vlans(text) == vlans
    assert parse_vlans(format_vlans(frozenset(vlans))) == vlans


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "5-3", "4095", "1++2", "00001", "1,2", "²"])
def test_what_is_no_list_of_vlans_is_refused(text):
    with pytest.raises(ConfigError):
        parse_vlans(text)


@pytest.mark.parametrize(
    "options",
    [
        {"vlan": 4095},
        {"vlan": 1, "trunk": frozenset({2})},
        {"trunk": frozenset()},
        {"trunk": frozenset({4095})},
        {"isolated": True, "uplink": True},
        {"addresses": 0},
        {"addresses": 1 << 20},
    ],
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(ConfigError):
        PortConfig(**options)


def test_floods_have_a_rate():
    port = SwitchPort("a", PortConfig(), lambda: None)
    assert sum(port.spend_flood(0, 2) for _ in range(2 * FLOOD_BURST)) == FLOOD_BURST
    soon = FLOOD_BURST / FLOOD_RATE / 2
    assert sum(port.spend_flood(soon, FLOOD_PORTS) for _ in range(FLOOD_BURST)) == FLOOD_BURST // 2
    # Silence is not saved up.
    assert sum(port.spend_flood(1000, 2) for _ in range(2 * FLOOD_BURST)) == FLOOD_BURST
    joint = SwitchPort("b", PortConfig(joint=True), lambda: None)
    count = JOINT_FLOODS * FLOOD_BURST
    assert sum(joint.spend_flood(0, 2) for _ in range(2 * count)) == count


def test_a_port_is_described():
    woken: list[int] = []
    config = PortConfig(trunk=frozenset({1, 2}), uplink=True)
    port = SwitchPort("a", config, lambda: woken.append(1))
    port.put(port, make_frame(1, 2), 14)
    port.put(port, make_frame(1, 2), 14)
    assert woken == [1]  # who has been told need not be told again
    port.dropped["vlan"] += 3
    found = port.describe()
    assert (found["name"], found["waiting"], found["dropped"]) == ("a", 2, {"vlan": 3})
    assert (found["trunk"], found["flags"]) == ("1-2", ["uplink"])
    port.take(9, 9999)
    assert (port.out_frames, port.out_bytes) == (2, 28)
    assert SwitchPort("b", PortConfig(vlan=7), lambda: None).describe()["vlan"] == 7
