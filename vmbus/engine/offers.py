"""What a device offers to the guest."""

from __future__ import annotations

import dataclasses
from uuid import UUID

from vmbus.errors import ConfigError
from vmbus.wire.guids import NULL_GUID
from vmbus.wire.messages import (
    MAX_RELID,
    OFFER_CONFIDENTIAL_EXTERNAL_MEMORY,
    OFFER_CONFIDENTIAL_RING,
    OFFER_ENUMERATE,
    OFFER_REQUIRE_PINNED,
    USER_DEFINED_SIZE,
)

# Linux before 5.x read 0x2 and 0x4 as "transfer pages" and "gpadls"; from the 6.0 patches on it
# drops every offer that has them in an ordinary VM, whatever the version. Pinning is a feature of
# 6.0 that this engine does not negotiate.
_FORBIDDEN_FLAGS = (
    OFFER_CONFIDENTIAL_RING | OFFER_CONFIDENTIAL_EXTERNAL_MEMORY | OFFER_REQUIRE_PINNED
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One device, as OFFERCHANNEL describes it.

    Raises:
        ConfigError: A value does not fit into the message, or a flag would make guests drop it.
    """

    class_id: UUID
    """What kind of device it is; see :mod:`vmbus.wire.guids`."""
    instance_id: UUID
    """Unique on the bus: Linux recognises a device by it alone."""
    flags: int = OFFER_ENUMERATE
    mmio_megabytes: int = 0
    """MMIO space that the guest should set aside, in MiB."""
    user_defined: bytes = bytes(USER_DEFINED_SIZE)
    """120 bytes; the pipe mode of pipe devices, the direction of hv_sock."""
    monitor_latency: int | None = None
    """How late a signal may be noticed, in 100 ns ticks; None: no monitor page, signal at once.

    OpenBSD and DPDK see only devices that have it.
    """
    max_subchannels: int = 0
    """How many sub-channels the device may offer while its channel is open."""

    def __post_init__(self) -> None:
        if self.instance_id == NULL_GUID:
            raise ConfigError("offer: instance_id must not be all zeros")
        if not 0 <= self.flags <= 0xFFFF or self.flags & _FORBIDDEN_FLAGS:
            raise ConfigError(f"offer: flags {self.flags:#x} would make guests drop the offer")
        if not 0 <= self.mmio_megabytes <= 0xFFFF:
            raise ConfigError("offer: mmio_megabytes must be 0 to 65535")
        if len(self.user_defined) != USER_DEFINED_SIZE:
            raise ConfigError(f"offer: user_defined must have {USER_DEFINED_SIZE} bytes")
        if self.monitor_latency is not None and not 0 <= self.monitor_latency <= 0xFFFF:
            raise ConfigError("offer: monitor_latency must be 0 to 65535 ticks of 100 ns")
        if not 0 <= self.max_subchannels < MAX_RELID:
            raise ConfigError(f"offer: max_subchannels must be 0 to {MAX_RELID - 1}")
