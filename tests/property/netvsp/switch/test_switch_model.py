"""The switch against a model of dictionaries: any ports, any frames, any order."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netvsp.switch.port import FROM_ISOLATED, FROM_UPLINK, PortConfig
from netvsp.switch.switch import JOINT, Crossing
from netvsp.switch.table import AGE
from tests.support.switch import BROADCAST, Net, make_frame, station

VLANS = (0, 1, 2)
PORTS = range(1, 7)
STATIONS = (*PORTS, 20, 21)
CONFIGS = st.one_of(
    st.builds(
        PortConfig,
        vlan=st.sampled_from(VLANS),
        isolated=st.booleans(),
        addresses=st.sampled_from([1, 2, 100]),
    ),
    st.builds(
        PortConfig,
        trunk=st.frozensets(st.sampled_from(VLANS), min_size=1),
        uplink=st.booleans(),
        addresses=st.sampled_from([1, 100]),
    ),
    st.just(JOINT),
)


class Model(RuleBasedStateMachine):
    """Everything that the switch knows, and what it must do, said as shortly as it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.configs: dict[int, PortConfig] = {}
        self.claims: dict[int, list[int]] = {}
        self.learnt: dict[tuple[int, int], tuple[int, float]] = {}

    # -- the model -------------------------------------------------------------------------------

    def owner(self, who: int) -> int | None:
        return self.claims[who][0] if self.claims.get(who) else None

    def is_up(self, number: int) -> bool:
        return self.configs[number].joint or any(number in each for each in self.claims.values())

    def vlans(self, number: int) -> frozenset[int]:
        config = self.configs[number]
        return frozenset({config.vlan}) if config.trunk is None else config.trunk

    def fresh(self, number: int) -> int:
        return sum(where == number for where, _ in self.learnt.values())

    def may(self, origin: int, number: int) -> bool:
        config = self.configs[number]
        if config.joint:
            return True
        if origin == FROM_ISOLATED:
            return config.uplink
        return not config.isolated or origin == FROM_UPLINK

    def expect(
        self, at: int, source: int, target: int | None, tci: int | None, origin: int
    ) -> set[int]:
        config = self.configs[at]
        vlan = tci or 0
        if config.vlan:
            if vlan not in {0, config.vlan}:
                return set()
            vlan = config.vlan
        elif vlan not in self.vlans(at):
            return set()
        owner = self.owner(source)
        if owner is not None:
            if owner != at:
                return set()
        else:
            own = sum(at in each for each in self.claims.values())
            if not self.is_up(at) or (not config.joint and config.addresses <= own):
                return set()
            now = self.net.now
            self.learnt = {
                key: (where, seen) for key, (where, seen) in self.learnt.items() if now - seen < AGE
            }
            where, _ = self.learnt.get((vlan, source), (None, 0))
            if where == at or config.joint or self.fresh(at) < config.addresses - own:
                self.learnt[vlan, source] = at, now
        if not config.joint:
            origin = FROM_ISOLATED if config.isolated else FROM_UPLINK if config.uplink else 0
        found: int | None = None
        if target is not None:
            found = self.owner(target)
            if found is None:
                found, seen = self.learnt.get((vlan, target), (None, 0.0))
                if found is not None and self.net.now - seen >= AGE:
                    found = None
        reached = self.configs if found is None else {found}
        return {
            each
            for each in reached
            if each != at
            and self.is_up(each)
            and not (self.configs[each].joint and config.joint)
            and vlan in self.vlans(each)
            and self.may(origin, each)
        }

    # -- what happens ----------------------------------------------------------------------------

    @rule(number=st.sampled_from(PORTS), config=CONFIGS)
    def add(self, number: int, config: PortConfig) -> None:
        if number not in self.configs:
            self.net.add(number, config)
            self.configs[number] = config
            if not config.joint:
                self.claims.setdefault(number, []).append(number)

    @precondition(lambda self: self.configs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.configs)))
        self.net.switch.remove_port(self.net.ports.pop(number))
        del self.configs[number]
        for each in self.claims.values():
            if number in each:
                each.remove(number)
        self.learnt = {key: at for key, at in self.learnt.items() if at[0] != number}

    @precondition(lambda self: self.configs)
    @rule(data=st.data(), who=st.none() | st.sampled_from(STATIONS))
    def introduce(self, data: st.DataObject, who: int | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.configs)))
        port = self.net.ports[number]
        if self.configs[number].joint:
            if who is not None:
                self.net.switch.add_station(port, station(who))
                if number not in self.claims.setdefault(who, []):
                    self.claims[who].append(number)
            return
        self.net.switch.set_station(port, None if who is None else station(who))
        for each, claims in self.claims.items():
            if number in claims and each != who:
                claims.remove(number)
        if who is None:
            self.learnt = {key: at for key, at in self.learnt.items() if at[0] != number}
        elif number not in self.claims.setdefault(who, []):
            self.claims[who].append(number)

    @precondition(lambda self: self.configs)
    @rule(
        data=st.data(),
        source=st.sampled_from(STATIONS),
        towards=st.none() | st.sampled_from(STATIONS),
        tci=st.none() | st.sampled_from((*VLANS, 3)),
        among=st.booleans(),
        origin=st.sampled_from([0, FROM_ISOLATED, FROM_UPLINK]),
    )
    def send(
        self,
        data: st.DataObject,
        source: int,
        towards: int | None,
        tci: int | None,
        among: bool,
        origin: int,
    ) -> None:
        at = data.draw(st.sampled_from(sorted(self.configs)))
        frame = make_frame(source, BROADCAST if towards is None else towards, b"body", tci=tci)
        sent = frame.tagged() if among else frame
        crossing = Crossing(sent.head, None, sent.tci, 0, origin)
        expected = self.expect(at, source, towards, tci, origin)
        self.net.send(at, crossing)
        assert set(self.net.got()) == expected

    @rule(seconds=st.sampled_from([1, AGE / 2, AGE]))
    def wait(self, seconds: float) -> None:
        self.net.now += seconds

    @invariant()
    def the_table_is_within_its_bounds(self) -> None:
        table = self.net.switch.table
        counts = {number: table.count(port) for number, port in self.net.ports.items()}
        assert len(table) == sum(counts.values())
        for number, count in counts.items():
            config = self.configs[number]
            assert config.joint or count <= config.addresses


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
