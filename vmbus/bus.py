"""Layer 3: the bus of one partition, running on trio.

:func:`open_bus` joins three things: a transport (a partition), the engine (the control plane) and
devices. It is a thin loop: what the guest posts goes into the engine; what the engine says goes
to the guest or to a channel's task. One task serves each open channel; see :mod:`vmbus.device`.

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
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import trio

from vmbus.channel import Channel
from vmbus.device import Device
from vmbus.doorbells import InterruptPage, MonitorPage
from vmbus.engine import Engine, EngineConfig, events
from vmbus.errors import ConfigError, GuestProtocolError
from vmbus.gpadl import Gpadl
from vmbus.runner import ChannelRunner
from vmbus.transport import (
    Doorbell,
    MemoryRemoval,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
    Transport,
)
from vmbus.wire.guids import class_name
from vmbus.wire.messages import (
    CONNECTION_EVENTS,
    CONNECTION_MESSAGES,
    CONNECTION_MESSAGES_5,
    DEFAULT_SINT,
    MESSAGE_TYPE_VMBUS,
)
from vmbus.wire.versions import Version

_log = logging.getLogger("vmbus.bus")

MAX_FAULTY_LIVES = 3
"""A device whose channel died this often on one connection is not offered again before the next."""
LOGGED_FAULTS = 20
"""Guest faults that are logged one by one; then only every hundredth, or a guest fills the disk."""

TlListener = Callable[[events.TlConnect], bool]
"""Answers an hv_sock connect request: True if it will offer a channel for it. Cannot block."""


@dataclasses.dataclass(slots=True)
class _Attached:
    """A device on the bus."""

    device: Device
    key: int
    removing: trio.Event | None = None
    faulty_lives: int = 0
    offered: bool = True
    running: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BusConfig:
    """How one bus behaves."""

    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    max_outstanding: int = 4096
    """Requests a guest may have open on one channel before we stop reading it."""
    close_grace: float = 5.0
    """Seconds a device gets to return after its channel ended, before it is cancelled."""


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
        self.nursery = nursery
        self.monitor = MonitorPage(transport.memory)
        self.interrupt_page = InterruptPage(transport.memory)
        self.sint = DEFAULT_SINT
        """SINT of the channels' event flags, as the guest wants it."""
        self._tl_listener = tl_listener
        self._devices: dict[int, _Attached] = {}
        self.runners: dict[int, ChannelRunner] = {}
        self._messages: deque[events.SendMessage] = deque()
        self._queued = 0
        self._delivered = 0
        self._message_added = trio.Event()
        self._message_done = trio.Event()
        self._teardowns: set[tuple[int, int]] = set()
        self._reset_done: list[Callable[[], None]] = []
        self._running = trio.Event()
        self._running.set()
        self._gone = trio.Event()
        self._faults: Counter[int | None] = Counter()
        self._version: Version | None = None
        self._contact = trio.Event()
        self._shared_doorbell: Doorbell | None = None

    # -- the host program's side -----------------------------------------------------------------

    def add_device(self, device: Device) -> int:
        """Put a device on the bus; the guest hears of it at once if it has asked. Cannot block.

        Returns:
            A number for :meth:`remove_device`.

        Raises:
            ConfigError: The instance GUID is taken, or the bus is full.
        """
        key = self.engine.offer(device.offer)
        self._devices[key] = _Attached(device, key)
        self.pump()
        return key

    async def remove_device(self, key: int) -> None:
        """Take a device off the bus (hot remove) and close it. Is a checkpoint.

        Returns when its channels are closed and the device has let go of guest memory. A guest
        that never releases the relid keeps nothing but the relid.

        Raises:
            ConfigError: There is no such device.
        """
        attached = self._devices.get(key)
        if attached is None:
            raise ConfigError(f"there is no device {key} on this bus")
        if attached.removing is None:
            attached.removing = trio.Event()
            # Linux drops completions of a rescinded channel but waits for them all the same, so
            # what is in flight is answered before the guest hears of the removal.
            with trio.move_on_after(self.config.close_grace):
                for runner in self._runners_of(key):
                    await runner.pause()
            if attached.offered:
                self.engine.revoke(attached.key)
                self.pump()
            else:
                self._forget(attached)
        await attached.removing.wait()

    @property
    def devices(self) -> dict[int, Device]:
        """The devices by number."""
        return {key: attached.device for key, attached in self._devices.items()}

    async def wait_gone(self) -> None:
        """Wait until the partition is gone. Is a checkpoint."""
        await self._gone.wait()

    async def wait_version(self) -> Version:
        """Wait until a guest has made contact; return its version. Is a checkpoint."""
        while self._version is None:
            await self._contact.wait()
        return self._version

    def snapshot(self) -> dict[str, Any]:
        """Describe the bus for people, as JSON types. Cannot block, never raises."""
        devices = []
        for attached in self._devices.values():
            offer = attached.device.offer
            devices.append(
                {
                    "key": attached.key,
                    "class": class_name(offer.class_id),
                    "instance": str(offer.instance_id),
                    "faulty_lives": attached.faulty_lives,
                    **attached.device.snapshot(),
                }
            )
        return {
            "name": self.transport.name,
            "version": str(self._version) if self._version is not None else None,
            "memory": self.transport.memory.size,
            "paused": not self._running.is_set(),
            "faults": sum(self._faults.values()),
            "messages_waiting": len(self._messages),
            "monitor_polls": self.monitor.polls,
            "devices": devices,
            "channels": [
                {"device": key, **runner.channel.snapshot()}
                for key, runner in sorted(self.runners.items())
                if runner.channel is not None
            ],
        }

    # -- events of the engine --------------------------------------------------------------------

    def pump(self) -> None:
        """Carry out whatever the engine has to say. Cannot block. Called after every input."""
        while happened := self.engine.take():
            for event in happened:
                self._handle(event)

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.SendMessage():
                self._messages.append(event)
                self._queued += 1
                self._message_added.set()
            case events.DiscardMessages():
                self._drop_messages()
            case events.ChannelOpen():
                self._open(event)
            case events.ChannelClose():
                self.runners[event.key].close()
            case events.ChannelModify():
                self.runners[event.key].retarget(event.target_vp)
                self.engine.modify_done(event.key, ok=True)
            case events.GpadlTeardown():
                self._teardown(event.key, event.handle)
            case events.ChannelGone():
                self._channel_gone(event.key)
            case events.MonitorPages():
                self.monitor.use(event.page_2)
            case events.InterruptPage():
                self.interrupt_page.use(event.gpa)
            case events.Connected():
                self._version = event.version
                self.sint = event.sint
                self._contact.set()
                _log.info("%s: guest speaks VMBus %s", self.transport.name, event.version)
                if event.version == Version.V0_13 and self._shared_doorbell is None:
                    self.nursery.start_soon(self._serve_shared_doorbell)
            case events.Disconnected():
                self._disconnected()
            case events.ResetDone():
                while self._reset_done:
                    self._reset_done.pop(0)()
            case events.TlConnect():
                accepted = self._tl_listener is not None and self._tl_listener(event)
                self.engine.tl_connect_done(event.request_id, ok=accepted)
            case events.Fault():
                self.report_fault(event.text, event.relid)
            case _:
                raise AssertionError(f"the engine has an event the bus does not know: {event}")

    def _open(self, event: events.ChannelOpen) -> None:
        attached = self._devices.get(event.primary_key)
        runner = ChannelRunner(self, event, attached.device if attached is not None else None)
        self.runners[event.key] = runner
        self.nursery.start_soon(runner.run)

    def _teardown(self, key: int, handle: int) -> None:
        runner = self.runners.get(key)
        if runner is not None and runner.uses_gpadl(handle):
            self._teardowns.add((key, handle))
        else:
            self.engine.gpadl_released(key, handle)

    def runner_done(self, runner: ChannelRunner) -> None:
        """A channel's task is over; nothing of it touches guest memory. Cannot block."""
        key = runner.event.key
        del self.runners[key]
        if runner.closed_by_guest:
            self.engine.close_done(key)
        for waiting in sorted(self._teardowns):
            if waiting[0] == key:
                self._teardowns.discard(waiting)
                self.engine.gpadl_released(*waiting)
        self.pump()

    def channel_failed(self, event: events.ChannelOpen, reason: str) -> None:
        """A device gave its channel up: rescind it, so that the guest knows. Cannot block."""
        self.report_fault(reason, event.relid)
        owner = self._devices.get(event.primary_key)
        if owner is not None and owner.offered and owner.removing is None:
            owner.faulty_lives += 1
            self.engine.revoke(owner.key)
            self.pump()

    def _channel_gone(self, key: int) -> None:
        attached = self._devices.get(key)
        if attached is None:
            return
        attached.offered = False
        if attached.removing is not None:
            self._forget(attached)
        elif attached.faulty_lives < MAX_FAULTY_LIVES:
            self._offer_again(attached)

    def _offer_again(self, attached: _Attached) -> None:
        del self._devices[attached.key]
        attached.key = self.engine.offer(attached.device.offer)
        attached.offered = True
        self._devices[attached.key] = attached

    def _forget(self, attached: _Attached) -> None:
        del self._devices[attached.key]
        self.nursery.start_soon(self._close_device, attached)

    async def _close_device(self, attached: _Attached) -> None:
        try:
            await attached.device.aclose()
        except Exception:
            _log.exception("%s: closing a device failed", self.transport.name)
        if attached.removing is not None:
            attached.removing.set()

    def _disconnected(self) -> None:
        self._version = None
        self._contact = trio.Event()
        for attached in tuple(self._devices.values()):
            attached.faulty_lives = 0
            if not attached.offered and attached.removing is None:
                self._offer_again(attached)

    def report_fault(self, text: str, relid: int | None) -> None:
        """Count and log what a guest did wrong. Cannot block."""
        self._faults[relid] += 1
        count = sum(self._faults.values())
        if count <= LOGGED_FAULTS or count % 100 == 0:
            where = "control plane" if relid is None else f"channel {relid}"
            _log.warning("%s: %s: %s (fault %d)", self.transport.name, where, text, count)
            self.transport.report(f"{where}: {text}")

    def _runners_of(self, key: int) -> list[ChannelRunner]:
        return [
            runner
            for runner in self.runners.values()
            if key in {runner.event.key, runner.event.primary_key}
        ]

    # -- tasks -----------------------------------------------------------------------------------

    async def run_incoming(self) -> None:
        """Take what the partition does, until it is gone."""
        async for event in self.transport.incoming():
            match event:
                case PostedMessage():
                    if event.message_type != MESSAGE_TYPE_VMBUS:
                        self.report_fault(f"message of SynIC type {event.message_type:#x}", None)
                        continue
                    self.engine.receive_untrusted(event.connection_id, event.payload, vp=event.vp)
                    self.pump()
                    # A guest that does not take its messages does not get to send more.
                    while len(self._messages) > self.config.engine.budgets.max_queued_messages:
                        self._message_done = trio.Event()
                        await self._message_done.wait()
                case PartitionReset():
                    self._reset_done.append(event.done)
                    self._drop_messages()
                    self.engine.reset()
                    self.pump()
                case PartitionPaused():
                    self.nursery.start_soon(self._pause, event.done)
                case PartitionResumed():
                    self._running.set()
                    for runner in self.runners.values():
                        runner.resume()
                    event.done()
                case MemoryRemoval():
                    # Rings and transfers in flight hold views of their own; the region is unmapped
                    # when the last one is given up, which is for the transport to wait for.
                    event.done()
        self._gone.set()

    def _drop_messages(self) -> None:
        """The guest has left: forget what is not in a slot yet, but for reserved channels."""
        kept = [message for message in self._messages if message.reserved]
        self._delivered += len(self._messages) - len(kept)
        self._messages = deque(kept)
        self._message_done.set()

    async def run_outgoing(self) -> None:
        """Deliver control messages, in order, one at a time."""
        while True:
            if not self._messages:
                self._message_added = trio.Event()
                await self._message_added.wait()
            await self._running.wait()
            if not self._messages:
                continue
            message = self._messages.popleft()
            if not await self.transport.deliver(
                message.vp, message.sint, MESSAGE_TYPE_VMBUS, message.payload
            ):
                _log.info(
                    "%s: message to VP %d SINT %d dropped, its SynIC is off",
                    self.transport.name,
                    message.vp,
                    message.sint,
                )
            self._delivered += 1
            self._message_done.set()

    async def wait_messages_delivered(self) -> None:
        """Wait until every control message queued so far is in its slot. Is a checkpoint."""
        target = self._queued
        while self._delivered < target:
            self._message_done = trio.Event()
            await self._message_done.wait()

    async def _pause(self, done: Callable[[], None]) -> None:
        self._running = trio.Event()
        for runner in tuple(self.runners.values()):
            await runner.pause()
        done()

    async def _serve_shared_doorbell(self) -> None:
        """Serve connection id 2, the doorbell of all channels of a 0.13 guest."""
        self._shared_doorbell = await self.transport.add_event_port(CONNECTION_EVENTS, 0)
        while True:
            await trio.lowlevel.wait_readable(self._shared_doorbell.fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._shared_doorbell.fd)
            self.interrupt_page.scan(self.open_channels)

    def open_channels(self) -> list[Channel]:
        """The channels that are being served now."""
        return [each.channel for each in self.runners.values() if each.channel is not None]

    def gpadl(self, key: int, handle: int) -> Gpadl:
        """Return a GPADL of channel ``key``. Raises GuestProtocolError if there is none."""
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
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        bus = Bus(transport, nursery, config or BusConfig(), tl_listener)
        await transport.add_message_port(CONNECTION_MESSAGES)
        await transport.add_message_port(CONNECTION_MESSAGES_5)
        try:
            for device in devices:
                bus.add_device(device)
            nursery.start_soon(bus.run_incoming)
            nursery.start_soon(bus.run_outgoing)
            nursery.start_soon(bus.monitor.run)
            yield bus
        except BaseException as error:  # raised again below, out of the nursery
            failure = error
        with trio.CancelScope(shield=True):
            for runner in tuple(bus.runners.values()):
                runner.stop()
            for runner in tuple(bus.runners.values()):
                await runner.finished.wait()
            for attached in tuple(bus._devices.values()):
                await bus._close_device(attached)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
