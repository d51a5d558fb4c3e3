"""A VMM's side of ``vmbus-user``, written from docs/reference/vmbus-user.md alone.

It shares no line with the project's own client and server of the protocol: where this program and
the server do not get on, the document is to blame, or one of the two. Numbers in comments are the
document's sections. Only the virtual hardware behind it is the project's: the SynIC model and the
guest memory, as a VMM without a SynIC of its own would use them.

* :class:`Wire` frames: requests, replies, asynchronous messages, descriptors.
* :class:`StrangerVmm` is the attachment: ports, deliveries, the three tiers of event flags.
* :class:`StrangerMachine` is the hardware that the Python guest runs on.

One thread serves the socket and the eventfds. The VPs are whoever calls the machine.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from tests.support.patience import LOOK, PATIENCE
from vmbus.guest import Interrupt, Region
from vmbus.memory import GuestMemory, create_memfd
from vmbus.synic import Delivery, MessageQueue, Synic
from vmbus.wire.synic import HvStatus, Msr

HELLO, SET_MEM_TABLE, ADD_MEM, REM_MEM, VM_INFO, SYNIC_STATE, SET_SINT_FD = range(0x01, 0x08)
POST_MESSAGE, SIGNAL_EVENT, RESET, PAUSE, RESUME = range(0x08, 0x0D)
QUERY, GOODBYE = 0x0F, 0x10
ADD_MSG_PORT, ADD_EVENT_PORT, DEL_PORT, DELIVER_MESSAGE = range(0x81, 0x85)
SIGNAL_FLAG, SET_CALL_FD, LOG, POST_CREDIT = range(0x85, 0x89)
REQUEST, REPLY, ERROR_REPLY, ASYNC = 0, 1, 3, 4
CALL_FD, DIRECT, LOGGING = 1, 2, 4
MAGIC = 0x55424D56
EPERM, ENOENT, EBUSY, EEXIST, EINVAL, ENOSYS = 1, 2, 16, 17, 22, 38
ENXIO, EPROTO, EMSGSIZE, ECANCELED = 6, 71, 90, 125

HEADER = struct.Struct("<HHIIHH")
HELLO_HEAD = struct.Struct("<IHHQIHH")
REGION = struct.Struct("<QQQII")
MESSAGE = struct.Struct("<IIII")
MAX_PAYLOAD, MAX_FDS = 32768, 64
STATE_MSRS = (Msr.SCONTROL, Msr.SIMP, Msr.SIEFP, Msr.SINT2)


_numbers = itertools.count(1)


class RefusedError(Exception):
    """An error reply (2)."""

    def __init__(self, kind: int, errno: int, text: str) -> None:
        super().__init__(f"{kind:#x}: errno {errno}: {text}")
        self.errno = errno


class GoneError(ConnectionError):
    """The connection is over."""


class BrokenRuleError(Exception):
    """The server has broken a rule of the document."""


class _Pending:
    """A request of ours without a reply."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.done = threading.Event()
        self.error: Exception | None = None
        self.payload = b""
        self.fds: list[int] = []


class Wire:
    """Frames over a socket, and the thread that reads them (sections 1 and 2).

    Args:
        path: Where to connect.
        stream: A stream socket instead of a seqpacket one.
        on_request: Called with (type, seq, payload, descriptors), in the thread that reads; it
            owns the descriptors.
        on_async: Called with (type, payload), likewise.

    Attributes:
        faults: Rules the server has broken; a test looks here at the end.
        gone: Set once the connection is over.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stream: bool,
        on_request: Callable[[int, int, bytes, list[int]], None],
        on_async: Callable[[int, bytes], None],
    ) -> None:
        self.on_request = on_request
        self.on_async = on_async
        kind = socket.SOCK_STREAM if stream else socket.SOCK_SEQPACKET
        self.sock = socket.socket(socket.AF_UNIX, kind)
        deadline = time.monotonic() + PATIENCE
        while True:  # 8: a server may be about to come back
            try:
                self.sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK)
            except BaseException:
                self.sock.close()
                raise
        self.sock.setblocking(False)
        self.faults: list[str] = []
        self.gone = threading.Event()
        self._stream = stream
        self._lock = threading.Lock()
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._pending: dict[int, _Pending] = {}
        self._seq = 0
        self._bytes = bytearray()
        self._fds: list[int] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.sock, selectors.EVENT_READ, self._readable)
        self.selector.register(
            self._wake, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake)
        )
        self._thread = threading.Thread(target=self._run, name="stranger", daemon=True)

    # ------------------------------------------------------------------------------ sending

    def request(self, kind: int, payload: bytes = b"", fds: Sequence[int] = ()) -> _Pending:
        """Send a request and wait for its reply; descriptors stay the caller's."""
        return self.wait(self.start(kind, payload, fds))

    def start(self, kind: int, payload: bytes = b"", fds: Sequence[int] = ()) -> _Pending:
        """Send a request."""
        with self._lock:
            if self.gone.is_set():
                raise GoneError
            self._seq += 1
            pending = self._pending[self._seq] = _Pending(kind)
            self._put(kind, REQUEST, self._seq, payload, fds)
        return pending

    def wait(self, pending: _Pending) -> _Pending:
        """Wait for the reply to a request."""
        if not pending.done.wait(PATIENCE):
            raise TimeoutError(f"no reply to {pending.kind:#x}")
        if pending.error is not None:
            raise pending.error
        return pending

    def reply(self, kind: int, seq: int, errno: int = 0, text: str = "") -> None:
        payload = struct.pack("<i", errno) + text.encode() if errno else b""
        with self._lock:
            self._put(kind, ERROR_REPLY if errno else REPLY, seq, payload)

    def post(self, kind: int, payload: bytes, *, optional: bool = False) -> bool:
        """Send an asynchronous message; an optional one not if the socket is full."""
        with self._lock:
            if optional and self._queue:
                return False
            self._put(kind, ASYNC, 0, payload)
            if optional and self._queue and len(self._queue[0][0]) == HEADER.size + len(payload):
                self._queue.clear()  # nothing of it has left
                return False
        return True

    def _put(
        self, kind: int, flags: int, seq: int, payload: bytes, fds: Sequence[int] = ()
    ) -> None:
        header = HEADER.pack(kind, flags, seq, len(payload), len(fds), 0)
        # Duplicates: the caller may close its own before this frame has left.
        self._queue.append((header + payload, [os.dup(fd) for fd in fds]))
        self._flush()

    def _flush(self) -> None:
        while self._queue and not self.gone.is_set():
            data, fds = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self.sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:
                return  # the reading side notices
            for fd in fds:
                os.close(fd)
            if sent < len(data):  # 2.2: the rest goes without them
                self._queue[0] = data[sent:], []
            else:
                self._queue.popleft()
        if self._queue:
            self.wake()

    def wake(self) -> None:
        """Have the thread look at everything again."""
        os.eventfd_write(self._wake, 1)

    # ---------------------------------------------------------------------------- receiving

    def begin(self) -> None:
        """Start reading."""
        self._thread.start()

    def _run(self) -> None:
        reason = "end of file"
        try:
            while not self.gone.is_set():
                with self._lock:
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._queue else 0)
                self.selector.modify(self.sock, events, self._readable)
                for key, ready in self.selector.select():
                    if key.fileobj is self.sock and ready & selectors.EVENT_WRITE:
                        with self._lock:
                            self._flush()
                        if not ready & selectors.EVENT_READ:
                            continue
                    if self.selector.get_map().get(key.fileobj) is key:  # not closed just now
                        key.data()
        except GoneError:
            pass
        except (BrokenRuleError, struct.error, ValueError) as error:
            reason = repr(error)
            self.faults.append(reason)
        except OSError as error:
            reason = str(error)
        finally:
            with self._lock:
                self.gone.set()
                self.sock.close()
                pending = list(self._pending.values())
            for each in pending:  # 8: unanswered requests are void
                each.error = GoneError(reason)
                each.done.set()

    def _readable(self) -> None:
        room = socket.CMSG_SPACE(MAX_FDS * 4)
        size = HEADER.size + MAX_PAYLOAD
        try:
            data, control, flags, _ = self.sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        for level, kind, block in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array.array("i", block[: len(block) // 4 * 4])
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BrokenRuleError("truncated")
        if not data:
            if self._bytes:
                raise BrokenRuleError("the stream ends within a frame")
            raise GoneError
        self._bytes += data
        while len(self._bytes) >= HEADER.size:
            kind, flags, seq, length, nfds, reserved = HEADER.unpack_from(self._bytes)
            if reserved or flags not in (REQUEST, REPLY, ERROR_REPLY, ASYNC):
                raise BrokenRuleError(f"header {bytes(self._bytes[:16]).hex()}")
            if length > MAX_PAYLOAD or nfds > MAX_FDS or nfds > len(self._fds):
                raise BrokenRuleError(f"frame of {length} bytes with {nfds} descriptors")
            end = HEADER.size + length
            if len(self._bytes) < end:
                break
            payload = bytes(self._bytes[HEADER.size : end])
            fds, self._fds = self._fds[:nfds], self._fds[nfds:]
            del self._bytes[:end]
            self._frame(kind, flags, seq, payload, fds)
        if not self._stream and (self._bytes or self._fds):
            raise BrokenRuleError("a record that is not one frame")

    def _frame(self, kind: int, flags: int, seq: int, payload: bytes, fds: list[int]) -> None:
        if flags == REQUEST:
            self.on_request(kind, seq, payload, fds)
        elif flags == ASYNC:
            for fd in fds:
                os.close(fd)
            self.on_async(kind, payload)
        else:
            with self._lock:
                pending = self._pending.pop(seq, None)
            if pending is None or pending.kind != kind:
                raise BrokenRuleError(f"a reply to nothing: {kind:#x}, {seq}")
            pending.payload, pending.fds = payload, fds
            if flags == ERROR_REPLY:
                (errno,) = struct.unpack_from("<i", payload)
                pending.error = RefusedError(kind, errno, payload[4:].decode())
            pending.done.set()

    def close(self) -> None:
        """Close without a word."""
        self.gone.set()
        self.wake()
        self._thread.join(PATIENCE)
        self.selector.close()
        for fd in (self._wake, *self._fds, *(fd for _, fds in self._queue for fd in fds)):
            os.close(fd)


class StrangerVmm:
    """A VM attached to a server.

    Args:
        path: The server's socket.
        stream: A stream socket instead of a seqpacket one.
        features: Bits to offer (7).
        vp_count: Virtual processors.
        sizes: Bytes of each memory region; the first is at address 0, the rest follow gapless.
        vm_id: 16 bytes.
        signal_by_message: Never write a port's eventfd.
        patience: Seconds to wait for a VM with this id to be gone.

    Attributes:
        tiers: Event flags by the way they came: ``"T0"``, ``"T1"``, ``"T2"``.
        vps: Event flags by VP.
        sent: Frames by message number.
        log: What the server had to say.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stream: bool = False,
        features: int = 0,
        vp_count: int = 2,
        sizes: Sequence[int] = (32 << 20,),
        vm_id: bytes = bytes(16),
        signal_by_message: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        self.tiers: Counter[str] = Counter()
        self.vps: Counter[int] = Counter()
        self.sent: Counter[int] = Counter()
        self.log: list[str] = []
        self.server_said_goodbye = False
        self.machine: StrangerMachine | None = None
        self._signal_by_message = signal_by_message
        self._message_ports: set[int] = set()
        self.event_ports: dict[tuple[int, int], int] = {}
        self.calls: dict[int, tuple[int, Callable[[], None]]] = {}
        self._deliveries: dict[int, None] = {}
        self._lock = threading.Lock()
        self.memory = GuestMemory()
        self.files: list[tuple[int, int, int]] = []
        self.synic = Synic(self.memory, vp_count, self._interrupt)
        self.synic.ports = self
        self._messages = MessageQueue(self.synic)
        self.synic.slot_free = self._messages.retry
        self._sint_fds: list[int] = []
        for size in sizes:
            self.map_memory(size)
        self.wire = Wire(path, stream=stream, on_request=self._request, on_async=self._async)
        self.wire.begin()
        try:
            self._attach(features, vp_count, vm_id, patience)
        except BaseException:
            self.close()
            raise

    def _attach(self, offered: int, vp_count: int, vm_id: bytes, patience: float) -> None:
        """Boot order (3)."""
        name = f"stranger-{next(_numbers)}".encode()  # a guest's name may be taken
        hello = HELLO_HEAD.pack(MAGIC, 1, 1, offered, vp_count, 0, len(name)) + name
        answer = self.wire.request(HELLO, hello).payload
        magic, version, _, features, _, credits_, length = HELLO_HEAD.unpack_from(answer)
        if (magic, version) != (MAGIC, 1) or features & ~offered or credits_ < 1:
            raise BrokenRuleError(f"HELLO: {answer.hex()}")
        self.server_name = answer[HELLO_HEAD.size :].decode()
        if len(answer) != HELLO_HEAD.size + length:
            raise BrokenRuleError(f"HELLO: name of {length} bytes")
        self.features = features
        self.credits = credits_
        self.max_credits = credits_
        eax, ebx, _, _ = self.synic.cpuid_leaves()[0x40000003]
        info = struct.pack("<II16sQII", vp_count, 4096, vm_id, eax | ebx << 32, 0, 0)
        deadline = time.monotonic() + patience
        while True:
            try:
                self.wire.request(VM_INFO, info)
                break
            except RefusedError as error:  # 8: the server may be cleaning up after us
                if error.errno != EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(LOOK)
        self.set_memory_table()
        if features & DIRECT:
            for vp in range(vp_count):
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._sint_fds.append(fd)
                self._watch(fd, lambda vp=vp, fd=fd: self._sint(vp, fd))  # type: ignore[misc]
                self.wire.request(SET_SINT_FD, struct.pack("<II", vp, 2), [fd])

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        # A level-triggered epoll set may grow while another thread waits on it.
        self.wire.selector.register(fd, selectors.EVENT_READ, callback)

    # ------------------------------------------------------------------------------- memory

    def map_memory(self, size: int) -> tuple[int, int, int]:
        """Add a region behind the last one, here only; return (gpa, size, memfd)."""
        gpa = sum(self.files[-1][:2]) if self.files else 0
        fd = create_memfd("stranger", size)
        self.memory.add_region(gpa, size, fd)
        self.files.append((gpa, size, fd))
        return self.files[-1]

    def set_memory_table(self) -> None:
        """Tell the server of all regions (5.2)."""
        table = struct.pack("<II", len(self.files), 0) + b"".join(
            REGION.pack(gpa, size, 0, 0, index) for index, (gpa, size, _) in enumerate(self.files)
        )
        self.wire.request(SET_MEM_TABLE, table, [fd for _, _, fd in self.files])

    def add_memory(self, size: int) -> Region:
        """Plug memory (5.3)."""
        gpa, size, fd = self.map_memory(size)
        self.wire.request(ADD_MEM, REGION.pack(gpa, size, 0, 0, 0), [fd])
        return Region(gpa, size)

    def remove_memory(self, region: Region) -> None:
        """Unplug memory (5.4): it is the VMM's again with the reply."""
        self.wire.request(REM_MEM, struct.pack("<QQ", region.gpa, region.size))
        self.memory.remove_region(region.gpa, region.size)
        for each in self.files:
            if each[:2] == region:
                os.close(each[2])
                self.files.remove(each)
                break

    # ------------------------------------------------------------------------ guest to server

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """HvPostMessage (5.8)."""
        if not 0 < message_type < 1 << 31 or len(payload) > 240:
            return HvStatus.INVALID_PARAMETER
        if self.wire.gone.is_set() or connection_id not in self._message_ports:
            return HvStatus.INVALID_CONNECTION_ID
        with self._lock:
            if not self.credits:
                return HvStatus.INSUFFICIENT_BUFFERS
            self.credits -= 1
        head = MESSAGE.pack(connection_id, message_type, vp, len(payload))
        if not self.wire.post(POST_MESSAGE, head + payload, optional=True):
            with self._lock:
                self.credits += 1
            return HvStatus.INSUFFICIENT_BUFFERS
        self.sent[POST_MESSAGE] += 1
        return HvStatus.SUCCESS

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """HvSignalEvent (5.9, 6.2)."""
        fd = self.event_ports.get((connection_id, flag))
        if self.wire.gone.is_set() or fd is None:
            return HvStatus.INVALID_CONNECTION_ID
        if self._signal_by_message:
            self.wire.post(SIGNAL_EVENT, struct.pack("<IHH", connection_id, flag, 0))
            self.sent[SIGNAL_EVENT] += 1
        else:
            os.eventfd_write(fd, 1)
        return HvStatus.SUCCESS

    def synic_state(self, vp: int, *, siefp: int | None = None) -> None:
        """Tell the server of the four MSRs of this VP (5.6), or of another SIEFP page."""
        registers = self.synic.registers.vps[vp]
        siefp = registers.siefp if siefp is None else siefp
        state = (registers.scontrol, registers.simp, siefp, registers.sints[2])
        with contextlib.suppress(GoneError):
            self.wire.request(SYNIC_STATE, struct.pack("<IIQQQQ", vp, 0, *state))

    # ------------------------------------------------------------------------ server to guest

    def _request(self, kind: int, seq: int, payload: bytes, fds: list[int]) -> None:
        errno = 0
        kept = False
        match kind:
            case 0x81:  # ADD_MSG_PORT
                (number,) = struct.unpack("<I", payload)
                errno = EEXIST if number in self._message_ports else 0
                self._message_ports.add(number)
            case 0x82:  # ADD_EVENT_PORT
                number, flag, _ = struct.unpack("<IHH", payload)
                if (number, flag) in self.event_ports:
                    errno = EEXIST
                else:
                    (self.event_ports[number, flag],) = fds
                    kept = True
            case 0x83:  # DEL_PORT
                errno = self._del_port(*struct.unpack("<IHH", payload))
            case 0x84:  # DELIVER_MESSAGE
                self._deliver(seq, payload)
                return
            case 0x86:  # SET_CALL_FD
                errno = self._set_call(fds, *struct.unpack("<IIII", payload))
                kept = True
            case 0x10:  # GOODBYE
                self.server_said_goodbye = True
            case _:
                errno = ENOSYS
        if not kept:
            for fd in fds:
                os.close(fd)
        self.wire.reply(kind, seq, errno)

    def _del_port(self, number: int, flag: int, kind: int) -> int:
        if kind == 0:
            if number not in self._message_ports:
                return ENOENT
            self._message_ports.remove(number)
            return 0
        fd = self.event_ports.pop((number, flag), None)
        if fd is None:
            return ENOENT
        os.close(fd)
        return 0

    def _deliver(self, seq: int, payload: bytes) -> None:
        vp, sint, message_type, size = MESSAGE.unpack_from(payload)
        body = payload[MESSAGE.size :]
        if len(body) != size or vp >= self.synic.vp_count or sint > 15:
            self.wire.reply(DELIVER_MESSAGE, seq, EINVAL, "no such slot")
            return
        self._deliveries[seq] = None

        def done(outcome: Delivery) -> None:
            # Only the first answer counts: a reset may have come before.
            with self._lock:
                found = seq in self._deliveries
                self._deliveries.pop(seq, None)
            if found:
                dropped = outcome is Delivery.DROPPED
                self.wire.reply(DELIVER_MESSAGE, seq, ENXIO if dropped else 0)

        if self.machine is not None and self.machine.off:
            self._cancel()
        else:
            self._messages.put(vp, sint, message_type, body, done)

    def _cancel(self) -> None:
        """Answer all that wait for a slot: there is a reset (5.10)."""
        with self._lock:
            waiting = list(self._deliveries)
            self._deliveries.clear()
        for seq in waiting:
            self.wire.reply(DELIVER_MESSAGE, seq, ECANCELED, "reset")
        self._messages.cancel()

    def _set_call(self, fds: list[int], port: int, vp: int, sint: int, flag: int) -> int:
        old = self.calls.pop(port, None)
        if old is not None:
            self.wire.selector.unregister(old[0])
            old[1]()
            os.close(old[0])
        if not fds:
            return 0 if old else ENOENT
        (fd,) = fds

        def act() -> None:
            if _take(fd):
                self._set_flag("T1", vp, sint, flag)

        self.calls[port] = fd, act
        self._watch(fd, act)
        return 0

    def _async(self, kind: int, payload: bytes) -> None:
        match kind:
            case 0x85:  # SIGNAL_FLAG
                vp, sint, flag = struct.unpack("<III", payload)
                self._set_flag("T0", vp, sint, flag)
            case 0x87:  # LOG
                if not self.features & LOGGING:
                    raise BrokenRuleError("LOG was not agreed")
                self.log.append(payload[4:].decode())
            case 0x88:  # POST_CREDIT
                (count,) = struct.unpack("<I", payload)
                with self._lock:
                    self.credits += count
                    if not count or self.credits > self.max_credits:
                        raise BrokenRuleError(f"credit of {count}, makes {self.credits}")
            case _:
                pass  # 3: unknown ones are ignored

    def _set_flag(self, tier: str, vp: int, sint: int, flag: int) -> None:
        """What SIGNAL_FLAG asks for (6.5)."""
        self.tiers[tier] += 1
        self.vps[vp] += 1
        self.synic.set_flag(vp, sint, flag)

    def _sint(self, vp: int, fd: int) -> None:
        """The server has set flags of SINT 2 and asks for the interrupt (T2)."""
        if _take(fd):
            self.tiers["T2"] += 1
            self.vps[vp] += 1
            self._interrupt(vp, self.synic.registers.vps[vp].sints[2] & 0xFF)

    def _interrupt(self, vp: int, vector: int) -> None:
        machine = self.machine
        if machine is not None:
            machine.interrupt(vp, vector)

    # --------------------------------------------------------------------------- life cycle

    def power_on(self) -> StrangerMachine:
        """Return fresh hardware, on which a guest may boot."""
        self.machine = StrangerMachine(self)
        return self.machine

    def reset(self, reason: int = 0) -> None:
        """End the guest's life (5.10)."""
        if self.machine is not None:
            self.machine.off = True
        self.synic.reset()
        self._cancel()
        self.wire.request(RESET, struct.pack("<I", reason))

    def pause(self) -> None:
        """Only from the guest's own thread, which is so stopped (5.11)."""
        self.wire.request(PAUSE)

    def resume(self) -> None:
        """The guest's thread may go on."""
        self.wire.request(RESUME)

    def settle(self) -> None:
        """Return when all that the server has sent or signalled so far has been acted upon.

        The thread handles everything that is ready before it waits again, and the answer to this
        question is younger than all of it. Servers answer questions in every state.
        """
        with contextlib.suppress(RefusedError):
            self.wire.request(QUERY, b"status")

    def goodbye(self) -> None:
        """Leave in order (5.13); what is under way is answered meanwhile."""
        self.wire.request(GOODBYE, bytes(4))
        self.close()

    def close(self) -> None:
        """Give everything up; without :meth:`goodbye` before, vanish."""
        if self.machine is not None:
            self.machine.off = True
        self.wire.close()
        fds = [*self.event_ports.values(), *self._sint_fds]
        fds += [fd for fd, _ in self.calls.values()]
        fds += [fd for _, _, fd in self.files]
        for fd in fds:
            os.close(fd)


def _take(fd: int) -> bool:
    """Read an eventfd, if it is signalled, without waiting whatever its flags are."""
    with selectors.PollSelector() as poll:
        poll.register(fd, selectors.EVENT_READ)
        if not poll.select(0):
            return False
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
        return True
    return False


class StrangerMachine:
    """The hardware of one guest, from power-on to reset. Made in a trio task.

    Attributes:
        off: Set to stop all VPs for good, between two instructions.
    """

    flags_are_shared = True
    """Flags are set by another thread or process in all tiers."""

    def __init__(self, vmm: StrangerVmm) -> None:
        self.vmm = vmm
        self.off = False
        self.regions = [Region(gpa, size) for gpa, size, _ in vmm.files]
        self.vp_count = vmm.synic.vp_count
        self._leaves = vmm.synic.cpuid_leaves()
        self._leaves[1] = (0, 0, 1 << 31, 0)
        self._lock = threading.Lock()
        self._pending: set[Interrupt] = set()
        self._arrived = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def view(self, gpa: int, length: int) -> memoryview:
        (view,) = self.vmm.memory.views(gpa, length)
        return view

    def cpuid(self, leaf: int) -> tuple[int, int, int, int]:
        return self._leaves.get(leaf, (0, 0, 0, 0))

    def read_msr(self, vp: int, index: int) -> int:
        return self.vmm.synic.read_msr(vp, index)

    def write_msr(self, vp: int, index: int, value: int) -> None:
        if self.off:
            return
        self.vmm.synic.write_msr(vp, index, value)
        # Now, with the page cleared: from the reply on the server may set flags in it.
        if index in STATE_MSRS and self.vmm.features & DIRECT:
            self.vmm.synic_state(vp)

    async def hypercall(self, vp: int, control: int, rdx: int, r8: int) -> int:
        if self.off:
            await trio.sleep_forever()
        return self.vmm.synic.hypercall(vp, control, rdx, r8)

    def interrupt(self, vp: int, vector: int) -> None:
        if self.off:
            return
        with self._lock:
            self._pending.add(Interrupt(vp, vector))
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._announce, idempotent=True)

    def _announce(self) -> None:
        self._arrived.set()

    async def wait_interrupt(self) -> set[Interrupt]:
        await trio.lowlevel.checkpoint()
        while True:
            self._arrived = trio.Event()
            with self._lock:
                pending, self._pending = self._pending, set()
            if pending and not self.off:
                return pending
            await self._arrived.wait()
