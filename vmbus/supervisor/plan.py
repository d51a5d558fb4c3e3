"""What workers have to know before there is a guest; all of it can be pickled."""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket

from vmbus.attach.server import ServerLimits
from vmbus.errors import ConfigError
from vmbus.host import BusConfig
from vmbus.server import DeviceSetup
from vmbus.supervisor import relay
from vmbus.supervisor.parcels import send_down


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How each guest is to be served."""

    setups: tuple[DeviceSetup, ...]
    """The devices that every guest gets."""
    config: BusConfig = dataclasses.field(default_factory=BusConfig)
    limits: ServerLimits = dataclasses.field(default_factory=ServerLimits)
    trust_vmm: bool = False
    """Accept guest memory that its owner could truncate, which kills the guest's worker only."""
    sandbox: bool = True
    """Give up what a worker does not need; see :mod:`vmbus.supervisor.sandbox`."""
    allowed: tuple[str, ...] | None = None
    """Directories below which files may be opened once the guest is there; None: everywhere."""

    def __post_init__(self) -> None:
        """Refuse a limit that nothing would keep. Raises ConfigError."""
        if self.allowed is not None and not self.sandbox:
            raise ConfigError("what may be opened is the sandbox's to see to, and there is none")


def send_plan(sock: socket.socket, plan: Plan) -> None:
    """Send it to the zygote, with the levels of our loggers. Raises OSError: it has ended."""
    fd = os.memfd_create("vmbus-plan", os.MFD_CLOEXEC)
    try:
        os.write(fd, pickle.dumps((plan, relay.levels())))
        send_down(sock, {}, [fd])
    finally:
        os.close(fd)
