"""The bus of one partition, running on trio.

:func:`open_bus` joins three things: a transport (a partition), the engine (the control plane) and
devices. It is a thin loop: what the guest posts goes into the engine; what the engine says goes
to the guest or to a channel's task. One task serves each open channel; see
:mod:`vmbus.host.device`.

::

    async with open_bus(transport, [controller]) as bus:
        await bus.wait_gone()

An exception in a device ends that device's channel and is logged; one that leaves ``open_bus``
comes from the body of the ``async with`` and is never wrapped in a group, or is a bug here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import trio

from vmbus.engine import Engine, events
from vmbus.errors import BudgetError, ConfigError, GuestProtocolError, LocalProtocolError
from vmbus.gpadl import Gpadl
from vmbus.host.account import Account
from vmbus.host.buffer import Leases
from vmbus.host.channel import Channel
from vmbus.host.config import BusConfig
from vmbus.host.delivery import Deliveries
from vmbus.host.device import Device
from vmbus.host.doorbells import InterruptPage, MonitorPage, SharedDoorbell
from vmbus.host.observer import Observer, Observers
from vmbus.host.roster import Roster
from vmbus.host.runner import ChannelRunner
from vmbus.host.stops import Stops
from vmbus.log_budget import LogBudget
from vmbus.partition.events import (
    MemoryRemoval,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
)
from vmbus.partition.transport import Transport
from vmbus.wire.messages import (
    CONNECTION_MESSAGES,
    CONNECTION_MESSAGES_5,
    DEFAULT_SINT,
    MESSAGE_TYPE_VMBUS,
    Direction,
)
from vmbus.wire.versions import Version

_log = logging.getLogger("vmbus.bus")


TlListener = Callable[[events.TlConnect], bool]
"""Answers an hv_sock connect request: True if it will offer a channel for it. Cannot block.

A ConfigError or BudgetError, as :meth:`Bus.add_device` raises them, refuses the request.
"""


class Bus:
    """One partition's bus. Made by :func:`open_bus`.

    Attributes:
        engine: The control plane; read it, but let the bus change it.
        transport: The partition.
    """

    def __init__(
        self,
        transport: Transport,
        nursery: trio.Nursery,
        config: BusConfig,
        tl_listener: TlListener | None,
    ) -> None:
        self.transport = transport
        self.config = config
        self.engine = Engine(
            transport.memory,
            dataclasses.replace(config.engine, vp_count=transport.vp_count),
        )
        self.leases = Leases(transport.memory, self._gpadl_released, nursery)
        self.nursery = nursery
        self.monitor = MonitorPage(transport.memory)
        self.interrupt_page = InterruptPage(transport.memory)
        self.sint = DEFAULT_SINT
        """SINT of the channels' event flags, as the guest wants it."""
        self._tl_listener = tl_listener
        self.runners: dict[int, ChannelRunner] = {}
        """Channels that are open, or on their way in or out, by the engine's key."""
        self.observers = Observers(self._ring_observer_changed)
        self.observers.add(Account(transport.name, self.engine))
        self._roster = Roster(self, self.runners)
        self._stops = Stops(self, self.runners)
        self.deliveries = Deliveries(transport, self._take_posts)
        self._posts: deque[PostedMessage] = deque()
        """Taken from the transport, not yet given to the engine; bounded by the transport."""
        self._pumping = False
        self._reset_done: list[Callable[[], None]] = []
        self._running = trio.Event()
        self._running.set()
        self._ending = False
        self._gone = trio.Event()
        self.faults = 0
        """Rules that the guest broke, devices' complaints included."""
        self._fault_log = LogBudget()
        self.life_log = LogBudget()
        """For guests and channels coming and going."""
        self.failure_log = LogBudget()
        """For devices that fail, with a traceback each."""
        self._version: Version | None = None
        self._contact = trio.Event()
        self._shared_doorbell = SharedDoorbell(
            transport, self.interrupt_page, self.open_channels, self.wait_running
        )

    # -- the host program's side -----------------------------------------------------------------

    def add_device(self, device: Device) -> int:
        """Put a device on the bus; the guest hears of it at once if it has asked. Cannot block.

        Returns:
            A number for :meth:`remove_device`.

        Raises:
            ConfigError: The instance GUID is taken.
            BudgetError: The bus is full.
        """
        number = self._roster.add(device)
        self.pump()
        return number

    async def remove_device(self, number: int) -> None:
        """Take a device off the bus (hot remove) and close it. Is a checkpoint.

        Returns when the device has let go of guest memory and is closed; it does so even if the
        call is cancelled. A guest that never releases the relid keeps nothing but the relid.

        Raises:
            ConfigError: There is no such device.
            NotBackError: What it has begun does not come back, see
                :meth:`vmbus.host.roster.Roster.remove`. It may be removed again.
        """
        await self._roster.remove(number)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Let somebody listen to the bus; see :mod:`vmbus.host.observer`. Cannot block.

        Returns:
            A function that ends it; calling it twice is harmless.
        """
        return self.observers.add(observer)

    @property
    def devices(self) -> dict[int, Device]:
        """The devices by number."""
        return {entry.number: entry.device for entry in self._roster}

    @property
    def paused(self) -> bool:
        """Whether the VMM has paused the partition: guest memory is to be left alone."""
        return not self._running.is_set()

    def save(self) -> dict[str, Any]:
        """Return what the devices have to keep beyond this process, as JSON types. Cannot block.

        Raises:
            LocalProtocolError: The partition is not paused.
        """
        if not self.paused:
            raise LocalProtocolError("a bus is saved while its partition is paused")
        return self._roster.save()

    def restore(self, state: dict[str, Any]) -> None:
        """Give devices the state that :meth:`save` returned; before a guest comes. Cannot block.

        Raises:
            LocalProtocolError: A guest is there.
            ConfigError: It is no such state, or not of these devices.
        """
        if self._version is not None:
            raise LocalProtocolError("a bus is restored before its guest makes contact")
        self._roster.restore(state)

    async def wait_gone(self) -> None:
        """Wait until the partition is gone for good (``Transport.incoming``). Is a checkpoint."""
        await self._gone.wait()

    async def wait_version(self) -> Version:
        """Wait until a guest has made contact; return its version. Is a checkpoint."""
        while self._version is None:
            await self._contact.wait()
        return self._version

    def snapshot(self) -> dict[str, Any]:
        """Describe the bus for people, as JSON types. Cannot block, never raises."""
        return {
            "name": self.transport.name,
            "version": str(self._version) if self._version is not None else None,
            "memory": self.transport.memory.size,
            "paused": self.paused,
            "faults": self.faults,
            "gpadls": self.engine.gpadl_table.count,
            "messages_waiting": len(self.deliveries),
            "monitor_polls": self.monitor.polls,
            "devices": self._roster.describe(),
            "channels": [
                {
                    "device": owner.number if owner is not None else None,
                    **runner.channel.snapshot(),
                }
                for _, runner in sorted(self.runners.items())
                if runner.channel is not None
                for owner in (self._roster.owner(runner.event.primary_key),)
            ],
        }

    # -- events of the engine --------------------------------------------------------------------

    def pump(self) -> None:
        """Internal: carry out what the engine has to say, after every input. Cannot block."""
        if self._pumping:
            # What an event has led to comes after the events that are there already.
            return
        self._pumping = True
        try:
            while happened := self.engine.take():
                for event in happened:
                    self._handle(event)
        finally:
            self._pumping = False

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.SendMessage():
                self.observers.control(Direction.HOST_TO_GUEST, event.payload)
                self.deliveries.put(event)
            case events.DiscardMessages():
                self.deliveries.drop()
            case events.ChannelOpen():
                self._open(event)
            case events.ChannelClose():
                self._close(event.key)
            case events.ChannelModify():
                self.runners[event.key].retarget(event.target_vp)
                self.engine.modify_done(event.key, ok=True)
            case events.GpadlTeardown():
                self.leases.tear_down(event.key, event.handle)
            case events.ChannelGone():
                self._roster.gone(event.key, unwanted=event.unwanted)
            case events.MonitorPages():
                self.monitor.use(event.page_2)
            case events.InterruptPage():
                self.interrupt_page.use(event.gpa)
            case events.Connected():
                self._version = event.version
                self.sint = event.sint
                self._contact.set()
                if self.life_log.spend():
                    _log.info("%s: guest speaks VMBus %s", self.transport.name, event.version)
            case events.Disconnected():
                self._version = None
                self._contact = trio.Event()
                self._roster.disconnected()
            case events.ResetDone():
                while self._reset_done:
                    self._reset_done.pop(0)()
            case events.TlConnect():
                self.engine.tl_connect_done(event.request_id, ok=self._accepts(event))
            case events.Fault():
                self.report_fault(event.text, event.relid)
            case _:
                raise AssertionError(f"the engine has an event the bus does not know: {event}")

    def _accepts(self, event: events.TlConnect) -> bool:
        try:
            return self._tl_listener is not None and self._tl_listener(event)
        except (ConfigError, BudgetError) as error:
            # The guest chose the instance, which may be taken or all zeros, and when to ask.
            self.report_fault(f"connect request: {error}", None)
            return False

    def _open(self, event: events.ChannelOpen) -> None:
        owner = self._roster.owner(event.primary_key)
        runner = ChannelRunner(
            self,
            event,
            owner.device if owner is not None else None,
            primary=self.runners.get(event.primary_key),
            done=self._runner_done,
        )
        self.runners[event.key] = runner
        self.nursery.start_soon(runner.run)

    def _close(self, key: int) -> None:
        runner = self.runners.get(key)
        if runner is not None:
            runner.close()
            self._stops.begin_close(runner)
        else:
            # The bus is ending and was quicker.
            self.engine.close_done(key)

    def _gpadl_released(self, key: int, handle: int) -> None:
        self.engine.gpadl_released(key, handle)
        self.pump()

    def _ring_observer_changed(self) -> None:
        for channel in self.open_channels():
            channel.observe(self.observers)

    def _runner_done(self, runner: ChannelRunner) -> None:
        """A channel's task is over; nothing of it touches guest memory. Cannot block."""
        key = runner.event.key
        del self.runners[key]
        if runner.refused:
            self.engine.open_done(key, ok=False)
        elif runner.closed_by_guest:
            self.engine.close_done(key)
        runner.ring_lease.release()
        self.pump()

    def channel_failed(self, event: events.ChannelOpen, reason: str) -> None:
        """Internal: a device gave its channel up; rescind it to tell the guest. Cannot block."""
        self.report_fault(reason, event.relid)
        self._roster.failed(event.primary_key)
        self.pump()

    def report_fault(self, text: str, relid: int | None) -> None:
        """Internal: count and log what a guest did wrong. Cannot block."""
        self.faults += 1
        self.observers.fault(relid, text)
        if self._fault_log.spend():
            where = "control plane" if relid is None else f"channel {relid}"
            _log.warning("%s: %s: %s (fault %d)", self.transport.name, where, text, self.faults)
            self.transport.report(f"{where}: {text}")

    # -- tasks -----------------------------------------------------------------------------------

    async def run_incoming(self) -> None:
        """Internal: take what the partition does, until it is gone."""
        async for event in self.transport.incoming():
            match event:
                case PostedMessage():
                    self._posts.append(event)
                    self._take_posts()
                    if self.engine.gpadl_table.has_done_a_lot():
                        await trio.lowlevel.checkpoint()
                case PartitionReset():
                    self._reset(event)
                case PartitionPaused():
                    if not self.paused:
                        self._running = trio.Event()
                    self.deliveries.hold()
                    self.monitor.hold()
                    self._stops.hold()
                    self.nursery.start_soon(self._stops.pause, event, self._resume)
                case PartitionResumed():
                    self._resume()
                    event.done()
                case MemoryRemoval():
                    # Rings and transfers in flight hold views of their own; the region is unmapped
                    # when the last one is given up, which is for the transport to wait for.
                    self.monitor.forget(event.gpa, event.size)
                    self.interrupt_page.forget(event.gpa, event.size)
                    event.done()
        self._gone.set()

    def _take_posts(self) -> None:
        """Give the engine what the guest has posted, unless the guest has to wait.

        A guest that does not take its messages does not get to send more: most of what it sends
        makes one. Only posts wait for that; what the VMM wants is done all the same.
        """
        limit = self.config.engine.budgets.max_queued_messages
        while self._posts and len(self.deliveries) <= limit and not (self.paused or self._ending):
            post = self._posts.popleft()
            if post.message_type == MESSAGE_TYPE_VMBUS:
                self.observers.control(Direction.GUEST_TO_HOST, post.payload)
                self.engine.receive_untrusted(post.connection_id, post.payload, vp=post.vp)
                self.pump()
            else:
                self.report_fault(f"message of SynIC type {post.message_type:#x}", None)
            post.done()

    def _reset(self, event: PartitionReset) -> None:
        self._reset_done.append(self._stops.begin_reset(event.done, event.failed))
        while self._posts:
            self._posts.popleft().done()
        self.deliveries.drop(reserved=True)
        self.engine.reset()
        self.pump()
        for runner in self.runners.values():
            # Those that are opening hear nothing from the engine, and may wait for the resume.
            runner.stop()

    def _resume(self) -> None:
        self._running.set()
        self.deliveries.flow()
        self.monitor.flow()
        for runner in self.runners.values():
            runner.resume()
        self._take_posts()

    async def need_shared_doorbell(self) -> None:
        """Internal: see :meth:`vmbus.host.services.Services.need_shared_doorbell`."""
        await self._shared_doorbell.open(self.nursery)

    async def wait_running(self) -> None:
        """Internal: wait while the partition is paused. A checkpoint if it is."""
        while self.paused:
            await self._running.wait()

    async def aclose(self) -> None:
        """Internal: end all channels and close all devices. For :func:`open_bus`. Is a checkpoint.

        What worker threads have begun and does not come back is given up after a while.
        """
        self._ending = True
        await self._stops.end()
        await self._roster.aclose()

    def open_channels(self) -> list[Channel]:
        """The channels that are being served now."""
        return [each.channel for each in self.runners.values() if each.channel is not None]

    def gpadl(self, key: int, handle: int) -> Gpadl:
        """Internal: return a GPADL of channel ``key``, or raise GuestProtocolError."""
        found = self.engine.gpadl(key, handle)
        if found is None:
            raise GuestProtocolError(f"GPADL {handle:#x} does not exist", field="gpadl")
        return found


@contextlib.asynccontextmanager
async def open_bus(
    transport: Transport,
    devices: Iterable[Device] = (),
    *,
    config: BusConfig | None = None,
    tl_listener: TlListener | None = None,
) -> AsyncIterator[Bus]:
    """Run a bus on ``transport`` for the length of the block.

    On leaving, channels are closed, devices get their grace period to finish, and every device is
    closed. The transport is the caller's and stays open.

    Args:
        transport: The partition.
        devices: On the bus from the start, in the order in which they are to be offered.
        config: Budgets and limits.
        tl_listener: Answers hv_sock connect requests; without one they are refused.

    Raises:
        ConfigError: Two devices have the same instance GUID.
        AttachError: The VMM does not let the guest post messages to us.
        trio.BrokenResourceError: The partition is gone already.
    """
    failure: BaseException | None = None
    waiting = deque(devices)
    async with trio.open_nursery() as nursery:
        bus = Bus(transport, nursery, config or BusConfig(), tl_listener)
        serving = trio.CancelScope()
        try:
            await transport.add_message_port(CONNECTION_MESSAGES)
            await transport.add_message_port(CONNECTION_MESSAGES_5)
            while waiting:
                bus.add_device(waiting[0])
                waiting.popleft()
            nursery.start_soon(_run_within, serving, bus.run_incoming)
            nursery.start_soon(bus.deliveries.run)
            nursery.start_soon(bus.monitor.run)
            yield bus
        except BaseException as error:  # raised again below, out of the nursery
            failure = error
        # From here on the guest is not listened to: channels end, none begins.
        serving.cancel()
        with trio.CancelScope(shield=True):
            await bus.aclose()
            for device in waiting:
                await bus._roster.close_device(device)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _run_within(scope: trio.CancelScope, run: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await run()
