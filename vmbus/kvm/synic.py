"""What the two kinds of SynIC have in common: the model, the queue, and how the server uses them.

Both keep a :class:`vmbus.synic.Synic`. In user mode it *is* the guest's SynIC. In kernel mode the
registers that count are KVM's, and the model follows them: every write that changes where messages
and flags go comes by here before the guest goes on.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping, Sequence

from vmbus.attach.client import Attachment, Done
from vmbus.attach.client.synic import AttachedSynic
from vmbus.attach.protocol.limits import Feature
from vmbus.errors import GuestProtocolError
from vmbus.kvm.vcpu import Vcpu
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory
from vmbus.synic import Features, Synic
from vmbus.wire import synic as wire

_log = logging.getLogger("vmbus.kvm")

Leaves = Mapping[int, tuple[int, int, int, int]]
CrashCallback = Callable[[str], None]
"""Takes the text with which the guest reports its crash."""

MAX_CRASH_TEXT = 1 << 16
"""Bytes of the guest's last words that are shown. Linux sends one page."""


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
        self.attached = AttachedSynic(self.model)
        """The model's dealings with the server."""
        self._crashed = crashed
        self.model.crashed = self._on_crash

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
        self.attached.attach(attachment)

    @abc.abstractmethod
    def close(self) -> None:
        """Give up descriptors; the processors must have stopped. Idempotent."""

    # ------------------------------------------------------------------------ for the attachment

    @abc.abstractmethod
    def interrupt(self, vp: int, vector: int) -> None:
        """Interrupt a processor for a SINT with this vector. Any thread; cannot block."""

    @abc.abstractmethod
    def deliver(self, vp: int, sint: int, message_type: int, payload: bytes, done: Done) -> None:
        """See :meth:`vmbus.attach.client.Delegate.deliver_message`."""

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.set_flag`."""
        self.model.set_flag(vp, sint, flag)

    @abc.abstractmethod
    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.event_port_added`. Raises OSError."""

    @abc.abstractmethod
    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """See :meth:`vmbus.attach.client.Delegate.event_port_removed`. Raises OSError."""

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
