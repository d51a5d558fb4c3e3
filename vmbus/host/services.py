"""What the parts of one bus may ask of it, so that they need not know all of it."""

from __future__ import annotations

from typing import Protocol

import trio

from vmbus.engine import Engine, events
from vmbus.gpadl import Gpadl
from vmbus.host.buffer import Leases
from vmbus.host.config import BusConfig
from vmbus.host.delivery import Deliveries
from vmbus.host.doorbells import InterruptPage, MonitorPage
from vmbus.host.observer import Observers
from vmbus.log_budget import LogBudget
from vmbus.partition.transport import Transport


class Services(Protocol):
    """A bus, as the tasks that work for it see it. No method blocks but where it says so.

    Attributes:
        transport: The partition.
        config: How the bus behaves.
        engine: The control plane; :meth:`pump` after each call that may have made events.
        nursery: For tasks that live as long as the bus.
        deliveries: Messages on their way to the guest.
        monitor: Doorbells in the monitor page.
        interrupt_page: Doorbells of 0.13 guests.
        sint: SINT of the channels' event flags, as the guest wants it.
        life_log: Lines about guests and channels coming and going.
        failure_log: Lines about devices that fail, with a traceback each.
        leases: GPADLs in use.
        observers: Who listens.
    """

    transport: Transport
    config: BusConfig
    engine: Engine
    nursery: trio.Nursery
    deliveries: Deliveries
    monitor: MonitorPage
    interrupt_page: InterruptPage
    sint: int
    life_log: LogBudget
    failure_log: LogBudget
    leases: Leases
    observers: Observers

    @property
    def paused(self) -> bool:
        """Whether guest memory is to be left alone."""

    def pump(self) -> None:
        """Carry out whatever the engine has to say."""

    def gpadl(self, key: int, handle: int) -> Gpadl:
        """Return a GPADL of channel ``key``. Raises GuestProtocolError if there is none."""

    def report_fault(self, text: str, relid: int | None) -> None:
        """Count and log what a guest did wrong."""

    def channel_failed(self, event: events.ChannelOpen, reason: str) -> None:
        """A device gave its channel up: rescind it, so that the guest knows."""

    async def need_shared_doorbell(self) -> None:
        """See to it that the doorbell of all 0.13 channels is served. Is a checkpoint.

        Raises:
            AttachError: The VMM refused.
            trio.BrokenResourceError: The partition is gone.
        """
