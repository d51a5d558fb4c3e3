"""The attachment to the server, over all lives of the guest."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Sequence
from uuid import UUID

from vmbus.attach.client import Attachment, Done, Region
from vmbus.attach.client.connect import Target
from vmbus.attach.protocol.limits import ALL_FEATURES, Feature, GoodbyeReason, ResetReason
from vmbus.errors import AttachError
from vmbus.kvm.synic import SynicBackend

_log = logging.getLogger("vmbus.kvm")


class ServerLink:
    """Does for the server what a VMM does (:class:`vmbus.attach.client.Delegate`).

    The attachment outlives the guest's resets, SynIC and KVM's machine do not: the link passes
    everything to whichever SynIC there is now.

    Args:
        lost: Called with the reason when the connection ends before :meth:`goodbye`; in any
            thread.
    """

    def __init__(self, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._lock = threading.Lock()
        self._synic: SynicBackend | None = None
        self._ports: dict[tuple[int, int], int] = {}
        self._attachment: Attachment | None = None
        self._thread: threading.Thread | None = None
        self._leaving = False

    @property
    def attachment(self) -> Attachment:
        """The connection; only after :meth:`connect`."""
        assert self._attachment is not None
        return self._attachment

    def connect(
        self,
        target: Target,
        regions: Sequence[Region],
        vp_count: int,
        *,
        name: str,
        vm_id: UUID | None = None,
        features: Feature = ALL_FEATURES,
        timeout: float = 10.0,
    ) -> None:
        """Attach. When this returns the guest may run. Blocks.

        Args:
            target: Socket path, or a connected descriptor, which changes owner.
            regions: All of the guest's memory; descriptors are borrowed.
            vp_count: Processors.
            name: For the server's logs and listings.
            vm_id: Identity of the VM.
            features: What to offer; without DIRECT and CALL_FD event flags come as messages.
            timeout: Seconds for the server to answer.

        Raises:
            AttachError: No server, or it refused.
        """
        attachment = Attachment.connect(
            target, self, name=name, max_vps=vp_count, features=features, timeout=timeout
        )
        self._attachment = attachment
        try:
            attachment.vm_info(vp_count, vm_id=vm_id, timeout=timeout)
            attachment.set_memory_table(regions, timeout=timeout)
        except BaseException:
            self._leaving = True
            attachment.close()
            raise
        self._thread = threading.Thread(target=attachment.run, name="attachment", daemon=True)
        self._thread.start()

    def begin(self, synic: SynicBackend) -> None:
        """A life begins: its SynIC takes what comes. Blocks. Raises AttachError, OSError."""
        synic.attach(self.attachment)
        with self._lock:
            for (connection_id, flag), eventfd in self._ports.items():
                synic.event_port_added(connection_id, flag, eventfd)
            self._synic = synic

    def reset(self, reason: int = ResetReason.RESET) -> None:
        """A life is over, all processors have stopped. Blocks. Raises AttachError.

        When it returns the server has let go of that life's memory, ports and eventfds.
        """
        self.attachment.reset(reason)

    def finish(self) -> None:
        """A life's SynIC goes away: when this returns it is not used any more."""
        with self._lock:
            self._synic = None

    def goodbye(self, reason: int = GoodbyeReason.SHUTDOWN) -> None:
        """Detach in order, with all processors stopped. Blocks; never raises."""
        self._leaving = True
        try:
            self.attachment.goodbye(reason)
        except AttachError as error:
            _log.debug("goodbye: %s", error)
        self.close()

    def close(self) -> None:
        """Detach at once. Idempotent."""
        self._leaving = True
        if self._attachment is not None:
            self._attachment.close()
        if self._thread is not None:
            self._thread.join()

    # -------------------------------------------------------- vmbus.attach.client.delegate.Delegate

    def deliver_message(
        self, vp: int, sint: int, message_type: int, payload: bytes, done: Done
    ) -> None:
        """See :meth:`vmbus.attach.client.Delegate.deliver_message`."""
        with self._lock:
            if self._synic is not None:
                self._synic.deliver(vp, sint, message_type, payload, done)
                return
        done(errno.ENXIO)

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.set_flag`."""
        with self._lock:
            if self._synic is not None:
                self._synic.set_flag(vp, sint, flag)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.event_port_added`."""
        with self._lock:
            if self._synic is not None:
                self._synic.event_port_added(connection_id, flag, eventfd)
            self._ports[connection_id, flag] = eventfd

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.event_port_removed`."""
        with self._lock:
            del self._ports[connection_id, flag]
            if self._synic is not None:
                self._synic.event_port_removed(connection_id, flag)

    def call_fd(self, port: int, vp: int, sint: int, flag: int, fd: int | None) -> bool:
        """See :meth:`vmbus.attach.client.Delegate.call_fd`: the attachment may watch it."""
        return False

    def log(self, text: str) -> None:
        """See :meth:`vmbus.attach.client.Delegate.log`."""
        _log.warning("server: %s", text)

    def closed(self, reason: str) -> None:
        """See :meth:`vmbus.attach.client.Delegate.closed`."""
        if not self._leaving:
            self._lost(reason)
