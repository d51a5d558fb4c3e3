"""What a specification says of a port: ``switch:[vlan=5,isolated]lan``."""

from __future__ import annotations

import re
from typing import NamedTuple

from netvsp.spec import EndpointSpec
from netvsp.switch.port import MAX_ADDRESSES, MAX_VLAN, UPLINK_ADDRESSES, PortConfig, parse_vlans
from vmbus.errors import ConfigError
from vmbus.plugins.options import Option
from vmbus.plugins.specs import Spec

PORT_OPTIONS = (
    Option("vlan", "the guest is in this VLAN and sees no tags", "N", "none"),
    Option(
        "trunk",
        "VLANs whose frames pass with their tags, 0 for frames without one; not with vlan",
        "1-10+20|all",
        "none",
    ),
    Option("isolated", "the guest exchanges frames with uplinks only"),
    Option("uplink", "isolated guests may reach it; many stations may be behind it"),
    Option(
        "addresses",
        "source addresses of the guest's frames, its adapter's own included",
        "N",
        "1",
    ),
    Option(
        "join", "switches of this name that have the directory in common are one", "PATH", "none"
    ),
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class SwitchOptions(NamedTuple):
    """What a specification means."""

    name: str
    """Of the switch."""
    port: PortConfig
    join: str
    """Directory where it meets others of its name; empty: it does not."""


SCHEME = "switch"


def find_switch(text: str) -> Spec | None:
    """Return the switch in a specification, itself or within others; None if there is none.

    ``pcap:[write=a.pcapng]switch:lan`` is a switch, too. Cannot block.
    """
    try:
        spec = Spec.parse(text)
        while spec.scheme != SCHEME:
            spec = Spec.parse(spec.target)
    except ConfigError:  # will be said where it is opened
        return None
    return spec


def parse_options(spec: Spec) -> SwitchOptions:
    """Return what a specification means. Cannot block.

    Raises:
        ConfigError: An option or the name cannot be understood.
    """
    spec = EndpointSpec(spec.scheme, spec.options, spec.target).split()[0]  # the adapter's own
    if not _NAME.fullmatch(spec.target):
        raise spec.error(
            "a switch needs a name of up to 64 letters, digits, '_', '-' and '.', which does not "
            "begin with '-' or '.'"
        )
    reader = spec.reader()
    vlan = reader.integer("vlan")
    trunk = reader.text("trunk")
    isolated = reader.flag("isolated")
    uplink = reader.flag("uplink")
    addresses = reader.integer("addresses")
    join = reader.text("join")
    reader.finish()
    if vlan == 0:
        raise spec.error(f"vlan is 1 to {MAX_VLAN}, not 0")
    if addresses is None:
        addresses = UPLINK_ADDRESSES if uplink else 1
    elif addresses > MAX_ADDRESSES:
        raise spec.error(f"addresses is 1 to {MAX_ADDRESSES}, not {addresses}")
    try:
        port = PortConfig(
            vlan=vlan or 0,
            trunk=None if trunk is None else parse_vlans(trunk),
            isolated=isolated,
            uplink=uplink,
            addresses=addresses,
        )
    except ConfigError as error:
        raise spec.error(str(error)) from None
    return SwitchOptions(spec.target, port, join or "")
