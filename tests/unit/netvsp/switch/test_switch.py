"""Where a frame goes, and whether it may."""

from __future__ import annotations

from typing import Any

import pytest

from netvsp.frames.frame import GSO_TCPV4, NEEDS_CHECKSUM, Frame, Offload
from netvsp.switch.port import (
    EVERY_VLAN,
    FLOOD_BURST,
    FLOOD_PORTS,
    FROM_ISOLATED,
    FROM_UPLINK,
    PortConfig,
)
from netvsp.switch.switch import (
    JOINT,
    MAX_PORTS,
    MAX_STATIONS,
    TURN,
    Crossing,
    Switch,
)
from netvsp.switch.table import AGE
from tests.support.switch import BROADCAST, Net, make_frame, station
from vmbus.errors import ConfigError

OPEN: dict[str, Any] = {"addresses": 100}
"""A port behind which there may be many stations."""


def net(*numbers: int, **options: Any) -> Net:
    """Return a switch with ports of one kind."""
    made = Net()
    for each in numbers:
        made.add(each, **options)
    return made


def test_a_frame_goes_to_its_station_and_nowhere_else():
    here = net(1, 2, 3)
    frame = make_frame(1, 2, b"hello")
    here.send(1, frame)
    assert here.got() == {2: [frame.head]}
    assert here.woken == [2]


def test_who_is_not_known_is_looked_for_everywhere_and_learnt():
    here = net(1, 2, 3, **OPEN)
    here.send(1, make_frame(10, 20))
    assert sorted(here.got()) == [2, 3]
    here.send(2, make_frame(20, 10))
    assert sorted(here.got()) == [1]
    here.send(1, make_frame(10, 20))
    assert sorted(here.got()) == [2]
    here.now += AGE
    here.send(1, make_frame(10, 20))
    assert sorted(here.got()) == [2, 3]


@pytest.mark.parametrize("target", [BROADCAST, bytes.fromhex("01005e000001")])
def test_all_and_groups_get_a_frame_once_each(target):
    here = net(1, 2, 3)
    frame = make_frame(1, target)
    here.send(1, frame)
    assert here.got() == {2: [frame.head], 3: [frame.head]}


def test_a_station_that_moves_is_found_and_counted():
    here = net(1, 2, 3, **OPEN)
    here.send(1, make_frame(10, BROADCAST))
    here.send(2, make_frame(10, BROADCAST))
    here.got()
    here.send(3, make_frame(3, 10))
    assert sorted(here.got()) == [2]
    assert here.moves == [(0, station(10), "1", "2")]
    assert (here.switch.table.moves, here.ports[2].moves) == (1, 1)


def test_an_adapters_own_address_cannot_be_taken_by_sending():
    here = net(1, 2, 3, **OPEN)
    here.send(3, make_frame(1, 2))
    assert here.got() == {}
    assert here.dropped(3) == {"spoofed": 1}
    here.send(2, make_frame(2, 1))
    assert sorted(here.got()) == [1]


def test_a_port_sends_from_its_own_station_unless_it_may_have_others():
    here = net(1, 2)
    here.send(1, make_frame(10, 2))
    assert here.got() == {}
    assert here.dropped(1) == {"spoofed": 1}
    here = net(1, 2, addresses=3)
    for number in (10, 11, 12):
        here.send(1, make_frame(number, 2))
    assert len(here.got()[2]) == 3
    assert here.ports[1].refused == 1
    assert len(here.switch.table) == 2


def test_an_address_that_two_want_is_the_firsts_as_long_as_it_is_there():
    here = net(1, 2, 3)
    assert not here.switch.set_station(here.ports[3], station(1))
    assert here.switch.describe()["contested"] == ["00:15:5d:00:00:01"]
    here.send(3, make_frame(1, 2))
    here.send(2, make_frame(2, 1))
    assert sorted(here.got()) == [1]
    assert here.dropped(3) == {"spoofed": 1}
    here.switch.remove_port(here.ports.pop(1))
    here.send(3, make_frame(1, 2))
    here.send(2, make_frame(2, 1))
    assert sorted(here.got()) == [2, 3]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (Frame(bytes(13)), "short"),
        (Frame(station(2) + station(1) + b"\x81\x00\x00"), "short"),
        (Frame(station(2) + station(1) + b"\x81\x00\x00\x00"), "short"),
        (make_frame(BROADCAST, 2), "address"),
        (make_frame(bytes(6), 2), "address"),
        (make_frame(1, 1), "loop"),
        (make_frame(1, 2, tci=5), "vlan"),
        (Frame(station(2) + station(1) + bytes.fromhex("8100000588b5")), "vlan"),
        (make_frame(1, bytes.fromhex("0180c2000000")), "link-local"),
        (make_frame(1, bytes.fromhex("0180c200000e")), "link-local"),
    ],
)
def test_what_goes_nowhere_is_counted_by_the_reason(frame, reason):
    here = net(1, 2, **OPEN)
    here.send(1, frame)
    assert here.got() == {}
    assert here.dropped(1) == {reason: 1}


def test_what_is_only_near_the_link_local_addresses_passes():
    here = net(1, 2)
    here.send(1, make_frame(1, bytes.fromhex("0180c2000010")))
    assert sorted(here.got()) == [2]


# -- VLANs ---------------------------------------------------------------------------------------


def test_a_vlan_is_a_switch_of_its_own():
    here = Net()
    for number, vlan in ((1, 5), (2, 5), (3, 6), (4, 0)):
        here.add(number, vlan=vlan)
    here.send(1, make_frame(1, BROADCAST))
    assert sorted(here.got()) == [2]
    here.send(4, make_frame(4, BROADCAST))
    assert here.got() == {}
    here.send(1, make_frame(1, 3))
    assert here.got() == {}
    assert here.dropped(1) == {"vlan": 1}


def test_a_trunk_has_tags_and_an_access_port_has_none():
    here = Net()
    here.add(1, vlan=5)
    here.add(2, trunk=frozenset({0, 5}))
    here.add(3)
    here.send(1, make_frame(1, 2, tci=0xE000))
    (frame,) = here.take(2)
    assert frame.tci == 0xE005
    here.send(2, make_frame(2, 1, tci=0x6005))
    (frame,) = here.take(1)
    assert frame.tci is None
    here.send(2, make_frame(2, 3))
    (frame,) = here.take(3)
    assert frame.tci is None
    here.send(2, make_frame(2, 1, tci=6))
    assert here.dropped(2) == {"vlan": 1}


def test_a_tag_among_the_bytes_is_a_tag():
    here = Net()
    here.add(1, trunk=frozenset({5}))
    here.add(2, vlan=5)
    here.send(1, make_frame(1, 2, b"x", tci=0x2005).tagged())
    assert here.got() == {2: [make_frame(1, 2, b"x").head]}
    here.send(2, make_frame(2, 1, tci=5))  # its own VLAN's
    (frame,) = here.take(1)
    assert (frame.tci, frame.head) == (5, make_frame(2, 1).head)


def test_a_tag_in_a_tag_is_no_way_into_another_vlan():
    here = Net()
    here.add(1)
    here.add(2, uplink=True)
    here.add(3, trunk=frozenset({0}))
    here.add(4, trunk=frozenset({5}))
    here.add(5, vlan=5)
    here.add(6, trunk=frozenset({5}))
    for target in (5, 6):
        here.send(4, Frame(make_frame(4, target, tci=7).tagged().head, (), None, 5))
    assert here.dropped(5) == {"vlan": 1}
    # Where the outer tag stays, it is the one that counts.
    (frame,) = here.take(6)
    assert frame.tci == 5


@pytest.mark.parametrize("config", [{}, {"vlan": 5}, {"trunk": EVERY_VLAN}])
@pytest.mark.parametrize("outer", ["8100 2000", "8100 0000 8100 0000", "88a8 0000"])
def test_a_tag_of_vlan_0_hides_no_tag_of_another_vlan(config, outer):
    """Linux takes such tags off until it finds one that means something: CVE-2021-27853."""
    here = Net()
    here.add(1, **config)
    here.add(2, trunk=EVERY_VLAN)
    tags = bytes.fromhex(outer + "8100 0007")
    here.send(1, Frame(station(2) + station(1) + tags + b"\x08\0" + bytes(46)))
    assert here.got() == {}
    assert here.dropped(1) == {"vlan": 1}
    here.send(1, make_frame(1, 2, bytes(46), tci=0x2000).tagged())
    assert len(here.take(2)) == 1, "alone it is a priority"


# -- isolation -----------------------------------------------------------------------------------


def test_isolated_ports_reach_uplinks_only():
    here = Net()
    here.add(1, isolated=True)
    here.add(2, isolated=True)
    here.add(3)
    here.add(4, uplink=True)
    for target in (2, 3):
        here.send(1, make_frame(1, target))
        assert here.got() == {}
        assert here.dropped(1) == {"isolated": 1}
    here.send(3, make_frame(3, 1))
    assert here.dropped(3) == {"isolated": 1}
    here.send(1, make_frame(1, BROADCAST))
    assert sorted(here.got()) == [4]
    here.send(3, make_frame(3, BROADCAST))
    assert sorted(here.got()) == [4]
    here.send(4, make_frame(4, BROADCAST))
    assert sorted(here.got()) == [1, 2, 3]
    here.send(4, make_frame(4, 1))
    assert sorted(here.got()) == [1]


# -- switches that are one -----------------------------------------------------------------------


def crossing(frame: Frame, origin: int = 0) -> Crossing:
    return Crossing(frame.head, frame.offload, frame.tci, frame.flow, origin)


def test_a_frame_does_not_go_from_one_joint_to_another():
    here = net(1, 2)
    for number in (10, 11):
        here.add(number, JOINT)
    here.send(1, make_frame(1, BROADCAST))
    assert sorted(here.got()) == [2, 10, 11]
    here.send(10, crossing(make_frame(20, BROADCAST)))
    assert sorted(here.got()) == [1, 2]
    here.send(11, crossing(make_frame(21, 20)))
    assert here.got() == {}
    assert here.dropped(11) == {"loop": 1}
    here.send(1, make_frame(1, 20))
    assert sorted(here.got()) == [10]


def test_isolation_holds_across_a_joint():
    here = Net()
    here.add(1, isolated=True)
    here.add(2, uplink=True)
    here.add(3)
    here.add(10, JOINT)
    for number, origin in ((1, FROM_ISOLATED), (2, FROM_UPLINK), (3, 0)):
        here.send(number, make_frame(number, BROADCAST))
        (frame,) = here.take(10)
        assert isinstance(frame, Crossing)
        assert frame.origin == origin
        here.got()
    for origin, reached in ((FROM_ISOLATED, [2]), (FROM_UPLINK, [1, 2, 3]), (0, [2, 3])):
        here.send(10, crossing(make_frame(20, BROADCAST), origin))
        assert sorted(here.got()) == reached
        here.send(10, crossing(make_frame(20, 1), origin))
        assert sorted(here.got()) == ([1] if origin == FROM_UPLINK else [])


def test_tags_cross_a_joint():
    here = Net()
    here.add(1, vlan=5)
    here.add(10, JOINT)
    here.send(1, make_frame(1, BROADCAST))
    (frame,) = here.take(10)
    assert frame.tci == 5
    here.send(10, crossing(make_frame(20, BROADCAST, tci=5)))
    here.send(10, crossing(make_frame(20, BROADCAST, tci=6)))
    here.send(10, crossing(make_frame(20, BROADCAST)))
    assert here.got() == {1: [make_frame(20, BROADCAST).head]}


def test_stations_of_ones_own_are_told_and_others_kept():
    here = net(1, 2)
    joint = here.add(10, JOINT)
    assert here.changes == [(station(1), True), (station(2), True)]
    assert here.switch.own_stations() == [station(1), station(2)]
    here.changes.clear()
    assert here.switch.add_station(joint, station(20))
    assert not here.switch.add_station(joint, station(1))
    assert here.switch.own_stations() == [station(1), station(2)]
    # What is another switch's cannot be taken here.
    assert not here.switch.set_station(here.ports[2], station(20))
    assert here.changes == [(station(2), False), (station(20), True)]
    here.send(1, make_frame(1, 20))
    assert sorted(here.got()) == [10]
    here.switch.remove_station(joint, station(20))
    here.switch.remove_station(joint, station(20))
    here.send(1, make_frame(1, 20))
    assert sorted(here.got()) == [2]


def test_a_joint_has_so_many_stations():
    here = Net()
    joint = here.add(10, JOINT)
    assert sum(here.switch.add_station(joint, station(n)) for n in range(1, 9000)) == MAX_STATIONS
    assert not here.switch.add_station(joint, BROADCAST)
    assert here.switch.describe()["stations"] == MAX_STATIONS
    here.switch.remove_port(joint)
    assert here.switch.describe()["stations"] == 0


# -- coming and going ----------------------------------------------------------------------------


def test_a_port_without_a_station_is_down():
    here = net(1, 2, 3, **OPEN)
    here.send(3, make_frame(30, BROADCAST))
    here.got()
    here.send(1, make_frame(1, 3))
    here.switch.set_station(here.ports[3], None)
    assert here.ports[3].queue.count == 0
    here.send(1, make_frame(1, BROADCAST))
    here.send(1, make_frame(1, 30))
    here.send(1, make_frame(1, 3))
    assert {number: len(frames) for number, frames in here.got().items()} == {2: 3}
    here.send(3, make_frame(30, 1))
    assert here.dropped(3) == {"down": 1}
    here.switch.set_station(here.ports[3], station(33))
    here.send(1, make_frame(1, 33))
    assert sorted(here.got()) == [3]


def test_a_port_that_goes_leaves_nothing():
    here = net(1, 2, 3, **OPEN)
    here.send(1, make_frame(10, 2))
    here.switch.remove_port(here.ports[1])
    here.switch.remove_port(here.ports[1])
    assert len(here.switch.table) == 0
    assert here.ports[1] not in here.switch.ports
    assert here.switch.describe()["stations"] == 2
    assert here.got() == {}


def test_ports_are_limited():
    switch = Switch(lambda: 0.0)
    for number in range(MAX_PORTS):
        switch.add_port(str(number), PortConfig(), lambda: None)
    with pytest.raises(ConfigError):
        switch.add_port("one more", PortConfig(), lambda: None)


# -- fairness, bounds ----------------------------------------------------------------------------


def test_one_call_does_so_much_and_no_more():
    here = net(*range(1, 102))
    frames = [make_frame(1, BROADCAST)] * 1000
    assert here.switch.receive(here.ports[1], frames) == -(-TURN // 102)
    here.got()
    frames = [make_frame(1, 2)] * 10_000
    assert here.switch.receive(here.ports[1], frames) == TURN


def test_a_frame_for_many_ports_counts_for_several():
    here = net(*range(1, 4 * FLOOD_PORTS + 1))
    for _ in range(FLOOD_BURST // 100):
        here.send(1, *[make_frame(1, BROADCAST)] * 100)
        here.got()
    assert here.dropped(1) == {"storm": FLOOD_BURST * 3 // 4}


def test_a_storm_is_dropped_and_what_is_meant_for_one_is_not():
    here = net(1, 2, 3)
    for _ in range(FLOOD_BURST // 100 + 1):
        here.send(1, *[make_frame(1, BROADCAST)] * 100)
        here.got()
    assert here.dropped(1) == {"storm": 100}
    here.send(1, make_frame(1, 2))
    here.send(2, make_frame(2, BROADCAST))
    assert sorted(here.got()) == [1, 2, 3]


def test_a_flooding_neighbour_takes_nobodys_place():
    here = net(1, 2, 3)
    here.send(1, *[make_frame(1, 3, bytes(1400))] * 10_000)
    assert here.ports[3].dropped["queue full"] > 1000
    here.send(2, *[make_frame(2, 3, b"mine")] * 100)
    own = [frame for frame in here.take(3) if frame.head[6:12] == station(2)]
    assert len(own) == 100


def test_whoever_does_not_read_holds_up_nobody_else():
    here = net(1, 2, 3)
    for _ in range(100):
        here.now += 1  # or it is a storm
        here.send(1, *[make_frame(1, BROADCAST, bytes(1400))] * 100)
        assert len(here.take(3)) == 100
    assert here.ports[2].dropped["queue full"] > 1000
    assert here.ports[3].dropped == {}


# -- what crosses --------------------------------------------------------------------------------


def test_a_segment_crosses_as_one_with_all_that_is_left_to_do():
    here = net(1, 2)
    offload = Offload(NEEDS_CHECKSUM, GSO_TCPV4, 54, 1448, 34, 16)
    here.send(1, make_frame(1, 2, bytes(60_000), offload=offload))
    (frame,) = here.take(2)
    assert (frame.offload, len(frame)) == (offload, 60_014)


def test_a_guests_memory_is_copied_before_the_call_returns():
    here = net(1, 2, 3)
    memory = bytearray(b"as it was")
    for target in (2, BROADCAST):
        head = make_frame(1, target).head
        here.send(1, Frame(head, [memoryview(memory)]))
        memory[:] = b"as it is!"
        assert here.take(2)[0].tobytes() == head + b"as it was"
        memory[:] = b"as it was"


def test_a_switch_is_described():
    here = net(1, 2, **OPEN)
    here.send(1, make_frame(10, 2))
    found = here.switch.describe()
    assert [each["name"] for each in found["ports"]] == ["1", "2"]
    assert found["ports"][0]["in_frames"] == 1
    assert (found["addresses"], found["stations"], found["contested"]) == (1, 2, [])
    assert len(here.switch.describe(1)["ports"]) == 1
