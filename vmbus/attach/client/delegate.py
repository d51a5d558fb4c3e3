"""What a VMM implements to be served: :class:`Delegate`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

HV_STATUS_SUCCESS = 0x00
HV_STATUS_INVALID_PARAMETER = 0x05
HV_STATUS_INVALID_CONNECTION_ID = 0x12
HV_STATUS_INSUFFICIENT_BUFFERS = 0x13


class Region(NamedTuple):
    """One run of guest memory; addresses and sizes in bytes, whole pages."""

    gpa: int
    size: int
    fd: int
    """A memfd sealed with F_SEAL_SHRINK; borrowed for the call."""
    fd_offset: int = 0
    read_only: bool = False


class Deliveries(Protocol):
    """Keeps count of what was not answered yet."""

    def __contains__(self, seq: int) -> bool:
        """Whether delivery ``seq`` is unanswered."""

    def answer(self, seq: int, code: int) -> None:
        """Answer it, unless that has happened."""


class Done:
    """Answers one delivery: call it with 0 once the message is in the slot, or with an errno.

    Only the first call counts. ENXIO: the guest's SynIC is off. Thread safe, never blocks.
    """

    __slots__ = ("_deliveries", "seq")

    def __init__(self, deliveries: Deliveries, seq: int) -> None:
        self._deliveries = deliveries
        self.seq = seq

    @property
    def pending(self) -> bool:
        """Whether the server still waits; False after a reset too, then drop the message."""
        return self.seq in self._deliveries

    def __call__(self, code: int = 0) -> None:
        """Answer."""
        self._deliveries.answer(self.seq, code)


class Delegate(Protocol):
    """What a VMM does for the server. No method may block or make blocking calls."""

    def deliver_message(
        self, vp: int, sint: int, message_type: int, payload: bytes, done: Done
    ) -> None:
        """Write a message into slot ``sint`` of ``vp``, then call ``done``, now or later.

        If the slot is taken: set the slot's pending bit, look again, and retry at the guest's EOM
        or EOI. If the guest has no SIMP page or SynIC: ``done(errno.ENXIO)``.
        """

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """Set an event flag in the SIEFP page of ``vp`` and interrupt it."""

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """The server takes HvSignalEvent on this id; ``eventfd`` may be given to KVM.

        It is borrowed until :meth:`event_port_removed` returns. OSError refuses the port.
        """

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """Stop using the port's eventfd."""

    def call_fd(self, port: int, vp: int, sint: int, flag: int, fd: int | None) -> bool:
        """Tier T1: ``fd`` will be signalled when ``flag`` is to be set; None: forget ``port``.

        Returns:
            True to take over: ``fd`` is the VMM's to watch and close, replacing what ``port``
            had. False to have the attachment watch it and call :meth:`set_flag`.
        """

    def log(self, text: str) -> None:
        """The server has something to say about the guest."""

    def closed(self, reason: str) -> None:
        """The connection is over, even one that ``connect`` could not finish; called once, last.

        The attachment's ``fileno()`` is still there, to be taken out of an event loop.
        """
