"""The network adapter as a plug-in: made from specifications, operated by commands."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from uuid import UUID

from netvsp.adapter import MAC_PREFIX, NetworkAdapter, parse_mac
from netvsp.endpoints import nat, switch
from netvsp.endpoints.specs import ENDPOINTS, open_endpoint
from netvsp.frames.frame import MAX_MTU, format_mac
from netvsp.link import AdapterConfig
from netvsp.spec import EndpointSpec
from vmbus.errors import ConfigError
from vmbus.host.device import Device
from vmbus.plugins.registry import Registry
from vmbus.plugins.remarks import remarks
from vmbus.plugins.sharing import Keeper, Line, Share
from vmbus.plugins.specs import OptionReader, parse_number


class NetworkPlugin:
    """See :class:`vmbus.plugins.devices.DevicePlugin`."""

    backends: Registry | None = ENDPOINTS
    demo: str | None = "netvsp.demo"
    questions = frozenset({"stats"})

    async def from_specs(
        self,
        specs: Sequence[str],
        *,
        instance_id: UUID,
        initiator: Hashable,
        options: Mapping[str, Any],
        shared: Mapping[str, Line] | None = None,
    ) -> NetworkAdapter:
        """Make an adapter with an endpoint. Is a checkpoint.

        Args:
            specs: One, ``scheme:[options]target``; what of the options is the adapter's own is in
                :attr:`EndpointSpec.reserved`. None: its cable is not plugged in.
            instance_id: The offer's instance GUID.
            initiator: Who the guest is; its address is made from that, so that it stays.
            options: The same options as in the specification, where they come first.
            shared: The line to a switch that is kept in another process; owned.

        Raises:
            ConfigError: More than one specification, or it cannot be honoured.
        """
        with contextlib.ExitStack() as lines:
            for line in (shared or {}).values():
                lines.callback(line.close)
            adapter = await self._make(specs, instance_id, initiator, options, shared or {})
            lines.pop_all()
        return adapter

    async def _make(
        self,
        specs: Sequence[str],
        instance_id: UUID,
        initiator: Hashable,
        options: Mapping[str, Any],
        shared: Mapping[str, Line],
    ) -> NetworkAdapter:
        if len(specs) > 1:
            raise ConfigError(f"a network adapter has one endpoint, not {len(specs)}")
        text = specs[0] if specs else "null:"
        spec, own = EndpointSpec.parse(text).split()
        reader = OptionReader(text, {**options, **own})
        config = AdapterConfig(
            max_queues=_or(reader.integer("channels"), 8),
            max_mtu=_or(reader.integer("mtu"), MAX_MTU),
            vlan=reader.integer("nic-vlan"),
            trunk=_trunk(reader.text("nic-trunk")),
            friendly_name=reader.text("name") or "",
            allow_spoofing=reader.flag("spoof"),
            allow_mac_change=reader.flag("mac-change"),
            offloads=reader.choice("offloads", ("on", "off")) != "off",
        )
        address = reader.text("mac")
        mac = parse_mac(address) if address else guest_mac(initiator, instance_id)
        monitor = reader.flag("monitor")
        reader.finish()
        line = shared.get(text)
        if line is not None and spec.scheme == nat.SCHEME:
            endpoint = await nat.connect(text, line)
        else:
            with switch.connecting(line):
                endpoint = await open_endpoint(spec)
        try:
            adapter = NetworkAdapter(
                endpoint,
                mac=mac,
                instance_id=instance_id,
                config=config,
                monitor=monitor,
                source=str(spec) if specs else "",
            )
        except BaseException:
            await endpoint.aclose()
            raise
        adapter.set_link(up=bool(specs))
        return adapter

    def shared(self, specs: Sequence[str], options: Mapping[str, Any]) -> dict[str, Share]:
        """See :class:`vmbus.plugins.sharing.SharingPlugin`: switches are, and who starts passt."""
        del options
        return {**switch.shared(specs), **nat.shared(specs)}

    async def open_keeper(self, specs: Sequence[str], *, identity: bytes) -> Keeper:
        """See :class:`vmbus.plugins.sharing.SharingPlugin`."""
        del identity  # it has a name
        if nat.shared(specs):
            return await nat.open_keeper(specs)
        return await switch.open_keeper(specs)

    async def command(self, device: Device, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an operator's request on an adapter. Is a checkpoint.

        ::

            {"action": "link", "up": false}               -> {"link": "down"}
            {"action": "mac", "mac": "00:15:5d:01:02:03"} -> {"mac": "00:15:5d:01:02:03"}
            {"action": "stats"}                           -> {"transmit": ..., "receive": ...}

        Raises:
            ConfigError: The request is unknown, incomplete or cannot be honoured.
        """
        assert isinstance(device, NetworkAdapter)
        with remarks() as warnings:
            result = self._command(device, request)
        return {**result, "warnings": warnings} if warnings else result

    def _command(self, device: NetworkAdapter, request: Mapping[str, Any]) -> dict[str, Any]:
        match request:
            case {"action": "link", "up": bool(up)}:
                device.set_link(up=up)
                return {"link": "up" if device.link.up else "down"}
            case {"action": "mac", "mac": str(text)}:
                device.set_mac(parse_mac(text))
                return {"mac": format_mac(device.mac)}
            case {"action": "stats"}:
                found = device.snapshot()
                return {name: found[name] for name in ("transmit", "receive", "endpoint")}
            case _:
                raise ConfigError("a network adapter can: link (up), mac (mac), stats")


PLUGIN = NetworkPlugin()
"""What the entry point names."""


def guest_mac(initiator: Hashable, instance_id: UUID) -> bytes:
    """Return the address of a guest's adapter: always the same one, and another for each guest."""
    digest = hashlib.sha256(f"{initiator}/{instance_id}".encode()).digest()
    return MAC_PREFIX + digest[:3]


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _trunk(text: str | None) -> frozenset[int] | None:
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        try:
            low = parse_number(first)
            high = parse_number(last) if dash else low
        except ConfigError:
            low, high = 1, 0
        if not 0 <= low <= high <= 4094:
            raise ConfigError(f"nic-trunk: {part[:40]!r} is no VLAN and no range such as 20-29")
        found |= set(range(low, high + 1))
    return frozenset(found)
