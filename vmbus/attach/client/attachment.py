"""The VMM's side of ``vmbus-user``: :class:`Attachment`.

Needs no event loop and no trio; every method may be called from any thread. A VMM

1. implements :class:`Delegate`,
2. calls :meth:`Attachment.connect`, :meth:`~Attachment.vm_info` and
   :meth:`~Attachment.set_memory_table`, after which the guest may run,
3. has somebody look after incoming frames: a thread in :meth:`~Attachment.run`, or an event loop
   that calls :meth:`~Attachment.process` whenever :meth:`~Attachment.fileno` is readable,
4. calls :meth:`~Attachment.post_message` and :meth:`~Attachment.signal_event` from its processor
   threads; neither ever blocks.

Blocking calls look after incoming frames themselves while nobody else does, so step 3 may come
after step 2. The delegate is called from whichever thread is looking after the frames, one call
at a time, and must not make blocking calls of the attachment.
"""

from __future__ import annotations

import errno
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from vmbus.attach.client.channel_io import ClientSocket
from vmbus.attach.client.connect import Target, connect_socket
from vmbus.attach.client.delegate import (
    HV_STATUS_INSUFFICIENT_BUFFERS,
    HV_STATUS_INVALID_CONNECTION_ID,
    HV_STATUS_INVALID_PARAMETER,
    HV_STATUS_SUCCESS,
    Delegate,
    Done,
    Region,
)
from vmbus.attach.client.operator import read_json_reply_untrusted
from vmbus.attach.client.ports import Ports
from vmbus.attach.client.request_loop import RequestLoop
from vmbus.attach.protocol.framing import ASYNC, Frame, pack_frame
from vmbus.attach.protocol.limits import (
    ALL_FEATURES,
    MAX_MESSAGE,
    MAX_REGIONS,
    VERSION_MAX,
    VERSION_MIN,
    Feature,
    GoodbyeReason,
    ResetReason,
    Role,
)
from vmbus.attach.protocol.messages import MessageSpec, Number, RefusedError, State
from vmbus.attach.protocol.to_server import (
    Goodbye,
    Hello,
    HelloReply,
    MemoryRegion,
    PostMessage,
    Query,
    RemMem,
    Reset,
    SetMemTable,
    SetSintFd,
    SignalEvent,
    SynicState,
    VmInfo,
)
from vmbus.attach.protocol.to_vmm import DeliverMessage, Log, PostCredit, SignalFlag
from vmbus.errors import AttachError, LocalProtocolError, PeerProtocolError

__all__ = [
    "HV_STATUS_INSUFFICIENT_BUFFERS",
    "HV_STATUS_INVALID_CONNECTION_ID",
    "HV_STATUS_INVALID_PARAMETER",
    "HV_STATUS_SUCCESS",
    "Attachment",
    "Delegate",
    "Done",
    "Feature",
    "Region",
]


logger = logging.getLogger(__name__)


class _Deliveries:
    """Deliveries that the server waits for; see :class:`vmbus.attach.client.delegate.Done`."""

    def __init__(self, loop: RequestLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._seqs: set[int] = set()

    def __contains__(self, seq: int) -> bool:
        return seq in self._seqs

    def add(self, seq: int) -> None:
        """One came in."""
        with self._lock:
            self._seqs.add(seq)

    def answer(self, seq: int, code: int) -> None:
        """Answer, unless that has happened."""
        with self._lock:
            if seq not in self._seqs:
                return
            self._seqs.discard(seq)
        try:
            if code:
                self._loop.reply_error(Number.DELIVER_MESSAGE, seq, code, "not delivered")
            else:
                self._loop.reply(Number.DELIVER_MESSAGE, seq)
        except AttachError as error:
            # A processor thread has nothing to do with this; the reading thread ends it.
            self._loop.close(str(error))

    def cancel_all(self) -> None:
        """The guest's life is over."""
        for seq in tuple(self._seqs):
            self.answer(seq, errno.ECANCELED)

    def forget(self) -> None:
        """The connection is over."""
        with self._lock:
            self._seqs.clear()


class Attachment:
    """One connection of a VMM to a server; make it with :meth:`connect`."""

    def __init__(self, io: ClientSocket, delegate: Delegate, *, signal_by_message: bool) -> None:
        self._io = io
        self._delegate = delegate
        self._signal_by_message = signal_by_message
        self._loop = RequestLoop(io, self)
        self._post_lock = threading.Lock()
        self._credits = 0
        self._credit_limit = 0
        self._deliveries = _Deliveries(self._loop)
        self._resetting = False
        self._ports = Ports(io, delegate)
        self.state = State.NEW
        """Where the connection stands."""
        self.features = Feature(0)
        """As agreed."""
        self.server_name = ""
        self.vp_count = 0
        self._handlers: dict[int, Callable[[Frame], None]] = {
            Number.ADD_MSG_PORT: self._ports.on_add_message_port,
            Number.ADD_EVENT_PORT: self._ports.on_add_event_port,
            Number.DEL_PORT: self._ports.on_del_port,
            Number.DELIVER_MESSAGE: self._on_deliver,
            Number.SIGNAL_FLAG: self._on_signal_flag,
            Number.SET_CALL_FD: self._ports.on_set_call_fd,
            Number.LOG: self._on_log,
            Number.POST_CREDIT: self._on_post_credit,
            Number.GOODBYE: self._on_goodbye,
        }

    @classmethod
    def connect(
        cls,
        target: Target,
        delegate: Delegate,
        *,
        name: str = "vmm",
        max_vps: int = 64,
        features: Feature = ALL_FEATURES,
        mode: str | None = None,
        signal_by_message: bool = False,
        timeout: float = 10.0,
    ) -> Self:
        """Connect and say HELLO.

        Args:
            target: Socket path, or a connected descriptor or socket, which changes owner.
            delegate: Does what the server asks for.
            name: For the server's logs; at most 255 bytes.
            max_vps: The most virtual processors that :meth:`vm_info` will announce.
            features: What to offer; DIRECT only if you keep SYNIC_STATE's promise.
            mode: ``seqpacket``, ``stream``, or None for what the server has.
            signal_by_message: Send SIGNAL_EVENT instead of writing eventfds.
            timeout: Seconds for the whole.

        Raises:
            RefusedError: The server refused; has an ``errno``.
            AttachError: No server, or no sensible answer in time.
        """
        io = ClientSocket(connect_socket(target, mode))
        attachment = cls(io, delegate, signal_by_message=signal_by_message)
        hello = Hello(VERSION_MIN, VERSION_MAX, features, max_vps, Role.VMM, name)
        try:
            frame = attachment._loop.request(Number.HELLO, hello.encode(), (), timeout)
            try:
                reply = HelloReply.decode_untrusted(frame.payload)
                reply.check_answers(hello)
            except PeerProtocolError as error:
                raise AttachError(str(error)) from error
        except BaseException:
            attachment.close()
            raise
        attachment.features = Feature(reply.features)
        attachment.server_name = reply.name
        attachment._credits = attachment._credit_limit = reply.post_credits
        attachment.state = State.GREETED
        return attachment

    # -- requests, blocking --------------------------------------------------------------------

    def vm_info(
        self,
        vp_count: int,
        *,
        vm_id: uuid.UUID | None = None,
        privileges: int = 0,
        timeout: float = 10.0,
    ) -> None:
        """Describe the machine.

        Args:
            vp_count: Virtual processors; the server uses indices below it.
            vm_id: Identity of the VM, the same again after a reconnect; None is anonymous.
            privileges: CPUID 0x40000003, EAX in the low half and EBX in the high half.
            timeout: Seconds.

        Raises:
            RefusedError: EBUSY if this VM is attached (or not yet cleaned up): try again.
            AttachError: No answer, or the connection is gone.
        """
        info = VmInfo(vp_count, 4096, vm_id.bytes if vm_id else bytes(16), privileges, 0)
        self._loop.request(Number.VM_INFO, info.encode(), (), timeout)
        self.vp_count = vp_count
        self.state = State.DESCRIBED

    def set_memory_table(self, regions: Sequence[Region], *, timeout: float = 30.0) -> None:
        """Replace all of guest memory; the first time, wait until the server is ready.

        Regions that are in the old and the new table stay mapped. Returns when memory that went
        away is not used any more. Raises as :meth:`vm_info` does.
        """
        if not 0 < len(regions) <= MAX_REGIONS:
            raise LocalProtocolError(f"{len(regions)} regions: must be 1 to {MAX_REGIONS}")
        fds: list[int] = []
        entries = []
        for region in regions:
            if region.fd not in fds:
                fds.append(region.fd)
            entries.append(_entry(region, fds.index(region.fd)))
        first = self.state is State.DESCRIBED
        if first:
            # Requests of the server may come before its answer.
            self.state = State.ATTACHED
        try:
            self._loop.request(
                Number.SET_MEM_TABLE, SetMemTable(tuple(entries)).encode(), fds, timeout
            )
        except RefusedError:
            if first:
                self.state = State.DESCRIBED
            raise

    def add_memory(self, region: Region, *, timeout: float = 10.0) -> None:
        """Add one region. Raises as :meth:`vm_info` does."""
        self._loop.request(Number.ADD_MEM, _entry(region, 0).encode(), (region.fd,), timeout)

    def remove_memory(self, gpa: int, size: int, *, timeout: float = 30.0) -> None:
        """Take one region away; returns when nobody uses it. Raises as :meth:`vm_info` does."""
        self._loop.request(Number.REM_MEM, RemMem(gpa, size).encode(), (), timeout)

    def synic_state(
        self, vp: int, scontrol: int, simp: int, siefp: int, sint2: int, *, timeout: float = 10.0
    ) -> None:
        """Tell a VP's SynIC MSRs; to return before the guest's MSR write does. As vm_info."""
        state = SynicState(vp, scontrol, simp, siefp, sint2)
        self._loop.request(Number.SYNIC_STATE, state.encode(), (), timeout)

    def set_sint_fd(self, vp: int, eventfd: int, *, timeout: float = 10.0) -> None:
        """Give the server an eventfd that interrupts SINT 2 of ``vp``; borrowed. As vm_info."""
        self._loop.request(Number.SET_SINT_FD, SetSintFd(vp, 2).encode(), (eventfd,), timeout)

    def reset(self, reason: int = ResetReason.RESET, *, timeout: float = 30.0) -> None:
        """End the guest's life, with all VPs stopped; pending deliveries are called off.

        Returns when the server touches no memory of the old life any more. As vm_info.
        """
        self._resetting = True
        try:
            self._deliveries.cancel_all()
            self._loop.request(Number.RESET, Reset(reason).encode(), (), timeout)
        finally:
            self._resetting = False

    def pause(self, *, timeout: float = 30.0) -> None:
        """Have the server stop touching memory, with all VPs stopped. As vm_info."""
        self._loop.request(Number.PAUSE, b"", (), timeout)
        self.state = State.PAUSED

    def resume(self, *, timeout: float = 30.0) -> None:
        """Undo :meth:`pause`, before the VPs run. As vm_info."""
        self._loop.request(Number.RESUME, b"", (), timeout)
        self.state = State.ATTACHED

    def query(self, kind: str, *, timeout: float = 10.0) -> dict[str, Any]:
        """Ask the server about ``kind``. As vm_info."""
        frame = self._loop.request(Number.QUERY, Query(kind).encode(), (), timeout)
        try:
            return read_json_reply_untrusted(frame)
        except PeerProtocolError as error:
            raise AttachError(str(error)) from error
        finally:
            frame.close()

    def goodbye(self, reason: int = GoodbyeReason.NORMAL, *, timeout: float = 30.0) -> None:
        """End the connection in order: returns when the server uses no memory any more."""
        try:
            self._loop.request(Number.GOODBYE, Goodbye(reason).encode(), (), timeout)
        finally:
            self.close("goodbye")

    # -- from processor threads, never blocking --------------------------------------------------

    def post_message(self, connection_id: int, message_type: int, vp: int, payload: bytes) -> int:
        """Carry out HvPostMessage. Never blocks.

        Args:
            connection_id: The guest's, its upper 8 bits cleared.
            message_type: The guest's.
            vp: VP that made the call.
            payload: At most 240 bytes.

        Returns:
            The hypercall's status.
        """
        if not 0 < message_type < 1 << 31 or len(payload) > MAX_MESSAGE:
            return HV_STATUS_INVALID_PARAMETER
        if connection_id not in self._ports.message_ports:
            return HV_STATUS_INVALID_CONNECTION_ID
        message = PostMessage(connection_id, message_type, vp, bytes(payload)).encode()
        frame = pack_frame(Number.POST_MESSAGE, ASYNC, 0, message)
        with self._post_lock:
            if not self._credits:
                return HV_STATUS_INSUFFICIENT_BUFFERS
            try:
                if not self._io.try_send(frame):
                    return HV_STATUS_INSUFFICIENT_BUFFERS
            except AttachError:
                return HV_STATUS_INVALID_CONNECTION_ID
            self._credits -= 1
        return HV_STATUS_SUCCESS

    def signal_event(self, connection_id: int, flag: int = 0) -> int:
        """Carry out HvSignalEvent; returns the hypercall's status. Never blocks."""
        if not self._signal_by_message:
            known = self._ports.signal(connection_id, flag)
        else:
            known = (connection_id, flag) in self._ports.event_ports
            if known:
                payload = SignalEvent(connection_id, flag).encode()
                frame = pack_frame(Number.SIGNAL_EVENT, ASYNC, 0, payload)
                try:
                    self._io.send(frame, key=(connection_id, flag))
                except AttachError:
                    known = False
        return HV_STATUS_SUCCESS if known else HV_STATUS_INVALID_CONNECTION_ID

    # -- looking after incoming frames -----------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`process` has something to do; -1 if closed."""
        return self._io.fileno()

    def process(self) -> bool:
        """Handle what has arrived. Never blocks. Returns False once the connection is over."""
        return self._loop.process()

    def run(self) -> None:
        """Handle what arrives until the connection is over; for a thread."""
        self._loop.run()

    def close(self, reason: str = "closed here") -> None:
        """End the connection at once. Idempotent; may be called from anywhere."""
        self._loop.close(reason)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    # -- vmbus.attach.client.request_loop.Receiver -------------------------------------------------

    def handle(self, spec: MessageSpec, frame: Frame) -> bool:
        """Internal: act on a request of the server; False if it is answered later."""
        self._handlers[spec.number](frame)
        return spec.number != Number.DELIVER_MESSAGE

    def called(self, fd: int) -> None:
        """Internal: a call eventfd is readable."""
        self._ports.called(fd)

    def over(self, reason: str) -> None:
        """Internal: the connection is over."""
        self.state = State.CLOSED
        self._deliveries.forget()
        self._ports.close()
        self._delegate.closed(reason)

    def _on_deliver(self, frame: Frame) -> None:
        message = DeliverMessage.decode_untrusted(frame.payload)
        if message.vp >= self.vp_count:
            raise PeerProtocolError(
                f"DELIVER_MESSAGE: vp {message.vp} must be below {self.vp_count}",
                errno=errno.EINVAL,
            )
        self._deliveries.add(frame.seq)
        done = Done(self._deliveries, frame.seq)
        if self._resetting:
            done(errno.ECANCELED)
            return
        try:
            self._delegate.deliver_message(
                message.vp, message.sint, message.message_type, message.payload, done
            )
        except Exception:
            logger.exception("the delegate failed")
            done(errno.EIO)

    def _on_signal_flag(self, frame: Frame) -> None:
        signal = SignalFlag.decode_untrusted(frame.payload)
        if signal.vp < self.vp_count:
            self._delegate.set_flag(signal.vp, signal.sint, signal.flag)

    def _on_log(self, frame: Frame) -> None:
        self._delegate.log(Log.decode_untrusted(frame.payload).text)

    def _on_post_credit(self, frame: Frame) -> None:
        count = PostCredit.decode_untrusted(frame.payload).count
        with self._post_lock:
            self._credits += count
            if self._credits > self._credit_limit:
                raise PeerProtocolError(
                    "POST_CREDIT: more than was taken", errno=errno.EPROTO, fatal=True
                )

    def _on_goodbye(self, frame: Frame) -> None:
        reason = Goodbye.decode_untrusted(frame.payload).reason
        self._loop.end(f"the server said goodbye (reason {reason})")


def _entry(region: Region, index: int) -> MemoryRegion:
    flags = MemoryRegion.READ_ONLY if region.read_only else 0
    return MemoryRegion(region.gpa, region.size, region.fd_offset, flags, index)
