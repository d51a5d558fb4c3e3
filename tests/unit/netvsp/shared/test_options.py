"""What a specification says of a port of a switch."""

from __future__ import annotations

import pytest

from netvsp.shared.options import PORT_OPTIONS, parse_options
from netvsp.switch.port import EVERY_VLAN, UPLINK_ADDRESSES, PortConfig
from vmbus.errors import ConfigError
from vmbus.plugins.specs import Spec


@pytest.mark.parametrize(
    ("text", "name", "port", "join"),
    [
        ("switch:lan", "lan", PortConfig(), ""),
        ("switch:[vlan=5]lan", "lan", PortConfig(vlan=5), ""),
        ("switch:[trunk=1-3+7]lan", "lan", PortConfig(trunk=frozenset({1, 2, 3, 7})), ""),
        ("switch:[trunk=all]lan", "lan", PortConfig(trunk=EVERY_VLAN), ""),
        (
            "switch:[isolated,addresses=8]a.b-c",
            "a.b-c",
            PortConfig(isolated=True, addresses=8),
            "",
        ),
        ("switch:[uplink]lan", "lan", PortConfig(uplink=True, addresses=UPLINK_ADDRESSES), ""),
        ("switch:[join=/run/x]lan", "lan", PortConfig(), "/run/x"),
    ],
)
def test_a_port_is_what_it_is_said_to_be(text, name, port, join):
    assert parse_options(Spec.parse(text)) == (name, port, join)
    assert set(Spec.parse(text).options) <= {option.name for option in PORT_OPTIONS}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("switch:", "needs a name"),
        ("switch:../lan", "needs a name"),
        ("switch:.lan", "needs a name"),
        ("switch:" + "x" * 65, "needs a name"),
        ("switch:[vlan=0]lan", "vlan is 1 to 4094"),
        ("switch:[vlan=5000]lan", "vlan is 1 to 4094"),
        ("switch:[vlan=5,trunk=5]lan", "exclude each other"),
        ("switch:[trunk=x]lan", "no list of VLANs"),
        ("switch:[addresses=5000]lan", "addresses is 1 to 4096"),
        ("switch:[addresses=0]lan", "addresses is 1 to 4096"),
        ("switch:[isolated,uplink]lan", "exclude each other"),
        ("switch:[vlna=5]lan", "did you mean 'vlan'"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_reason(text, why):
    with pytest.raises(ConfigError, match=why) as caught:
        parse_options(Spec.parse(text))
    assert str(caught.value).count("switch:") == 1
