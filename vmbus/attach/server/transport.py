"""The server's view of one attached VMM: a transport, as the bus knows it, over a link."""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from vmbus.attach.protocol.closing import close_all
from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import Feature, GoodbyeReason, LogLevel, PortKind
from vmbus.attach.protocol.messages import MessageSpec, Number, RefusedError, State
from vmbus.attach.protocol.to_server import (
    Goodbye,
    Hello,
    MemoryRegion,
    RemMem,
    SetMemTable,
    SignalEvent,
    VmInfo,
    decode_post_untrusted,
)
from vmbus.attach.protocol.to_vmm import (
    AddEventPort,
    AddMsgPort,
    DeliverMessage,
    DelPort,
    Log,
    PostCredit,
    SetCallFd,
    SignalFlag,
)
from vmbus.attach.server.calls import SocketCall, VpSynic, eventfd_pair
from vmbus.attach.server.delivery import Delivery
from vmbus.attach.server.events import EventQueue
from vmbus.attach.server.guest_memory import MemoryTable
from vmbus.attach.server.lifecycle import Lifecycle
from vmbus.attach.server.link import Link, check_frame
from vmbus.attach.server.management import Management
from vmbus.attach.server.places import DescriptorShares
from vmbus.attach.server.questions import Answer
from vmbus.attach.server.synics import Synics
from vmbus.errors import AttachError, PeerProtocolError
from vmbus.log_budget import LogBudget
from vmbus.memory import GuestMemory
from vmbus.partition.doorbell import EventfdDoorbell
from vmbus.partition.events import (
    PartitionEvent,
    PartitionPaused,
    PartitionReset,
    PartitionResumed,
    PostedMessage,
)
from vmbus.workers import abandoned

logger = logging.getLogger(__name__)

_LIFE_CYCLE = frozenset({Number.RESET, Number.PAUSE, Number.RESUME})
_DIRECT = frozenset({Number.SYNIC_STATE, Number.SET_SINT_FD})


class SocketTransport:
    """One attached partition; see :class:`vmbus.partition.transport.Transport` for the public half.

    Made by :mod:`vmbus.attach.server.connections` once HELLO is agreed; it is also the link's
    session. All of it runs in the trio thread.

    Args:
        link: The connection.
        hello: What the VMM said about itself.
        name: What its guest is called here.
        features: As agreed.
        management: Answers QUERY.
        claim: Called with the VM's id when it becomes known; raises PeerProtocolError to refuse.
        shares: Say how many descriptors may be kept.
        trust_vmm: Accept memory that can be truncated under us.
    """

    def __init__(
        self,
        link: Link,
        hello: Hello,
        *,
        name: str,
        features: Feature,
        management: Management,
        claim: Callable[[uuid.UUID], None],
        shares: DescriptorShares,
        trust_vmm: bool,
    ) -> None:
        self._link = link
        self._hello = hello
        self._claim = claim
        self._shares = shares
        self.features = features
        self.name = name
        self.memory = GuestMemory()
        self.vp_count = 0
        self.vm_id = uuid.UUID(int=0)
        """The VM's identity; all zeros if the VMM gave none."""
        self.state = State.GREETED
        self.attached = trio.Event()
        """Set with the first memory table: the handler may start."""
        self.held: dict[SocketCall, None] | None = None
        self.synics = Synics(self.memory)
        self.open_calls: set[SocketCall] = set()
        self.dropped_messages = 0
        """Asynchronous messages that broke a rule."""
        self._table = MemoryTable(self.memory, link.limits, trusted=trust_vmm)
        self._log = LogBudget()
        shares.add(self)
        self._events = EventQueue(link.limits.post_credits, self._grant_credit, self._answer_attach)
        self._running = trio.Event()
        self._running.set()
        self._attach_request: tuple[int, int] | None = None
        self._lifecycle = Lifecycle(link)
        self._goodbye: tuple[int, int] | None = None
        self._ports: dict[tuple[int, int], EventfdDoorbell] = {}
        self._deliveries: dict[tuple[int, int], Delivery] = {}
        self._next_port = 0
        self._handlers: dict[int, Callable[[Frame], None]] = {
            Number.SET_MEM_TABLE: self._on_set_mem_table,
            Number.ADD_MEM: self._on_add_mem,
            Number.REM_MEM: self._on_rem_mem,
            Number.VM_INFO: self._on_vm_info,
            Number.SYNIC_STATE: self._on_synic_state,
            Number.SET_SINT_FD: self._on_set_sint_fd,
            Number.POST_MESSAGE: self._on_post_message,
            Number.SIGNAL_EVENT: self._on_signal_event,
            Number.RESET: self._on_reset,
            Number.PAUSE: self._on_pause,
            Number.RESUME: self._on_resume,
            Number.QUERY: lambda frame: management.begin(link, frame),
            Number.GOODBYE: self._on_goodbye,
        }

    # -- vmbus.partition.transport.Transport -------------------------------------------------------

    async def deliver(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        """Put one message into a SynIC slot; waits while the VM is paused. Is a checkpoint.

        Raises:
            trio.BusyResourceError: A delivery to the same slot is under way.
            trio.BrokenResourceError: The partition is gone.
        """
        if vp >= self.vp_count:
            await trio.lowlevel.checkpoint()
            return False
        key = (vp, sint)
        while True:
            await self._running.wait()
            self._need_open()
            before = self._deliveries.get(key)
            if before is None:
                break
            if not before.abandoned:
                raise trio.BusyResourceError(f"a message for VP {vp} SINT {sint} is under way")
            # Its task was cancelled, but the VMM still works on it.
            await before.answered.wait()
        delivery = self._deliveries[key] = Delivery()

        def answered(answer: Answer) -> None:
            delivery.answer = answer
            delivery.answered.set()
            del self._deliveries[key]

        message = DeliverMessage(vp, sint, message_type, payload)
        self._link.request_soon(Number.DELIVER_MESSAGE, message.encode(), [], answered)
        try:
            await delivery.answered.wait()
        except trio.Cancelled:
            delivery.abandoned = True
            raise
        if isinstance(delivery.answer, RefusedError):
            logger.debug("%s: message dropped: %s", self.name, delivery.answer)
            return False
        if isinstance(delivery.answer, Exception):
            raise delivery.answer
        return True

    def open_call(self, vp: int, sint: int, flag: int) -> SocketCall:
        """Prepare event flag ``flag`` of SINT ``sint`` on ``vp``. Cannot block.

        Signals of a call to a VP that does not exist are lost.
        """
        self._next_port = (self._next_port + 1) & 0xFFFFFFFF
        return SocketCall(self, self._next_port, vp, sint, flag)

    async def add_message_port(self, connection_id: int) -> None:
        """Let the guest post to ``connection_id``. Is a checkpoint. Raises AttachError."""
        await self._ask(Number.ADD_MSG_PORT, AddMsgPort(connection_id).encode())

    async def add_event_port(self, connection_id: int, flag: int) -> EventfdDoorbell:
        """Let the guest signal ``connection_id``. Is a checkpoint. Raises AttachError."""
        key = (connection_id, flag)
        if self._room <= 0:
            raise AttachError(f"event port {connection_id:#x}/{flag}: too many descriptors")
        if key in self._ports:
            raise AttachError(f"event port {connection_id:#x}/{flag} exists already")
        request = AddEventPort(connection_id, flag).encode()
        port = self._ports[key] = EventfdDoorbell()
        try:
            await self._ask(Number.ADD_EVENT_PORT, request, [os.dup(port.fd)])
        except BaseException as error:
            del self._ports[key]
            port.close()
            if isinstance(error, trio.Cancelled):
                # The VMM may have the port by now.
                undo = DelPort(connection_id, flag, PortKind.EVENT).encode()
                self._link.request_soon(Number.DEL_PORT, undo, [], lambda _: None)
            raise
        return port

    async def remove_event_port(self, connection_id: int, flag: int) -> None:
        """No signals any more; the doorbell is closed. Is a checkpoint. Raises AttachError."""
        key = (connection_id, flag)
        port = self._ports.get(key)
        if port is None:
            raise AttachError(f"there is no event port {connection_id:#x}/{flag}")
        try:
            await self._ask(Number.DEL_PORT, DelPort(connection_id, flag, PortKind.EVENT).encode())
        except trio.BrokenResourceError:
            logger.debug("%s: event port %#x went with the VMM", self.name, connection_id)
        finally:
            self._ports.pop(key, None)
            port.close()

    def incoming(self) -> AsyncIterator[PartitionEvent]:
        """What the partition does, in order; ends when it is gone. One consumer.

        The VMM's first SET_MEM_TABLE is answered when the first event is asked for: by then the
        message ports must be there, because the VMM starts its processors now.
        """
        return self._events

    def report(self, text: str) -> None:
        """Send LOG, if the VMM wants it. Cannot block."""
        if Feature.LOG in self.features and self.state in {State.ATTACHED, State.PAUSED}:
            self._link.post(Number.LOG, Log(LogLevel.WARNING, text).encode(), drop=True)

    # -- vmbus.attach.server.calls.CallOwner -------------------------------------------------------

    @property
    def has_call_fds(self) -> bool:
        """Internal: whether tier T1 was agreed."""
        return Feature.CALL_FD in self.features

    @property
    def vp_synics(self) -> Sequence[VpSynic]:
        """Internal: one for each VP."""
        return self.synics.vps

    def signal_by_message(self, vp: int, sint: int, flag: int) -> None:
        """Internal: tier T0; equal signals that wait in the queue are one."""
        if self.state is not State.CLOSED:
            self._link.post(
                Number.SIGNAL_FLAG, SignalFlag(vp, sint, flag).encode(), key=(vp, sint, flag)
            )

    def offer_call_fd(self, call: SocketCall) -> int:
        """Internal: tier T1, if agreed."""
        if not self.has_call_fds or self.state is State.CLOSED or self._room <= 0:
            return -1
        try:
            fd, theirs = eventfd_pair()
        except OSError as error:
            if self._log.spend():
                left_out = self._log.left_out()
                logger.warning(
                    "%s: no eventfd for a channel: %s%s", self.name, error.strerror, left_out
                )
            return -1

        def answered(answer: Answer) -> None:
            taken = not isinstance(answer, Exception)
            call.answered(fd, taken=taken, refused=isinstance(answer, RefusedError))

        call.offered(fd)
        message = SetCallFd(call.port, call.vp, call.sint, call.flag)
        self._link.request_soon(Number.SET_CALL_FD, message.encode(), [theirs], answered)
        return fd if call.is_offered(fd) else -1

    def drop_call_fd(self, call: SocketCall) -> None:
        """Internal: forget a T1 port."""
        if self.state is not State.CLOSED:
            message = SetCallFd(call.port, call.vp, call.sint, call.flag)
            self._link.request_soon(Number.SET_CALL_FD, message.encode(), [], lambda _: None)

    @property
    def descriptors(self) -> int:
        """Internal: how many are kept for this VMM, if each call has one."""
        kept = len(self._ports) + len(self.open_calls)
        return kept + self._table.descriptors + self.synics.descriptors

    # -- for the server ------------------------------------------------------------------------

    def end(self) -> None:
        """Internal: the link is closed or about to be: no more events. Idempotent."""
        self.state = State.CLOSED
        self._events.end()
        self._running.set()
        self._link.abandon()

    def release(self, reason: GoodbyeReason, why: str = "") -> None:
        """Internal: nobody uses the transport any more; close calls, doorbells, memory and link.

        ``reason`` goes into a GOODBYE of ours, ``why`` into the refusal of an unfinished attach.
        """
        said_goodbye = self.state is State.CLOSED
        self.end()
        for call in tuple(self.open_calls):
            call.close()
        for port in self._ports.values():
            port.close()
        self._ports.clear()
        self.synics.close()
        self._table.close()
        self._shares.remove(self)
        if self._attach_request is not None:
            text = f"SET_MEM_TABLE: this guest cannot be served: {why or 'the server ends'}"
            self._link.reply_error(*self._attach_request, errno.EIO, text)
        if self._goodbye is not None and (calls := abandoned(self.memory)):
            text = f"GOODBYE: {calls} transfer(s) that have not come back may still use memory"
            self._link.reply_error(*self._goodbye, errno.ETIMEDOUT, text)
        elif self._goodbye is not None:
            self._link.reply(*self._goodbye)
        elif not said_goodbye and not self._link.closed.is_set():
            self._link.request_soon(Number.GOODBYE, Goodbye(reason).encode(), [], lambda _: None)
        who = "the peer" if said_goodbye else "the server"
        self._link.finish(f"{who} said goodbye", linger=self._goodbye is not None)

    # -- vmbus.attach.server.link.Session ----------------------------------------------------------

    def check(self, spec: MessageSpec, frame: Frame) -> None:
        """Internal: check state, descriptors and feature; take the credit of a posted message."""
        state = self.state
        if spec.number == Number.POST_MESSAGE:
            self._events.take_credit()
        elif self._lifecycle.busy and spec.number in _LIFE_CYCLE:
            # Between two states; what is the matter is the one before, and EBUSY.
            state = next(iter(spec.states))
        check_frame(spec, state, frame)
        if spec.number in _DIRECT and Feature.DIRECT not in self.features:
            raise PeerProtocolError(
                f"{spec.name}: feature DIRECT was not agreed", errno=errno.EPROTO
            )

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        """Internal: act on one request."""
        self._handlers[spec.number](frame)

    def dropped(self, kind: int, error: PeerProtocolError) -> None:
        """Internal: count it, give its credit back, and tell the VMM."""
        self.dropped_messages += 1
        if kind == Number.POST_MESSAGE:
            self._events.give_credit(1)
        self.report(str(error))

    # -- requests ------------------------------------------------------------------------------

    def _need_open(self) -> None:
        if self.state is State.CLOSED:
            raise trio.BrokenResourceError(f"{self.name}: {self._link.reason or 'said goodbye'}")

    async def _ask(self, kind: int, payload: bytes, fds: list[int] | None = None) -> None:
        if self.state is State.CLOSED:
            close_all(fds or ())
        self._need_open()
        await self._link.request(kind, payload, fds)

    def _answer_attach(self) -> None:
        """The bus listens: the VMM may start its processors."""
        if self._attach_request is not None:
            self._link.reply(*self._attach_request)
            self._attach_request = None
            self._table.busy = False

    def _grant_credit(self, count: int) -> None:
        self._link.post(Number.POST_CREDIT, PostCredit(count).encode())

    @property
    def _room(self) -> int:
        return self._shares.room(self)

    def _on_vm_info(self, frame: Frame) -> None:
        info = VmInfo.decode_untrusted(frame.payload)
        require(
            info.vp_count <= self._hello.max_vps,
            f"VM_INFO: vp_count {info.vp_count} is above HELLO's max_vps {self._hello.max_vps}",
        )
        self._claim(info.uuid)
        self.vm_id = info.uuid
        self.vp_count = info.vp_count
        self.synics.describe(info.vp_count)
        self.state = State.DESCRIBED
        self._link.reply(frame.kind, frame.seq)

    def _on_set_mem_table(self, frame: Frame) -> None:
        table = SetMemTable.decode_untrusted(frame.payload)
        self._table.check_idle()
        removed = self._table.replace_untrusted(table, frame.fds, self._room)
        frame.close_mapped()
        self.synics.aim()
        if self.state is State.DESCRIBED:
            self.state = State.ATTACHED
            self._attach_request = (frame.kind, frame.seq)
            self._table.busy = True
            self.attached.set()
        else:
            self._table.retire(removed, self._events.put, self._link, frame)

    def _on_add_mem(self, frame: Frame) -> None:
        region = MemoryRegion.decode_untrusted(frame.payload)
        self._table.check_idle()
        self._table.add_untrusted(region, frame.fds[0], self._room)
        frame.close_mapped()
        self.synics.aim()
        self._link.reply(frame.kind, frame.seq)

    def _on_rem_mem(self, frame: Frame) -> None:
        request = RemMem.decode_untrusted(frame.payload)
        self._table.check_idle()
        region = self._table.remove_untrusted(request)
        self.synics.aim()
        self._table.retire([region], self._events.put, self._link, frame)

    def _on_synic_state(self, frame: Frame) -> None:
        self.synics.set_state_untrusted(frame.payload)
        self._link.reply(frame.kind, frame.seq)

    def _on_set_sint_fd(self, frame: Frame) -> None:
        self.synics.set_sint_fd_untrusted(frame, self._room)
        self._link.reply(frame.kind, frame.seq)

    def _on_post_message(self, frame: Frame) -> None:
        connection_id, message_type, vp, payload = decode_post_untrusted(frame.payload)
        self.synics.need(vp, "POST_MESSAGE")
        events = self._events
        events.put(PostedMessage(connection_id, message_type, vp, payload, events.message_done))

    def _on_signal_event(self, frame: Frame) -> None:
        event = SignalEvent.decode_untrusted(frame.payload)
        port = self._ports.get((event.connection_id, event.flag))
        if port is not None:
            # A signal that crossed DEL_PORT on its way is lost, like one to a closed channel.
            port.ring()

    def _on_reset(self, frame: Frame) -> None:
        done, failed = self._lifecycle.begin(frame)
        self._events.drop_messages()
        self.synics.reset()
        if self.held is not None:
            self.held.clear()
        self._events.put(PartitionReset(done, failed))

    def _on_pause(self, frame: Frame) -> None:
        self._events.put(PartitionPaused(*self._lifecycle.begin(frame, self._now_paused)))

    def _now_paused(self) -> None:
        if self.state is State.ATTACHED:
            self.state = State.PAUSED
            self.held = {}
            self._running = trio.Event()

    def _on_resume(self, frame: Frame) -> None:
        done, _ = self._lifecycle.begin(frame)
        self.state = State.ATTACHED
        held, self.held = self.held or {}, None
        self._running.set()
        for call in held:
            call.signal()
        self._events.put(PartitionResumed(done))

    def _on_goodbye(self, frame: Frame) -> None:
        Goodbye.decode_untrusted(frame.payload)
        self._goodbye = (frame.kind, frame.seq)
        waiting = not self.attached.is_set()
        self.end()
        if waiting:
            self.release(GoodbyeReason.NORMAL)
