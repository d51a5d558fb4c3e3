"""A transport to a partition in this very process.

For VMMs written in Python, and for guests that are Python themselves. The guest side is a
:class:`vmbus.synic.Synic`: its hypercalls become events and doorbells here, and what the bus sends
goes into its pages. Guests may run in other threads (vCPU threads, as a rule); everything they can
reach is safe for that. The transport's own methods belong to the trio thread.

::

    memory = allocate_memory(64 << 20)
    synic = Synic(memory, vp_count=2, interrupt=inject)
    with LoopbackTransport(synic) as transport:
        async with open_bus(transport, devices):
            await run_vcpus(synic)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final, Self

import trio

from vmbus.errors import AttachError, LocalProtocolError
from vmbus.memory import GuestMemory, allocate_memory
from vmbus.partition.doorbell import EventfdDoorbell
from vmbus.partition.events import (
    MemoryRemoval,
    Once,
    PartitionEvent,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
)
from vmbus.synic.model import Delivery, Synic, check_message
from vmbus.wire.synic import HvStatus

__all__ = ["LoopbackCall", "LoopbackTransport", "allocate_memory"]

POST_LIMIT: Final = 16
"""Messages of the guest that may wait for the bus; TLFS gives a port as many buffers."""
POLL_INTERVAL: Final = 0.001
"""Seconds between looks at a busy slot, for guests that free it without writing EOM."""


class LoopbackCall:
    """See :class:`vmbus.partition.transport.Call`."""

    __slots__ = ("_closed", "_flag", "_sint", "_transport", "_vp")

    def __init__(self, transport: LoopbackTransport, vp: int, sint: int, flag: int) -> None:
        self._transport = transport
        self._vp = vp
        self._sint = sint
        self._flag = flag
        self._closed = False

    def signal(self) -> None:
        """Set the flag and interrupt the VP. Cannot block; late calls are lost."""
        if not self._closed:
            self._transport.signal_flag(self._vp, self._sint, self._flag)

    def retarget(self, vp: int) -> None:
        """Deliver to another VP from now on. Cannot block."""
        self._vp = vp

    def close(self) -> None:
        """No signal goes out after this. Idempotent. Cannot block."""
        self._closed = True


class _Incoming:
    """Iterator over the events of a transport."""

    def __init__(self, take: Callable[[], PartitionEvent | trio.Event | None]) -> None:
        self._take = take

    def __aiter__(self) -> AsyncIterator[PartitionEvent]:
        return self

    async def __anext__(self) -> PartitionEvent:
        await trio.lowlevel.checkpoint()
        while True:
            match self._take():
                case None:
                    raise StopAsyncIteration
                case trio.Event() as arrival:
                    await arrival.wait()
                case event:
                    return event


class LoopbackTransport:
    """One partition in this process; a :class:`vmbus.partition.transport.Transport`.

    To be made inside ``trio.run``. It takes over the SynIC's ``ports`` and ``slot_free``.

    Args:
        synic: The partition.
        name: For logs and listings.
        post_limit: Messages of the guest that may wait for the bus; with more its HvPostMessage
            gets INSUFFICIENT_BUFFERS, and it tries again.
        report: Called with one line of text for each misbehaviour of the guest that the bus
            reports.
    """

    def __init__(
        self,
        synic: Synic,
        *,
        name: str = "loopback",
        post_limit: int = POST_LIMIT,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.synic = synic
        self.name = name
        self.memory: GuestMemory = synic.memory
        self.vp_count = synic.vp_count
        self._post_limit = post_limit
        self._report = report
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        # Guests in other threads get at what this lock guards.
        self._lock = threading.Lock()
        self._message_ports: set[int] = set()
        self._event_ports: dict[tuple[int, int], EventfdDoorbell] = {}
        self._events: deque[PartitionEvent] = deque()
        self._posts = 0
        self._closed = False
        self._arrival = trio.Event()
        self._slot_events: dict[int, trio.Event] = {}
        self._asking: set[trio.Event] = set()
        self._lifecycle = trio.Lock()
        self._life = 0
        """Resets so far."""
        self._resetting = False
        self._held: dict[tuple[int, int, int], None] | None = None
        """While paused: the flags to set on resuming, in order."""
        self._changed = trio.Event()
        """Set, and replaced, whenever deliveries have to look at the state again."""
        synic.ports = self
        synic.slot_free = self._slot_free

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # ------------------------------------------------------------ the guest, in any thread

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """See :meth:`vmbus.synic.model.SynicPorts.post_message`. May be called in any thread."""
        with self._lock:
            if self._closed:
                return HvStatus.INVALID_CONNECTION_ID
            if connection_id not in self._message_ports:
                is_event = any(key[0] == connection_id for key in self._event_ports)
                return HvStatus.INVALID_PORT_ID if is_event else HvStatus.INVALID_CONNECTION_ID
            if self._posts >= self._post_limit:
                return HvStatus.INSUFFICIENT_BUFFERS
            self._posts += 1
            done = partial(self._post_done, self._life)
            self._events.append(PostedMessage(connection_id, message_type, vp, payload, done))
        self._in_trio(self._arrived)
        return HvStatus.SUCCESS

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """See :meth:`vmbus.synic.model.SynicPorts.signal_event`. May be called in any thread."""
        # Under the lock: a removed port's descriptor number may be somebody else's by now.
        with self._lock:
            if self._closed:
                return HvStatus.INVALID_CONNECTION_ID
            doorbell = self._event_ports.get((connection_id, flag))
            if doorbell is not None:
                doorbell.ring()
                return HvStatus.SUCCESS
            if connection_id in self._message_ports:
                return HvStatus.INVALID_PORT_ID
            if any(key[0] == connection_id for key in self._event_ports):
                return HvStatus.INVALID_PARAMETER
        return HvStatus.INVALID_CONNECTION_ID

    def _slot_free(self, vp: int) -> None:
        self._in_trio(self._wake_deliveries, vp)

    def _in_trio(self, function: Callable[..., None], *args: int) -> None:
        """Call a function in the trio thread: at once if this is it, soon otherwise."""
        if threading.get_ident() == self._thread:
            function(*args)
            return
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            # The host is gone, the guest has not noticed yet; nobody waits any more.
            return

    def _arrived(self) -> None:
        self._arrival.set()

    def _wake_deliveries(self, vp: int) -> None:
        event = self._slot_events.pop(vp, None)
        if event is not None:
            event.set()

    # ------------------------------------------------------------------------------ the bus

    async def deliver(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        """Put one message into a SynIC slot, as :class:`~vmbus.partition.transport.Transport` says.

        Waits while the slot is taken or the partition paused. A cancelled call has not delivered.

        Raises:
            trio.BrokenResourceError: The partition is gone.
            LocalProtocolError: The message cannot be sent at all.
        """
        check_message(message_type, payload)
        life = self._life
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closed:
                raise trio.BrokenResourceError(f"{self.name}: the partition is gone")
            if self._resetting or life != self._life:
                # Whom it was for is no more.
                await trio.lowlevel.cancel_shielded_checkpoint()
                return False
            if self._held is not None:
                await self._changed.wait()
                continue
            outcome = self.synic.deliver_message(vp, sint, message_type, payload)
            if outcome is not Delivery.BUSY:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return outcome is Delivery.DELIVERED
            freed = self._slot_events.setdefault(vp, trio.Event())
            with trio.move_on_after(POLL_INTERVAL):
                await freed.wait()

    def signal_flag(self, vp: int, sint: int, flag: int) -> None:
        """Internal: set an event flag and interrupt the VP, on resuming if the partition is paused.

        Signals to VPs that cannot take them are lost. Cannot block.
        """
        if self._closed:
            return
        if self._held is not None:
            self._held[vp, sint, flag] = None
        else:
            self.synic.set_flag(vp, sint, flag)

    def open_call(self, vp: int, sint: int, flag: int) -> LoopbackCall:
        """Prepare an event flag. Cannot block."""
        return LoopbackCall(self, vp, sint, flag)

    async def add_message_port(self, connection_id: int) -> None:
        """Let the guest post to ``connection_id``; a port that exists stays. Is a checkpoint.

        Raises:
            AttachError: It is the id of an event port.
            trio.BrokenResourceError: The partition is gone.
        """
        await trio.lowlevel.checkpoint()
        self._check_open()
        with self._lock:
            if any(key[0] == connection_id for key in self._event_ports):
                raise AttachError(f"connection id {connection_id:#x} is an event port")
            self._message_ports.add(connection_id)

    async def add_event_port(self, connection_id: int, flag: int) -> EventfdDoorbell:
        """Let the guest signal ``connection_id`` with ``flag``. Is a checkpoint.

        Raises:
            AttachError: The id is in use.
            trio.BrokenResourceError: The partition is gone.
        """
        await trio.lowlevel.checkpoint()
        self._check_open()
        with self._lock:
            if connection_id in self._message_ports or (connection_id, flag) in self._event_ports:
                raise AttachError(f"connection id {connection_id:#x}, flag {flag} is in use")
            doorbell = self._event_ports[connection_id, flag] = EventfdDoorbell()
        return doorbell

    async def remove_event_port(self, connection_id: int, flag: int) -> None:
        """No signals any more; the doorbell's descriptor is closed. Is a checkpoint.

        Has done its work even if it is cancelled, and when the partition is gone.

        Raises:
            AttachError: There is no such port.
        """
        with self._lock:
            doorbell = self._event_ports.pop((connection_id, flag), None)
        if doorbell is None:
            raise AttachError(f"there is no event port {connection_id:#x}, flag {flag}")
        doorbell.close()
        await trio.lowlevel.checkpoint()

    def incoming(self) -> AsyncIterator[PartitionEvent]:
        """What the partition does, in order; ends when it is gone. One consumer."""
        return _Incoming(self._take)

    def report(self, text: str) -> None:
        """Pass a guest's misbehaviour on to the VMM, if it wants to know. Cannot block."""
        if self._report is not None:
            self._report(text)

    def _take(self) -> PartitionEvent | trio.Event | None:
        """Return the next event, an event to wait for until there may be one, or None."""
        with self._lock:
            if self._closed:
                return None
            if not self._events:
                self._arrival = trio.Event()
                return self._arrival
            return self._events.popleft()

    def _post_done(self, life: int) -> None:
        """The bus is done with a message that was posted so many resets ago."""
        with self._lock:
            if life == self._life:
                self._posts -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise trio.BrokenResourceError(f"{self.name}: the partition is gone")

    # ------------------------------------------------------------------- the VMM that owns it

    async def reset(self) -> None:
        """The VM is being reset: make the bus let go of it, and reset the SynIC.

        To be called with all VPs stopped, before memory is rewritten. Messages in either direction
        that have not arrived are dropped. Is a checkpoint; if it is cancelled, the bus goes on
        with the reset all the same.

        Raises:
            trio.ClosedResourceError: The transport was closed.
        """
        async with self._lifecycle:
            self._check_owner()
            with self._lock:
                self._events = deque(e for e in self._events if type(e) is not PostedMessage)
                self._posts = 0
                self._life += 1
            self._resetting = True
            if self._held is not None:
                self._held.clear()
            self._wake_all()
            await self._ask(PartitionReset, self._now_reset)

    def _now_reset(self) -> None:
        self.synic.reset()
        self._resetting = False

    async def pause(self) -> None:
        """Make the bus quiet. On return nothing touches guest memory, and nothing will.

        To be called with all VPs stopped. Is a checkpoint; if it is cancelled, the bus goes on
        becoming quiet all the same.

        Raises:
            LocalProtocolError: It is paused.
            trio.ClosedResourceError: The transport was closed.
        """
        async with self._lifecycle:
            self._check_owner()
            if self._held is not None:
                raise LocalProtocolError("the partition is paused already")
            await self._ask(PartitionPaused, self._now_paused)

    def _now_paused(self) -> None:
        self._held = {}

    async def resume(self) -> None:
        """Let the bus work again; to be called before the VPs run. Is a checkpoint.

        Raises:
            LocalProtocolError: It is not paused.
            trio.ClosedResourceError: The transport was closed.
        """
        async with self._lifecycle:
            self._check_owner()
            if self._held is None:
                raise LocalProtocolError("the partition is not paused")
            held, self._held = self._held, None
            self._wake_all()
            for vp, sint, flag in held:
                self.synic.set_flag(vp, sint, flag)
            await self._ask(PartitionResumed, _nothing)

    async def remove_memory(self, gpa: int, size: int) -> None:
        """Take a memory region away; on return nobody in this process maps it. Is a checkpoint.

        Args:
            gpa: Guest physical address in bytes, of a whole region.
            size: Its size in bytes.

        Raises:
            ConfigError: There is no such region.
            trio.ClosedResourceError: The transport was closed.
        """
        async with self._lifecycle:
            self._check_owner()
            self.memory.remove_region(gpa, size)
            await self._ask(lambda done: MemoryRemoval(gpa, size, done), _nothing)
        while not self.memory.drained():  # noqa: ASYNC110  # nothing tells when views die
            await trio.sleep(POLL_INTERVAL)

    def close(self) -> None:
        """The partition is gone. Idempotent. Cannot block.

        The bus sees the end of :meth:`incoming`; hypercalls find no ports any more. Doorbells stay
        open until the bus removes them, because it may be about to read one.
        """
        with self._lock:
            self._closed = True
            self._events.clear()
        self._arrived()
        self._wake_all()
        for waiting in self._asking:
            waiting.set()

    async def _ask(
        self, make: Callable[[Callable[[], None]], PartitionEvent], then: Callable[[], None]
    ) -> None:
        """Send an event with a ``done`` and wait until that has been called."""
        finished = trio.Event()

        def answered() -> None:
            then()
            finished.set()

        done = Once(answered)
        with self._lock:
            self._events.append(make(done))
        self._arrived()
        self._asking.add(finished)
        try:
            await finished.wait()
        finally:
            self._asking.discard(finished)
        if not done.called:
            raise trio.ClosedResourceError(f"{self.name}: closed")

    def _check_owner(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"{self.name}: closed")

    def _wake_all(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        for vp in tuple(self._slot_events):
            self._wake_deliveries(vp)


def _nothing() -> None:
    """Nothing is left to do when the bus is done."""
