"""What the guest needs of its machine: RAM, MSRs, hypercalls, interrupts.

A :class:`Machine` is the virtual hardware under the guest, as a processor sees it: the guest
programs its synthetic interrupt controller by MSR writes, posts messages by hypercalls built in
its own memory, and reads message slots and event flags from pages it has chosen itself. So every
habit of a real driver, down to the order of its register writes, reaches the host unchanged.

Machines are written elsewhere: over an in-process model of the SynIC, or over a ``vmbus-user``
socket. Whoever writes one owes the guest what hardware owes it: a message slot is written only
while its type is 0, and the next message is delivered on a write to EOM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol

from vmbus.errors import VMBusError


class GuestPanic(VMBusError):  # noqa: N818  # what it is called in every kernel
    """The guest has crashed itself, because the host broke a rule that real drivers rely on.

    Args:
        guest: Name of the personality.
        reason: One sentence naming the message or field and the rule.
    """

    def __init__(self, guest: str, reason: str) -> None:
        super().__init__(f"{guest}: {reason}")
        self.guest = guest
        self.reason = reason


class Panic(Protocol):
    """How parts of the guest crash it; bound to the personality's name."""

    def __call__(self, reason: str) -> NoReturn:
        """Raise :class:`GuestPanic`."""
        ...


class Region(NamedTuple):
    """A piece of RAM the guest may use as it likes."""

    gpa: int
    """Guest physical address in bytes, page aligned."""
    size: int
    """Bytes, a multiple of 4096."""


class Interrupt(NamedTuple):
    """A pending interrupt."""

    vp: int
    vector: int


class Machine(Protocol):
    """Virtual hardware of one guest."""

    @property
    def regions(self) -> Sequence[Region]:
        """RAM that belongs to this guest alone; it allocates from it as it likes."""
        ...

    @property
    def vp_count(self) -> int:
        """Virtual processors, numbered from 0; number and VP index are the same."""
        ...

    @property
    def flags_are_shared(self) -> bool:
        """Whether another process sets bits in SIEF pages, at any moment.

        Python has no atomic test-and-clear, so the guest then also looks at the rings of the
        other channels that share a word of flags with a signalled one.
        """
        ...

    def view(self, gpa: int, length: int) -> memoryview:
        """Return writable bytes of RAM (format ``"B"``) inside one region. Cannot block.

        The guest keeps views for its whole life; all views of an address show the same memory.
        Raises ValueError outside RAM.
        """
        ...

    def cpuid(self, leaf: int) -> tuple[int, int, int, int]:
        """Return EAX, EBX, ECX, EDX of a leaf (zeros for an unknown one). Cannot block."""
        ...

    def read_msr(self, vp: int, index: int) -> int:
        """Read a 64-bit MSR. Cannot block. Raises ValueError where hardware raises #GP."""
        ...

    def write_msr(self, vp: int, index: int, value: int) -> None:
        """Write a 64-bit MSR. Cannot block. Raises ValueError where hardware raises #GP.

        A write to EOM delivers the next queued message, if any, before or after it returns.
        """
        ...

    async def hypercall(self, vp: int, control: int, rdx: int, r8: int) -> int:
        """Make a hypercall: control word in, 64-bit result out (status in bits 15:0).

        ``rdx`` and ``r8`` are guest physical addresses of input and output, or the parameters
        themselves if bit 16 (fast) of ``control`` is set. The input is copied before the first
        checkpoint, if there is one: the guest reuses the page. May or may not be a checkpoint.
        """
        ...

    async def wait_interrupt(self) -> set[Interrupt]:
        """Wait for interrupts; return all that are pending and clear them.

        Like in an APIC, the same vector on the same VP is pending at most once. A checkpoint.
        Called by one task at a time.
        """
        ...
