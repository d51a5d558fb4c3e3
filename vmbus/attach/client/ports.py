"""The client's message ports, event ports and call eventfds."""

from __future__ import annotations

import errno
import os
import threading

from vmbus.attach.client.channel_io import ClientSocket
from vmbus.attach.client.delegate import Delegate
from vmbus.attach.protocol.closing import close_all
from vmbus.attach.protocol.descriptors import check_eventfd_untrusted
from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import PortKind
from vmbus.attach.protocol.to_vmm import AddEventPort, AddMsgPort, DelPort, SetCallFd

MAX_PORTS = 4096
"""Of each kind; every event port and call port costs a descriptor."""


class Ports:
    """Which connection ids exist. Requests come from the reading thread, signals from any.

    Args:
        io: Watches call eventfds.
        delegate: Told of everything.
    """

    def __init__(self, io: ClientSocket, delegate: Delegate) -> None:
        self._io = io
        self._delegate = delegate
        self._lock = threading.Lock()
        self.message_ports: set[int] = set()
        self.event_ports: dict[tuple[int, int], int] = {}
        """(connection id, flag) to eventfd, owned."""
        self._calls: dict[int, tuple[SetCallFd, int | None]] = {}
        """Port to what it means and the eventfd watched here, owned, if it is."""
        self._watched: dict[int, int] = {}
        """Eventfd to port."""

    def on_add_message_port(self, frame: Frame) -> None:
        """ADD_MSG_PORT."""
        connection_id = AddMsgPort.decode_untrusted(frame.payload).connection_id
        require(
            connection_id not in self.message_ports,
            f"ADD_MSG_PORT: connection_id {connection_id:#x} exists",
            errno.EEXIST,
        )
        require(len(self.message_ports) < MAX_PORTS, "ADD_MSG_PORT: too many ports", errno.ENOSPC)
        self.message_ports.add(connection_id)

    def on_add_event_port(self, frame: Frame) -> None:
        """ADD_EVENT_PORT."""
        request = AddEventPort.decode_untrusted(frame.payload)
        key = (request.connection_id, request.flag)
        require(
            key not in self.event_ports,
            f"ADD_EVENT_PORT: connection_id {request.connection_id:#x} flag {request.flag} exists",
            errno.EEXIST,
        )
        require(len(self.event_ports) < MAX_PORTS, "ADD_EVENT_PORT: too many ports", errno.ENOSPC)
        check_eventfd_untrusted(frame.fds[0], "ADD_EVENT_PORT")
        self._delegate.event_port_added(request.connection_id, request.flag, frame.fds[0])
        self.event_ports[key] = frame.take_fd()

    def on_del_port(self, frame: Frame) -> None:
        """DEL_PORT."""
        request = DelPort.decode_untrusted(frame.payload)
        key = (request.connection_id, request.flag)
        known = (
            request.connection_id in self.message_ports
            if request.kind == PortKind.MESSAGE
            else key in self.event_ports
        )
        require(known, "DEL_PORT: there is no such port", errno.ENOENT)
        if request.kind == PortKind.MESSAGE:
            self.message_ports.discard(request.connection_id)
            return
        self._delegate.event_port_removed(*key)
        with self._lock:
            close_all((self.event_ports.pop(key),))

    def signal(self, connection_id: int, flag: int) -> bool:
        """Write the port's eventfd; False if there is no such port. Never blocks."""
        with self._lock:
            fd = self.event_ports.get((connection_id, flag))
            if fd is None:
                return False
            try:
                os.eventfd_write(fd, 1)
            except BlockingIOError:
                # The counter is full: the server has a wake-up waiting.
                return True
        return True

    def on_set_call_fd(self, frame: Frame) -> None:
        """SET_CALL_FD."""
        request = SetCallFd.decode_untrusted(frame.payload)
        if not frame.fds:
            require(request.port in self._calls, "SET_CALL_FD: no such port", errno.ENOENT)
            self._unwatch(request.port)
            del self._calls[request.port]
            self._tell(request, None)
            return
        require(
            request.port in self._calls or len(self._calls) < MAX_PORTS,
            "SET_CALL_FD: too many ports",
            errno.ENOSPC,
        )
        check_eventfd_untrusted(frame.fds[0], "SET_CALL_FD")
        self._unwatch(request.port)
        if self._tell(request, frame.fds[0]):
            frame.take_fd()
            self._calls[request.port] = (request, None)
            return
        fd = frame.take_fd()
        self._calls[request.port] = (request, fd)
        self._watched[fd] = request.port
        self._io.watch(fd)

    def _tell(self, request: SetCallFd, fd: int | None) -> bool:
        return self._delegate.call_fd(request.port, request.vp, request.sint, request.flag, fd)

    def _unwatch(self, port: int) -> None:
        _, fd = self._calls.get(port, (None, None))
        if fd is not None:
            self.called(fd)
            self._io.unwatch(fd)
            del self._watched[fd]
            close_all((fd,))

    def called(self, fd: int) -> None:
        """A watched eventfd may have been signalled."""
        port = self._watched.get(fd)
        if port is None:
            # Closed by a frame that was handled in the same round.
            return
        request, _ = self._calls[port]
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        self._delegate.set_flag(request.vp, request.sint, request.flag)

    def close(self) -> None:
        """Forget everything; the delegate is told by its ``closed``."""
        self.message_ports.clear()
        with self._lock:
            close_all(self.event_ports.values())
            self.event_ports.clear()
        close_all(self._watched)
        self._watched.clear()
        self._calls.clear()
