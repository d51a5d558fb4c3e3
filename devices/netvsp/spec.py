"""How an endpoint is written, and which options are the adapter's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vmbus.plugins.specs import Spec


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointSpec(Spec):
    """The specification of an endpoint."""

    noun: ClassVar[str] = "endpoint"
    example: ClassVar[str] = "tap:vnet0"
    reserved: ClassVar[Mapping[str, str]] = {
        "mac": "the adapter's address, as 00:15:5d:01:02:03; by default one that goes with the "
        "guest's name and the adapter's number",
        "mtu": "bytes of payload of the longest frame that the guest may ask for, 68 to 9202 "
        "(default)",
        "channels": "queues of the adapter, 1 to 64; by default 8",
        "name": "what the guest may call it; Linux makes it the alias of the interface",
        "nic-vlan": "the VLAN that the guest is in, 1 to 4094; it sees no tags",
        "nic-trunk": "VLANs whose tags the guest may use, as 0+7+20-29; 0 is no tag",
        "spoof": "let the guest send with addresses that are not its own",
        "mac-change": "let the guest choose another address",
        "offloads": "on (default) or off: checksums and large segments are left to the host",
        "monitor": "ring through the monitor page: slower, but DPDK and OpenBSD need it",
    }

    def without_target(self) -> None:
        """Refuse a target, for schemes that have none. Raises ConfigError."""
        if self.target:
            raise self.error(f"{self.scheme}: has nothing behind it but its options")
