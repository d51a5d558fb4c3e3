"""Logical units: what the controller sees of the SCSI layer.

The controller hands over a :class:`Command` and gets back exactly one :class:`Outcome`. It first
calls :meth:`LogicalUnit.try_execute`, which runs on the channel's task and answers everything that
needs no waiting; if that returns None, it awaits :meth:`LogicalUnit.execute` in a task of its own.

Transfer rules
--------------
* Nothing is ever moved beyond ``Command.length``, nor beyond the length the CDB names;
  ``Outcome.transferred`` is the number of bytes really moved, the rest is residual.
* Parameter data that does not fit is cut off, with GOOD status (SPC-4 4.2.5.6). A command without
  a data buffer (direction NONE or length 0) gets none of it.
* A READ whose buffer is smaller than its range fills the buffer. Commands that take data from the
  guest are refused if the guest brings less than they need: nothing is half written.
* A buffer that points the wrong way is refused with ILLEGAL REQUEST 24/00.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from storvsp.scsi.sense import Sense, invalid_cdb_field, parameter_list_length_error
from vmbus.errors import ConfigError
from vmbus.memory import Cutter, window

# Status codes, SAM-5 table 41.
STATUS_GOOD: Final = 0x00
STATUS_CHECK_CONDITION: Final = 0x02
STATUS_BUSY: Final = 0x08
STATUS_RESERVATION_CONFLICT: Final = 0x18
STATUS_TASK_ABORTED: Final = 0x40


class DataDirection(enum.IntEnum):
    """Which way the data buffer goes; the values of ``data_in`` in the vstor SRB."""

    WRITE = 0
    READ = 1
    NONE = 2


class Command:
    """One SCSI command.

    Args:
        cdb: A private copy of the CDB, at most 16 bytes.
        data: The guest's pages, borrowed until the command has its outcome: ``length`` bytes in
            total.
        length: Bytes of the data buffer.
        direction: Which way the data goes.
        initiator: Who sent it. The same value for all channels of one guest; reservations and
            unit attentions are kept per initiator.

    Attributes:
        plan: What :meth:`LogicalUnit.try_execute` has found out and :meth:`LogicalUnit.execute`
            need not find out again; the unit's own business.
    """

    __slots__ = ("cdb", "data", "direction", "initiator", "length", "plan")

    def __init__(
        self,
        cdb: bytes,
        data: list[memoryview],
        length: int,
        direction: DataDirection,
        initiator: Hashable,
    ) -> None:
        self.cdb = cdb
        self.data = data
        self.length = length
        self.direction = direction
        self.initiator = initiator
        self.plan: tuple[int, int, bool] | None = None

    def __repr__(self) -> str:
        return (
            f"<Command {self.cdb.hex(' ')} {self.direction.name} {self.length} B"
            f" from {self.initiator!r}>"
        )


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    """SCSI status."""
    sense: bytes
    """Fixed-format sense data with CHECK CONDITION, else empty; never more than 20 bytes."""
    transferred: int
    """Bytes moved to or from the data buffer."""


GOOD: Final = Outcome(STATUS_GOOD, b"", 0)
RESERVATION_CONFLICT: Final = Outcome(STATUS_RESERVATION_CONFLICT, b"", 0)
TASK_ABORTED: Final = Outcome(STATUS_TASK_ABORTED, b"", 0)


def check_condition(sense: Sense) -> Outcome:
    """Return the outcome of a command that failed with ``sense``."""
    return Outcome(STATUS_CHECK_CONDITION, sense.fixed(), 0)


@functools.cache
def good_outcomes(sector_size: int) -> tuple[Outcome, ...]:
    """Return ready-made GOOD outcomes for transfers of 0 to 1024 sectors.

    Making a named tuple costs a third of a cached read; the table is shared by all units.
    """
    return tuple(Outcome(STATUS_GOOD, b"", count * sector_size) for count in range(1025))


class LogicalUnit(abc.ABC):
    """A SCSI logical unit. One instance may serve several initiators at once."""

    aborts = 0
    """How often all commands were aborted, by a reset or because another medium was put in. One
    that came in before that must not begin after it."""

    paced = False
    """Whether its commands look at their pace by themselves (:mod:`storvsp.scsi.pace`). If not, a
    pause waits for each of them."""
    name = ""
    """What operators call it: where it is, and what is behind it."""

    why_fixed = "no disk"
    """What it is, for operators, if there is no back-end here that could become another size."""

    # What operators see of it; kept by who executes its commands.
    commands = 0
    """Commands that have ended, whatever their outcome."""
    bytes_read = 0
    """Bytes that they have moved to guests."""
    bytes_written = 0
    """Bytes that they have taken from guests."""
    errors = 0
    """Commands that failed because of what is behind the unit, not of what the guest has asked."""

    @abc.abstractmethod
    def try_execute(self, command: Command) -> Outcome | None:
        """Run a command that needs no waiting. Cannot block.

        Returns:
            The outcome, or None if :meth:`execute` has to be awaited instead; the command has had
            no effect then.
        """

    @abc.abstractmethod
    async def execute(self, command: Command) -> Outcome:
        """Run any command. A checkpoint if it has to wait for the disk.

        Raises nothing but trio's ``Cancelled``: every failure is an outcome.
        """

    @abc.abstractmethod
    def reset(self) -> None:
        """Do a logical unit reset (SAM-5 6.3.3). Cannot block.

        Commands in progress end with TASK ABORTED, volatile state goes back to its defaults and
        every initiator is told by a unit attention. What cannot be interrupted any more may still
        move data: a reset is over when :meth:`ended` returns.
        """

    @property
    @abc.abstractmethod
    def busy(self) -> bool:
        """Whether any command is in progress."""

    @property
    def under_way(self) -> list[str]:
        """What the commands in progress are, for people; by default nothing is known of them."""
        return []

    @abc.abstractmethod
    async def ended(self) -> None:
        """Wait until all commands that are in progress now have ended. A checkpoint if any is."""

    @abc.abstractmethod
    def detach(self, initiator: Hashable) -> None:
        """Forget an initiator that is gone (I_T nexus loss). Cannot block.

        Its RESERVE reservation, medium locks and unit attentions go; persistent registrations
        stay, as SPC-4 5.12.1 wants it.
        """

    @abc.abstractmethod
    def raise_attention(self, code: int, *, but: Hashable | None = None) -> None:
        """Queue a unit attention for every known initiator. Cannot block.

        Args:
            code: ASC << 8 | ASCQ, for example ``sense.REPORTED_LUNS_DATA_HAS_CHANGED``.
            but: An initiator that needs no telling.
        """

    def introduce(self, initiator: Hashable, *, replaces: type[LogicalUnit] | None) -> None:
        """Tell an initiator, by unit attentions, that this unit has come while it was there.

        Cannot block.

        Args:
            initiator: Who would take the unit for the one that it knows.
            replaces: What kind of unit had the same address before; None if there was none.
        """
        del initiator, replaces

    def describe(self) -> dict[str, Any]:
        """Return what people should know of it beyond its disk, as JSON types. Cannot block."""
        return {}

    def save(self) -> dict[str, Any]:
        """Return what a guest has set and expects to find, as JSON types. Cannot block."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`save` has returned. Raises ConfigError. Cannot block."""
        if state:
            raise ConfigError("saved state: this unit keeps none")

    @abc.abstractmethod
    def close(self) -> None:
        """Abort what is in progress and let go of the disk. Idempotent; cannot block.

        A command whose :meth:`execute` begins later ends with TASK ABORTED, too. The disk itself
        belongs to its maker and stays open.
        """


def fill(command: Command, payload: bytes, allocation: int) -> Outcome:
    """Give parameter data to the guest.

    Args:
        command: Whose buffer to fill.
        payload: All there is to say; what does not fit is cut off.
        allocation: ALLOCATION LENGTH of the CDB, bytes.

    Raises:
        CheckCondition: There is data to send but the buffer points the other way.
    """
    size = min(len(payload), allocation, command.length)
    if not size or command.direction == DataDirection.NONE:
        return GOOD
    if command.direction != DataDirection.READ:
        raise invalid_cdb_field(0)
    done = 0
    for view in window(command.data, 0, size):
        view[:] = payload[done : done + len(view)]
        done += len(view)
    return Outcome(STATUS_GOOD, b"", done)


def take(command: Command, length: int, start: int = 0) -> bytes:
    """Copy data from the guest, once.

    Args:
        command: Whose buffer to read.
        length: Bytes wanted, at least one.
        start: Byte offset in the buffer.

    Raises:
        CheckCondition: The buffer points the other way or is shorter.
    """
    if command.direction != DataDirection.WRITE:
        raise invalid_cdb_field(0)
    copy = b"".join(window(command.data, start, min(length, command.length - start)))
    if len(copy) < length:
        raise parameter_list_length_error()
    return copy


def data_in_untrusted(command: Command, size: int, sector: int, byte: int) -> Sequence[memoryview]:
    """Return buffers for ``size`` bytes from the medium.

    If the guest's buffer is smaller, it is followed by private memory up to the next sector
    boundary; what lies beyond is not read at all.

    Args:
        command: Whose buffer to use.
        size: Bytes the CDB asks for.
        sector: Bytes per logical block.
        byte: Index of the length field, for the field pointer.

    Raises:
        CheckCondition: There is no buffer for data from the device.
    """
    if not size:
        return ()
    if command.direction != DataDirection.READ or not command.length:
        raise invalid_cdb_field(byte)
    if command.length == size:
        return command.data
    if command.length > size:
        return window(command.data, 0, size)
    spare = -command.length % sector
    return [*command.data, memoryview(bytearray(spare))] if spare else command.data


STEP: Final = 2 << 20
"""Bytes moved without letting other tasks run, and by one call of a worker thread: as much as a
guest may ask for at once by default. What one call takes, a neighbour waits."""


def split(buffers: Sequence[memoryview], limit: int) -> Iterable[tuple[int, Sequence[memoryview]]]:
    """Cut a scatter list into parts of at most ``limit`` bytes, each with its byte offset.

    They are cut when they are asked for, in order.
    """
    size = sum(map(len, buffers))
    if size <= limit:
        return ((0, buffers),)
    cutter = Cutter(buffers)
    return ((at, cutter.take(limit)) for at in range(0, size, limit))
