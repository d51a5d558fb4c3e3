"""How an engine is set up, and how much a guest may make it hold."""

from __future__ import annotations

import dataclasses

from vmbus.errors import ConfigError
from vmbus.wire.messages import MAX_RELID
from vmbus.wire.versions import Feature, Version

SUPPORTED_FEATURES = (
    Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    | Feature.MODIFY_CONNECTION
    | Feature.CLIENT_ID
    | Feature.PAUSE_RESUME
)
"""The 6.0 features this engine can honour.

The others need what it does not have: a second virtual trust level (interrupt redirection),
encrypted memory (confidential channels), pages of the host's own in the guest's address space
(server specified monitor pages) and control over the VMM's paging (pinning).
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """How much one guest may make the host hold.

    The defaults fit every guest we know. The greediest single consumer is a FreeBSD or DPDK NIC:
    31 MiB of receive buffer (7936 pages) and 16 MiB of send buffer in two GPADLs, beside a ring
    per queue. A page costs some 40 bytes here.
    """

    max_channels: int = MAX_RELID
    """Offers and sub-channels, counting those that the guest has not released yet."""
    max_gpadls: int = 8192
    """GPADLs of all channels, unfinished ones included."""
    max_gpadl_pages: int = 1 << 19
    """Pages in all of them together, as announced: 2 GiB of guest memory."""
    max_unfinished_gpadls: int = 128
    """GPADLs whose bodies have not all arrived; each holds up to 64 KiB."""
    max_pending_tl_connects: int = 16
    """hv_sock connect requests without an answer from the host program."""
    max_queued_messages: int = 64
    """Control messages that wait for a message slot. For whoever delivers them: take no further
    message from the guest while so many wait, because most of its requests make one more.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"budget: {field.name} must not be negative")
        if self.max_channels > MAX_RELID:
            raise ConfigError(f"budget: max_channels must be at most {MAX_RELID}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine offers to its guest.

    Raises:
        ConfigError: A feature that the engine cannot honour, or no VP.
    """

    max_version: Version = Version.V6_0
    """Newer versions are refused; guests then try an older one."""
    delay_max_version: bool = False
    """Let ``max_version`` count only after the first UNLOAD since the VM started: firmware that
    speaks nothing old may use what it likes, and the system it boots is held to the maximum."""
    supported_features: Feature = SUPPORTED_FEATURES
    """What a 6.0 guest may ask for."""
    vp_count: int = 1
    """Number of virtual processors; VP indices are ``0 .. vp_count - 1``."""
    hv_sock: bool = False
    """Pass connect requests on to the host program instead of refusing them."""
    budgets: Budgets = dataclasses.field(default_factory=Budgets)

    def __post_init__(self) -> None:
        if self.supported_features & ~SUPPORTED_FEATURES:
            raise ConfigError(
                f"engine: {self.supported_features & ~SUPPORTED_FEATURES!r} cannot be honoured"
            )
        if self.vp_count < 1:
            raise ConfigError("engine: vp_count must be at least 1")
