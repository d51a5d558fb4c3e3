"""What the two kinds of SynIC have in common: the model, the queue, and how the server uses them.

Both keep a :class:`vmbus.synic.Synic`. In user mode it *is* the guest's SynIC. In kernel mode the
registers that count are KVM's, and the model follows them: every write that changes where messages
and flags go comes by here before the guest goes on.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vmbus.attach.client import Attachment
from vmbus.attach.delegate import Done
from vmbus.attach.limits import Feature
from vmbus.errors import AttachError, BudgetError, GuestProtocolError, LocalProtocolError
from vmbus.kvm.vcpu import Vcpu
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory
from vmbus.synic import Delivery, Features, Synic
from vmbus.synic_queue import MessageQueue
from vmbus.wire import synic as wire
from vmbus.wire.synic import HvStatus, Msr

_log = logging.getLogger("vmbus.kvm")

Leaves = Mapping[int, tuple[int, int, int, int]]
CrashCallback = Callable[[str], None]
"""Takes the text with which the guest reports its crash."""

SHARED_REGISTERS = frozenset({Msr.SCONTROL, Msr.SIMP, Msr.SIEFP, Msr.SINT2})
"""What the server has to know before the guest goes on, if it sets event flags itself."""
MAX_CRASH_TEXT = 1 << 16
"""Bytes of the guest's last words that are shown. Linux sends one page."""


class Ports(Protocol):
    """Where hypercalls go; see :class:`vmbus.synic.SynicPorts`."""

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """Take a message."""

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """Take a doorbell."""


class AttachedPorts:
    """Sends hypercalls to the server.

    Args:
        attachment: The server.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """See :meth:`vmbus.synic.SynicPorts.post_message`. Connection ids have 24 bits."""
        connection_id &= wire.CONNECTION_ID_LIMIT - 1
        return HvStatus(self._attachment.post_message(connection_id, message_type, vp, payload))

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """See :meth:`vmbus.synic.SynicPorts.signal_event`."""
        connection_id &= wire.CONNECTION_ID_LIMIT - 1
        return HvStatus(self._attachment.signal_event(connection_id, flag))


class SynicBackend(abc.ABC):
    """The SynICs of one VM.

    Args:
        vm: With interrupt controllers, without processors.
        memory: The guest's.
        vp_count: Processors.
        features: Which optional MSRs the model has.
        hypercall_code: Instructions at the start of the hypercall page, if it is the model's.
        crashed: Told when the guest reports its crash.
    """

    name: str
    """For logs."""

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        vp_count: int,
        *,
        features: Features,
        hypercall_code: bytes,
        crashed: CrashCallback,
    ) -> None:
        self.vm = vm
        self.memory = memory
        self.vp_count = vp_count
        self.model = Synic(
            memory, vp_count, self.interrupt, features=features, hypercall_code=hypercall_code
        )
        self.queue = MessageQueue(self.model)
        self._crashed = crashed
        self.model.crashed = self._on_crash
        self._attachment: Attachment | None = None

    # ------------------------------------------------------------------------------ being set up

    @abc.abstractmethod
    def leaves(self) -> Leaves:
        """Return the hypervisor's CPUID leaves."""

    @abc.abstractmethod
    def add_processors(self, vcpus: Sequence[Vcpu]) -> None:
        """Take the processors, all of them, with CPUID set."""

    @abc.abstractmethod
    def sint_eventfd(self, vp: int) -> int:
        """Return the eventfd that raises SINT 2 of a processor; owned here."""

    def attach(self, attachment: Attachment) -> None:
        """Let the guest reach the server, and the server interrupt the guest. Blocks.

        Raises:
            AttachError: The server is gone, or did not want the eventfds.
        """
        if Feature.DIRECT in attachment.features:
            for vp in range(self.vp_count):
                attachment.set_sint_fd(vp, self.sint_eventfd(vp))
            self._attachment = attachment
        self.model.ports = AttachedPorts(attachment)

    @abc.abstractmethod
    def close(self) -> None:
        """Give up descriptors; the processors must have stopped. Idempotent."""

    # ------------------------------------------------------------------------ for the attachment

    @abc.abstractmethod
    def interrupt(self, vp: int, vector: int) -> None:
        """Interrupt a processor for a SINT with this vector. Any thread; cannot block."""

    @abc.abstractmethod
    def deliver(self, vp: int, sint: int, message_type: int, payload: bytes, done: Done) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.deliver_message`."""

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.set_flag`."""
        self.model.set_flag(vp, sint, flag)

    @abc.abstractmethod
    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.event_port_added`. Raises OSError."""

    @abc.abstractmethod
    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """See :meth:`vmbus.attach.delegate.Delegate.event_port_removed`. Raises OSError."""

    def _put(self, vp: int, sint: int, message_type: int, payload: bytes, done: Done) -> None:
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

    # -------------------------------------------------------------- in the processors' own threads

    @abc.abstractmethod
    def read_msr(self, vcpu: Vcpu, index: int) -> int:
        """See :meth:`vmbus.kvm.vcpu.Platform.read_msr`."""

    @abc.abstractmethod
    def write_msr(self, vcpu: Vcpu, index: int, value: int) -> None:
        """See :meth:`vmbus.kvm.vcpu.Platform.write_msr`."""

    @abc.abstractmethod
    def synic_written(self, vcpu: Vcpu, msr: int, control: int, siefp: int, simp: int) -> None:
        """See :meth:`vmbus.kvm.vcpu.Platform.synic_written`."""

    def hypercall(self, vcpu: Vcpu, control: int, first: int, second: int) -> int:
        """See :meth:`vmbus.kvm.vcpu.Platform.hypercall`."""
        return self.model.hypercall(vcpu.index, control, first, second)

    def tell(self, vp: int, msr: int) -> None:
        """Tell the server of a register that was written, if it has to know. Blocks."""
        if self._attachment is None or msr not in SHARED_REGISTERS:
            return
        read = self.model.read_msr
        # If the server is gone, the delegate's ``closed`` says so.
        with contextlib.suppress(AttachError):
            self._attachment.synic_state(
                vp,
                read(vp, Msr.SCONTROL),
                read(vp, Msr.SIMP),
                read(vp, Msr.SIEFP),
                read(vp, Msr.SINT2),
            )

    def _on_crash(self, vp: int, parameters: tuple[int, ...], control: int) -> None:
        self._crashed(crash_text_untrusted(self.memory, parameters, control))


def crash_text_untrusted(memory: GuestMemory, parameters: Sequence[int], control: int) -> str:
    """Return what a guest has to say about its crash.

    Args:
        memory: The guest's.
        parameters: CRASH_P0 to CRASH_P4.
        control: CRASH_CTL as written.

    Returns:
        The text it left in memory if it did (linux/drivers/hv: the end of the kernel's log), else
        the five numbers, whose meaning is the guest's.
    """
    if control & wire.CRASH_CTL_MESSAGE:
        address, length = parameters[3], parameters[4]
        try:
            text = memory.read(address, min(length, MAX_CRASH_TEXT))
        except GuestProtocolError:
            _log.debug("the guest's crash text is not in its memory")
        else:
            return text.split(b"\0", 1)[0].decode(errors="replace").rstrip()
    return "crash parameters " + " ".join(f"{value:#x}" for value in parameters)
