"""What a VMM that has a SynIC model does for the server: ports, messages, shared registers."""

from __future__ import annotations

import contextlib
import errno

from vmbus.attach.client.attachment import Attachment
from vmbus.attach.client.delegate import Done
from vmbus.attach.protocol.limits import Feature
from vmbus.errors import AttachError, BudgetError, LocalProtocolError
from vmbus.synic.model import Delivery, Synic
from vmbus.synic.queue import MessageQueue
from vmbus.wire.synic import CONNECTION_ID_LIMIT, HvStatus, Msr

SHARED_REGISTERS = frozenset({Msr.SCONTROL, Msr.SIMP, Msr.SIEFP, Msr.SINT2})
"""What the server has to know before the guest goes on, if it sets event flags itself."""


class AttachedPorts:
    """Sends hypercalls to the server; a :class:`vmbus.synic.model.SynicPorts`.

    Args:
        attachment: The server.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """See :meth:`vmbus.synic.model.SynicPorts.post_message`. Connection ids have 24 bits."""
        connection_id &= CONNECTION_ID_LIMIT - 1
        return HvStatus(self._attachment.post_message(connection_id, message_type, vp, payload))

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """See :meth:`vmbus.synic.model.SynicPorts.signal_event`."""
        connection_id &= CONNECTION_ID_LIMIT - 1
        return HvStatus(self._attachment.signal_event(connection_id, flag))


class AttachedSynic:
    """A SynIC model in its VMM, in front of a server.

    Args:
        model: The SynIC, of which the guest's pages and registers are the VMM's.
    """

    def __init__(self, model: Synic) -> None:
        self.model = model
        self.queue = MessageQueue(model)
        """Messages of the server that wait for their slot."""
        self._told: Attachment | None = None

    def attach(self, attachment: Attachment) -> None:
        """Let the guest reach the server, and tell the server of registers. Cannot block.

        With :attr:`Feature.DIRECT` the server has to have its eventfds by now.
        """
        self._told = attachment if Feature.DIRECT in attachment.features else None
        self.model.ports = AttachedPorts(attachment)

    def detach(self) -> None:
        """Tell the server nothing any more. Idempotent. Cannot block."""
        self._told = None

    def deliver(self, vp: int, sint: int, message_type: int, payload: bytes, done: Done) -> None:
        """See :meth:`vmbus.attach.client.Delegate.deliver_message`."""

        def delivered(outcome: Delivery) -> None:
            done(0 if outcome is Delivery.DELIVERED else errno.ENXIO)

        if not done.pending:
            return
        try:
            self.queue.put(vp, sint, message_type, payload, delivered)
        except BudgetError:
            done(errno.ENOBUFS)
        except LocalProtocolError:
            done(errno.EINVAL)

    def register_written(self, vp: int, msr: int) -> None:
        """Tell the server of a register that was written, if it has to know. Blocks."""
        if self._told is None or msr not in SHARED_REGISTERS:
            return
        read = self.model.read_msr
        # If the server is gone, the delegate's ``closed`` says so.
        with contextlib.suppress(AttachError):
            self._told.synic_state(
                vp,
                read(vp, Msr.SCONTROL),
                read(vp, Msr.SIMP),
                read(vp, Msr.SIEFP),
                read(vp, Msr.SINT2),
            )
