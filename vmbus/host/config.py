"""How one bus behaves."""

from __future__ import annotations

import dataclasses

from vmbus.engine import EngineConfig
from vmbus.host.lookout import DEFAULT_LONGEST


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BusConfig:
    """How one bus behaves."""

    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    max_outstanding: int = 4096
    """Requests a guest may have open on one channel before we stop reading it."""
    close_grace: float = 5.0
    """Seconds a device gets to return after its channel ended, before it is cancelled."""
    pause_grace: float = 5.0
    """Seconds that a pause waits for transfers in flight, before it is given up."""
    fence_grace: float = 5.0
    """Seconds that a device has in addition to ``close_grace``, for transfers in flight. Then a
    reset is answered with a failure, and a bus that is closed goes on without them."""
    longest_look: float = DEFAULT_LONGEST
    """Seconds to look for packets before sleeping, at most; see :mod:`vmbus.host.lookout`."""
