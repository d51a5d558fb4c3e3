"""What all logical units have in common: admission, dispatch, abort and the commands of SPC-4.

Order of the checks (SAM-5 5.3.3 and 5.14): an operation code that does not exist and a
reservation conflict are reported first and leave unit attentions alone; then the oldest unit
attention; then everything wrong with the CDB.

A guest that comes gets no unit attention for power on: it finds its disks in a defined state, and
small boot firmware takes the first CHECK CONDITION for a broken disk. A unit that comes while the
guest is there has one.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable
from functools import partial
from typing import Any, Final

import trio

from storvsp.disk import DiskError, MediumError
from storvsp.scsi import cdb as op, sense
from storvsp.scsi.attention import Attentions
from storvsp.scsi.gate import Gate
from storvsp.scsi.inquiry import (
    PAGE_SUPPORTED,
    Identity,
    standard_data,
    supported_pages,
    vital_page,
)
from storvsp.scsi.modes import ModePages
from storvsp.scsi.pace import Turn, may_act
from storvsp.scsi.running import Running
from storvsp.scsi.sense import (
    CheckCondition,
    ReservationConflict,
    Sense,
    invalid_cdb_field,
    invalid_opcode,
    parameter_list_length_error,
)
from storvsp.scsi.table import (
    Access,
    Spec,
    Table,
    check_shape_untrusted,
    find_untrusted,
    report_supported_opcodes_untrusted,
    usage,
    where,
)
from storvsp.scsi.target import report_luns_untrusted
from storvsp.scsi.unit import (
    GOOD,
    RESERVATION_CONFLICT,
    TASK_ABORTED,
    Command,
    LogicalUnit,
    Outcome,
    check_condition,
    fill,
    take,
)
from vmbus.errors import ConfigError
from vmbus.log_budget import LogBudget

logger = logging.getLogger(__name__)

MAX_MODE_LIST: Final = 1024
"""Bytes of a MODE SELECT parameter list: many times those of all pages that there are. A list has
room for the same page 5000 times."""


class DispatchUnit(LogicalUnit):
    """A logical unit whose commands are in a table.

    Args:
        luns: Returns the LUNs of the target this unit is part of, for REPORT LUNS.
        modes: The unit's mode pages.
    """

    paced = True
    table: Table
    """The commands."""
    replaced: tuple[int, ...] = (sense.INQUIRY_DATA_HAS_CHANGED, sense.CAPACITY_DATA_HAS_CHANGED)
    """ASC << 8 | ASCQ of what a guest is told that knows another unit at this address. FreeBSD
    probes it anew after the first one; Linux tells udev, and reads its pages and its capacity again
    after the second one (linux/drivers/scsi/storvsc_drv.c: storvsc_handle_error)."""

    def __init__(self, luns: Callable[[], Iterable[int]], modes: ModePages) -> None:
        self.luns = luns
        self.modes = modes
        self.attentions = Attentions()
        self.gate = Gate(self.refresh)
        self._running = Running()
        self._closed = False
        self._budgets: dict[int, LogBudget] = {}

    # What the kinds of units differ in.

    @abc.abstractmethod
    def identity(self) -> Identity:
        """Return who the unit is."""

    @abc.abstractmethod
    def vital_pages(self) -> dict[int, bytes]:
        """Return the bodies of the VPD pages, except page 00."""

    @abc.abstractmethod
    def not_ready(self) -> Sense | None:
        """Return why the medium cannot be used, or None if it can."""

    @abc.abstractmethod
    def mode_header(self, *, wide: bool) -> tuple[int, bytes]:
        """Return DEVICE-SPECIFIC PARAMETER and the block descriptor of MODE SENSE.

        Args:
            wide: Whether a 16-byte block descriptor is accepted (LLBAA).
        """

    @property
    @abc.abstractmethod
    def sector_size(self) -> int:
        """Bytes per logical block."""

    def refresh(self) -> None:
        """Recompute what a fast path may rely on. Called after every change of state."""

    def conflicts(self, initiator: Hashable, access: Access, cdb: bytes) -> bool:
        """Whether a reservation of somebody else is in the way of a command."""
        return False

    # Execution.

    def try_execute(self, command: Command) -> Outcome | None:
        """Run a command that needs no waiting; see :meth:`LogicalUnit.try_execute`."""
        spec: Spec | None = None
        try:
            spec = self._admit(command)
            if spec.quick is None or (
                spec.slow is not None and self.gate.closed and self.gate.bars(where(spec, command))
            ):
                return None
            return spec.quick(self, command)
        except Exception as error:
            return self.failed(command, error, writing=_writes(spec))

    async def execute(self, command: Command) -> Outcome:
        """Run any command; see :meth:`LogicalUnit.execute`."""
        if self._closed:  # the command came in time, but its task begins only now
            return TASK_ABORTED
        spec: Spec | None = None
        try:
            spec = self._admit(command)
            if spec.slow is None:
                assert spec.quick is not None
                outcome = spec.quick(self, command)
                assert outcome is not None
                return outcome
            work = partial(spec.slow, self, command)
            if not spec.gated:
                return await work()
            return await self.in_turn(
                command, work, exclusive=spec.exclusive, where=where(spec, command)
            )
        except Exception as error:
            return self.failed(command, error, writing=_writes(spec))

    async def in_turn(
        self,
        command: Command,
        work: Callable[[], Awaitable[Outcome]],
        *,
        exclusive: bool,
        where: int,
    ) -> Outcome:
        """Let a command that waits for the disk do so, unless it is aborted. A checkpoint.

        Args:
            command: Which.
            work: Does it.
            exclusive: Alone, or beside others.
            where: In these sections of the medium.
        """
        with trio.CancelScope() as scope:
            self._running.begin(scope, command)
            try:
                async with Turn(
                    self.gate, exclusive=exclusive, initiator=command.initiator, where=where
                ):
                    await may_act()
                    return await work()
            finally:
                self._running.end(scope)
        return TASK_ABORTED

    def _admit(self, command: Command) -> Spec:
        """Find a command's entry, or raise why it must not run now."""
        cdb = command.cdb
        initiator = command.initiator
        if self.attentions.know(initiator):
            self.refresh()
        if not cdb:
            raise invalid_cdb_field(0)
        spec: Spec | None = None
        problem: CheckCondition | None = None
        try:
            spec = find_untrusted(self.table, cdb)
            if spec is None:
                problem = invalid_opcode()
        except CheckCondition as error:
            problem = error
        if spec is not None and self.conflicts(initiator, spec.access, cdb):
            raise ReservationConflict(f"opcode {cdb[0]:02x}h conflicts with a reservation")
        if spec is None or spec.polite:
            code = self.attentions.pop(initiator)
            if code is not None:
                self.refresh()
                raise CheckCondition(Sense(sense.UNIT_ATTENTION, code))
        if problem is not None:
            raise problem
        assert spec is not None
        check_shape_untrusted(spec, cdb)
        return spec

    def failed(self, command: Command, error: Exception, *, writing: bool) -> Outcome:
        """Turn what a command raised into its outcome.

        Args:
            command: The command.
            error: What it raised.
            writing: True if the command was changing the medium.
        """
        if isinstance(error, CheckCondition):
            return check_condition(error.sense)
        if isinstance(error, ReservationConflict):
            return RESERVATION_CONFLICT
        if isinstance(error, trio.EndOfChannel):  # nobody waits for it any more
            return TASK_ABORTED
        self.errors += 1
        match error:
            case DiskError():
                self._report(logging.INFO, f"{command!r}: {error}", None)
                cause = error
            case OSError():
                self._report(logging.ERROR, f"{command!r}: the disk let an OSError escape", error)
                cause = MediumError(str(error))
            case _:
                self._report(logging.ERROR, f"{command!r}: internal error", error)
                return check_condition(Sense(sense.HARDWARE_ERROR, sense.INTERNAL_TARGET_FAILURE))
        return check_condition(
            sense.from_disk_error(cause, sector_size=self.sector_size, writing=writing)
        )

    def _report(self, level: int, text: str, error: Exception | None) -> None:
        """Log what has become of a command, within a budget: a guest can repeat it for ever."""
        if logger.isEnabledFor(level):
            budget = self._budgets.get(level)
            if budget is None:
                budget = self._budgets[level] = LogBudget()
            if budget.spend():
                logger.log(level, "%s: %s%s", self.name, text, budget.left_out(), exc_info=error)

    def abort(self, initiator: Hashable | None = None) -> None:
        """End the commands that wait for the disk with TASK ABORTED. Cannot block.

        Args:
            initiator: Whose commands; None for everybody's. A command whose work cannot be
                interrupted any more ends with its own outcome.
        """
        if initiator is None:
            self.aborts += 1
        self._running.abort(initiator)

    @property
    def busy(self) -> bool:
        """Whether any command is in progress; see :attr:`LogicalUnit.busy`."""
        return bool(self._running)

    @property
    def under_way(self) -> list[str]:
        """What is in progress; see :attr:`LogicalUnit.under_way`."""
        return self._running.names

    async def ended(self, initiator: Hashable | None = None) -> None:
        """Wait until what is in progress has ended; see :meth:`LogicalUnit.ended`.

        Args:
            initiator: Whose commands; None for everybody's.
        """
        await self._running.ended(initiator)

    def reset(self) -> None:
        """Do a logical unit reset; see :meth:`LogicalUnit.reset`."""
        self.abort()
        self.modes.reset()
        self.raise_attention(sense.DEVICE_RESET)

    def detach(self, initiator: Hashable) -> None:
        """Forget an initiator that is gone; see :meth:`LogicalUnit.detach`."""
        self.attentions.forget(initiator)
        self.refresh()

    def raise_attention(self, code: int, *, but: Hashable | None = None) -> None:
        """Queue a unit attention for every known initiator; see the base class."""
        self.attentions.add_all(code, but=but)
        self.refresh()

    def introduce(self, initiator: Hashable, *, replaces: type[LogicalUnit] | None) -> None:
        """Raise what news there is; see :meth:`LogicalUnit.introduce`."""
        codes: tuple[int, ...] = (sense.POWER_ON_OR_RESET,)
        if replaces is not None:
            codes = self.replaced
            if replaces is not type(self):  # another device type
                codes = (sense.INQUIRY_DATA_HAS_CHANGED, *codes)
        self.attentions.know(initiator)
        for code in codes:  # each at most once
            self.attentions.add(initiator, code)
        self.refresh()

    def save(self) -> dict[str, Any]:
        """Return the mode parameters; see :meth:`LogicalUnit.save`."""
        return {"modes": self.modes.save()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take mode parameters over; see :meth:`LogicalUnit.restore`."""
        modes = state.get("modes")
        if not isinstance(modes, dict):
            raise ConfigError("saved state: no mode pages")
        self.modes.restore(modes)
        self.refresh()

    def close(self) -> None:
        """Abort what is in progress; see :meth:`LogicalUnit.close`."""
        self._closed = True
        self.abort()


def _writes(spec: Spec | None) -> bool:
    return spec is not None and spec.access is Access.WRITE


# The commands every unit has.


def unit_ready(unit: DispatchUnit, _command: Command) -> Outcome:
    """TEST UNIT READY, SPC-4 6.47."""
    reason = unit.not_ready()
    if reason is not None:
        raise CheckCondition(reason)
    return GOOD


def request_sense(unit: DispatchUnit, command: Command) -> Outcome:
    """REQUEST SENSE, SPC-4 6.39: the oldest unit attention, else why the unit is not ready."""
    code = unit.attentions.pop(command.initiator)
    if code is None:
        data = unit.not_ready() or Sense(sense.NO_SENSE, sense.NO_ADDITIONAL_SENSE)
    else:
        data = Sense(sense.UNIT_ATTENTION, code)
        unit.refresh()
    payload = data.descriptors() if command.cdb[1] & 0x01 else data.fixed()
    return fill(command, payload, command.cdb[4])


def inquiry(unit: DispatchUnit, command: Command) -> Outcome:
    """INQUIRY, SPC-4 6.4."""
    cdb = command.cdb
    identity = unit.identity()
    size = int.from_bytes(cdb[3:5], "big")
    if cdb[1] & 0x02:  # CMDDT, obsolete
        raise invalid_cdb_field(1, 1)
    if not cdb[1] & 0x01:
        if cdb[2]:
            raise invalid_cdb_field(2)
        return fill(command, standard_data(identity), size)
    pages = unit.vital_pages()
    body = supported_pages(pages) if cdb[2] == PAGE_SUPPORTED else pages.get(cdb[2])
    if body is None:
        raise invalid_cdb_field(2)
    return fill(command, vital_page(identity.device_type, cdb[2], body), size)


def report_luns(unit: DispatchUnit, command: Command) -> Outcome:
    """REPORT LUNS, SPC-4 6.33; learning the list settles the attention that it has changed."""
    outcome = report_luns_untrusted(unit.luns(), command)
    unit.attentions.clear(command.initiator, sense.REPORTED_LUNS_DATA_HAS_CHANGED)
    unit.refresh()
    return outcome


def mode_sense(unit: DispatchUnit, command: Command) -> Outcome:
    """MODE SENSE(6) and (10), SPC-4 6.13 and 6.14."""
    cdb = command.cdb
    long = cdb[0] == op.MODE_SENSE_10
    specific, descriptor = unit.mode_header(wide=long and bool(cdb[1] & 0x10))
    payload = unit.modes.sense_untrusted(cdb, specific=specific, descriptor=descriptor)
    return fill(command, payload, int.from_bytes(cdb[7:9], "big") if long else cdb[4])


def mode_select(unit: DispatchUnit, command: Command) -> Outcome:
    """MODE SELECT(6) and (10), SPC-4 6.11 and 6.12; changes are announced to other initiators."""
    cdb = command.cdb
    long = cdb[0] == op.MODE_SELECT_10
    size = int.from_bytes(cdb[7:9], "big") if long else cdb[4]
    if cdb[1] & 0x01:  # SP: nothing can be saved
        raise invalid_cdb_field(1, 0)
    if not size:
        return GOOD
    if not cdb[1] & 0x10:  # PF: vendor-specific pages
        raise invalid_cdb_field(1, 4)
    if size > MAX_MODE_LIST:
        raise parameter_list_length_error()
    parameters = take(command, size)
    if unit.modes.select_untrusted(parameters, long=long, sector_size=unit.sector_size):
        unit.raise_attention(sense.MODE_PARAMETERS_CHANGED, but=command.initiator)
    return Outcome(GOOD.status, b"", size)


def log_sense(_unit: DispatchUnit, command: Command) -> Outcome:
    """LOG SENSE, SPC-4 6.6: page 00, which lists itself, is the only one."""
    cdb = command.cdb
    if cdb[1] & 0x01:  # SP
        raise invalid_cdb_field(1, 0)
    if cdb[2] & 0x3F:
        raise invalid_cdb_field(2, 5)
    if cdb[3]:
        raise invalid_cdb_field(3)
    return fill(command, bytes((0, 0, 0, 1, 0)), int.from_bytes(cdb[7:9], "big"))


def send_diagnostic(_unit: DispatchUnit, command: Command) -> Outcome:
    """SEND DIAGNOSTIC, SPC-4 6.42: the default self-test passes; there is nothing else."""
    cdb = command.cdb
    if cdb[1] & 0xE0:
        raise invalid_cdb_field(1, 7)
    if cdb[3] or cdb[4]:
        raise invalid_cdb_field(3)
    return GOOD


def report_operation_codes(unit: DispatchUnit, command: Command) -> Outcome:
    """REPORT SUPPORTED OPERATION CODES, SPC-4 6.34."""
    payload = report_supported_opcodes_untrusted(unit.table, command.cdb)
    return fill(command, payload, int.from_bytes(command.cdb[6:10], "big"))


def report_task_management(_unit: DispatchUnit, command: Command) -> Outcome:
    """REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS, SPC-4 6.35: logical unit reset only."""
    payload = bytes((0x08, 0, 0, 0))
    if command.cdb[2] & 0x80:  # REPD
        payload = bytes((0x08, 0, 0, 0x0C)) + bytes(12)
    return fill(command, payload, int.from_bytes(command.cdb[6:10], "big"))


COMMON = (
    Spec(op.TEST_UNIT_READY, usage("00 00 00 00 00 04"), Access.STATUS, unit_ready),
    Spec(op.REQUEST_SENSE, usage("03 01 00 00 ff 04"), Access.FREE, request_sense, polite=False),
    Spec(op.INQUIRY, usage("12 03 ff ffff 04"), Access.FREE, inquiry, polite=False),
    Spec(op.MODE_SELECT_6, usage("15 11 00 00 ff 04"), Access.WRITE, mode_select),
    Spec(op.MODE_SENSE_6, usage("1a 08 ff ff ff 04"), Access.READ, mode_sense),
    Spec(op.SEND_DIAGNOSTIC, usage("1d e4 00 ffff 04"), Access.WRITE, send_diagnostic),
    Spec(op.LOG_SENSE, usage("4d 01 ff ff 00 0000 ffff 04"), Access.FREE, log_sense),
    Spec(op.MODE_SELECT_10, usage("55 11 00 00 00 00 00 ffff 04"), Access.WRITE, mode_select),
    Spec(op.MODE_SENSE_10, usage("5a 18 ff ff 00 00 00 ffff 04"), Access.READ, mode_sense),
    Spec(
        op.REPORT_LUNS,
        usage("a0 00 ff 000000 ffffffff 00 04"),
        Access.FREE,
        report_luns,
        polite=False,
        least=10,  # the allocation length ends there; a driver of OpenVMM's sends no more
    ),
    Spec(
        op.MAINTENANCE_IN,
        usage("a3 1f 87 ff ffff ffffffff 00 04"),
        Access.READ,
        report_operation_codes,
        service_action=op.SA_REPORT_SUPPORTED_OPERATION_CODES,
    ),
    Spec(
        op.MAINTENANCE_IN,
        usage("a3 1f 80 00 0000 ffffffff 00 04"),
        Access.READ,
        report_task_management,
        service_action=op.SA_REPORT_SUPPORTED_TASK_MANAGEMENT,
    ),
)
"""Commands of SPC-4 that disks and CD-ROM drives share."""
