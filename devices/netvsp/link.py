"""What the network side knows of an adapter: its address, its limits, its link.

It outlives the lives of the device: a guest that boots anew finds what an operator has set.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import trio

from netvsp.frames.frame import ETHERNET_HEADER, MAX_MTU, MIN_MTU, format_mac
from vmbus.errors import ConfigError
from vmbus.plugins.specs import check_text

MAX_QUEUES = 64
"""Channels: linux/drivers/net/hyperv/hyperv_net.h, VRSS_CHANNEL_MAX."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What an adapter agrees to; constant.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_queues: int = 8
    """Channels, the primary one included; 1 to 64."""
    max_mtu: int = MAX_MTU
    """Bytes of payload of the longest frame a guest may ask for, 68 to 9202."""
    max_version: int = 0x60001
    """Highest NVSP version."""
    allow_spoofing: bool = False
    """Let frames out whose source address is not the adapter's."""
    allow_mac_change: bool = False
    """Let the guest choose another address."""
    vlan: int | None = None
    """Access mode: the guest is in this VLAN and sees no tags. None: it sees what there is."""
    trunk: frozenset[int] | None = None
    """Trunk mode: tags that the guest may use, 0 being none. None: all."""
    friendly_name: str = ""
    """What the guest may call it; Linux makes it the alias of the interface."""
    offloads: bool = True
    """Offer checksums and large segments to the guest."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_queues <= MAX_QUEUES:
            raise ConfigError(f"queues is 1 to {MAX_QUEUES}, not {self.max_queues}")
        if not MIN_MTU <= self.max_mtu <= MAX_MTU:
            raise ConfigError(f"mtu is {MIN_MTU} to {MAX_MTU}, not {self.max_mtu}")
        if self.vlan is not None and not 1 <= self.vlan <= 4094:
            raise ConfigError(f"vlan is 1 to 4094, not {self.vlan}")
        if self.vlan is not None and self.trunk is not None:
            raise ConfigError("vlan and trunk exclude each other")
        # Found out here, since it is a guest that has it encoded.
        check_text(self.friendly_name, "name")


class Link:
    """Address and state of an adapter's link.

    Args:
        mac: Six bytes.
        mtu: Bytes of payload of the longest frame the network carries.
        speed: Bits per second.

    Attributes:
        changed: Called when the state has changed; cannot block.
    """

    def __init__(self, mac: bytes, *, mtu: int, speed: int) -> None:
        check_mac(mac)
        self.permanent_mac = mac
        self.mac = mac
        self.mtu = mtu
        self.speed = speed
        self.changed: Callable[[], None] | None = None
        self._endpoint_up = True
        self._operator_up = True
        self._leaving = False
        self._waits: set[trio.CancelScope] = set()

    @property
    def up(self) -> bool:
        """Whether frames come through."""
        return self._endpoint_up and self._operator_up and not self._leaving

    def set_operator(self, *, up: bool) -> None:
        """An operator plugs the cable in or out. Cannot block."""
        self._set(operator=up)

    def set_endpoint(self, *, up: bool, speed: int | None = None) -> None:
        """The network has come or gone. Cannot block."""
        if speed is not None and speed != self.speed:
            self.speed = speed
            self._tell()
        self._set(endpoint=up)

    def set_leaving(self, *, leaving: bool) -> None:
        """The adapter is about to be taken away, or stays after all. Cannot block."""
        self._set(leaving=leaving)

    @contextlib.contextmanager
    def ends(self, scope: trio.CancelScope) -> Iterator[None]:
        """Cancel what is waited for in a ``with`` block when the link is down, or goes down."""
        self._waits.add(scope)
        try:
            if not self.up:
                scope.cancel()
            yield
        finally:
            self._waits.discard(scope)

    def set_mac(self, mac: bytes) -> None:
        """Give the adapter another address. Raises ConfigError if it cannot be one."""
        check_mac(mac)
        self.mac = mac
        self._tell()

    def _set(
        self,
        *,
        endpoint: bool | None = None,
        operator: bool | None = None,
        leaving: bool | None = None,
    ) -> None:
        before = self.up
        if endpoint is not None:
            self._endpoint_up = endpoint
        if operator is not None:
            self._operator_up = operator
        if leaving is not None:
            self._leaving = leaving
        if not self.up:
            for scope in self._waits:
                scope.cancel()
        if self.up != before:
            self._tell()

    def _tell(self) -> None:
        if self.changed is not None:
            self.changed()

    @property
    def max_frame(self) -> int:
        """Bytes of the longest frame without a tag."""
        return self.mtu + ETHERNET_HEADER


def check_mac(mac: bytes) -> None:
    """Raise ConfigError unless six bytes are an address that a station can have."""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise ConfigError(f"{format_mac(mac)} is not an address of a station")
