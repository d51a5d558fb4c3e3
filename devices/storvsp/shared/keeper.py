"""Where a shared disk is: its one logical unit, and a line for each guest that has it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import trio

from storvsp.disk import Disk
from storvsp.scsi import CdromUnit, Command, DiskUnit, Outcome, cdb as op
from storvsp.scsi.pace import keep_pace
from storvsp.scsi.unit import TASK_ABORTED
from storvsp.shared.messages import (
    MAX_COMMANDS,
    MAX_WARNING,
    MAX_WARNINGS,
    CommandRecord,
    DoneRecord,
    Kind,
    Line,
    decode_to_keeper_untrusted,
    info_record,
    number_record,
)
from storvsp.shared.staging import Staging
from vmbus.errors import PeerProtocolError
from vmbus.host.undertakings import Undertakings
from vmbus.plugins import sharing
from vmbus.watchers import Watchers
from vmbus.workers import work_for

logger = logging.getLogger("storvsp")

_CHANGES = frozenset((op.START_STOP_UNIT, op.PREVENT_ALLOW_MEDIUM_REMOVAL))
"""What changes what people see of a drive; of a disk, what has failed does."""


class Keeper:
    """Keeps one disk for any number of guests.

    Args:
        disk: The back-end; owned.
        identity: What the unit is called if the disk has no identity of its own.
        source: What people call the disk.
        warnings: What they should know of it.
    """

    def __init__(
        self, disk: Disk, identity: bytes, *, source: str = "", warnings: Sequence[str] = ()
    ) -> None:
        self.disk = disk
        kind = CdromUnit if disk.info.optical else DiskUnit
        self.unit = kind(disk, luns=tuple, identity=identity)
        self.unit.name = f"shared disk ({source or type(disk).__name__})"
        self._warnings = [_short(each) for each in warnings[:MAX_WARNINGS]]
        self._told: dict[str, Any] = {}
        self.watchers = Watchers()
        """Called when :meth:`describe` says something else."""
        disk.watch(self.look)
        self._visits: dict[Hashable, trio.Event] = {}
        """Guests with a line, and what is set at its end."""

    def describe(self) -> dict[str, Any]:
        """Return what guests' operators see of it."""
        info = self.disk.info
        return {
            "size": info.size, "read_only": info.read_only, "kind": type(self.disk).__name__,
            "warnings": self._warnings, **self.unit.describe(),
        }  # fmt: skip

    def look(self) -> None:
        """Tell the guests if they see something else now. Cannot block."""
        found = self.describe()
        if found != self._told:
            self._told = found
            self.watchers.notify()

    async def serve(self, line: sharing.Line, initiator: Hashable, spec: str) -> None:
        """See :meth:`vmbus.plugins.sharing.Keeper.serve`."""
        del spec  # there is one
        assert line.staging_fd is not None
        work_for(initiator)
        visit = _Visit(self, Line(line.sock), Staging(line.staging_fd), initiator)
        # Its name may be that of a guest that is just leaving; the end of that one's commands is
        # not to be the end of this one's.
        try:
            while (earlier := self._visits.get(initiator)) is not None:
                await earlier.wait()
        except BaseException:
            visit.close()
            raise
        ended = self._visits[initiator] = trio.Event()
        try:
            await visit.run()
        except* PeerProtocolError as group:
            logger.warning("%s: %s", initiator, group.exceptions[0])
        except* OSError:
            logger.debug("%s: the line of a shared disk has ended", initiator)
        finally:
            with trio.CancelScope(shield=True):
                self.unit.abort(initiator)
                await self.unit.ended(initiator)
            self.unit.detach(initiator)
            visit.close()
            del self._visits[initiator]
            ended.set()

    async def aclose(self) -> None:
        """Close unit and disk, when no line is left. Is a checkpoint."""
        self.unit.close()
        await self.unit.ended()
        await self.disk.aclose()


def _short(text: str) -> str:
    """Return a text that does not become much longer as JSON."""
    return "".join(each if each.isprintable() else "?" for each in text[:MAX_WARNING])


def _bad(text: str) -> PeerProtocolError:
    return PeerProtocolError(f"shared disk: {text}", errno=errno.EPROTO, fatal=True)


def _nothing() -> None:
    return


class _Execution:
    """A command that has no answer yet.

    Args:
        settled: Called when it has come to rest; cannot block.
    """

    __slots__ = ("asked", "ended", "pace", "scope", "whole")

    def __init__(self, settled: Callable[[], None]) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        """Set when it has an outcome."""
        self.whole = Undertakings(settled, _nothing)
        self.pace = self.whole.begin(0, str)
        self.asked = False
        """A HOLD has to be answered."""


class _Visit:
    """One guest's line."""

    def __init__(self, keeper: Keeper, line: Line, staging: Staging, initiator: Hashable) -> None:
        self._keeper = keeper
        self._unit = keeper.unit
        self._line = line
        self._staging = staging
        self._initiator = initiator
        self._running: dict[int, _Execution] = {}
        """Commands that have no answer yet."""
        self._waits = 0
        """Other questions that have no answer yet."""
        self._news = trio.Event()

    async def run(self) -> None:
        unwatch = self._keeper.watchers.add(self._tell)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._send_news)
                while data := await self._line.receive():
                    await self._obey_untrusted(data, nursery)
                nursery.cancel_scope.cancel()
        finally:
            unwatch()

    def _tell(self) -> None:
        self._news.set()

    async def _send_news(self) -> None:
        while True:
            self._news = trio.Event()
            await self._line.send(info_record(self._keeper.describe()))
            await self._news.wait()

    async def _obey_untrusted(self, data: bytes, nursery: trio.Nursery) -> None:
        unit = self._unit
        match decode_to_keeper_untrusted(data, self._staging.size):
            case CommandRecord() as record:
                if record.number in self._running:
                    raise _bad("a command with the number of another")
                self._check_room()
                settled = partial(self._settled, record.number)
                self._running[record.number] = _Execution(settled)
                nursery.start_soon(self._execute, record, unit.aborts)
            case (Kind.ABORT, number):
                if number in self._running:
                    self._running[number].scope.cancel()
            case (Kind.HOLD | Kind.GO_ON as kind, number):
                self._guide(self._running.get(number), number, hold=kind is Kind.HOLD)
            case (Kind.RESET, _):
                unit.reset()
                self._keeper.look()  # trays are unlocked
            case (Kind.WAIT, number):
                self._check_room()
                self._waits += 1
                ends = [each.ended for each in self._running.values()]
                nursery.start_soon(self._wait, number, ends)
            case (Kind.ATTENTION, code):
                unit.attentions.add(self._initiator, code & 0xFFFF)
                unit.refresh()
            case (Kind.INTRODUCE, replaces):
                unit.introduce(self._initiator, replaces=type(unit) if replaces else None)
            case _:
                unit.detach(self._initiator)
        # The next record waits until the commands before it have begun: order is kept.
        await trio.lowlevel.checkpoint()

    def _guide(self, execution: _Execution | None, number: int, *, hold: bool) -> None:
        """Let a command stand still, or go on; without one its answer is on the way."""
        if execution is None or execution.ended.is_set():
            return
        if not hold:
            execution.whole.go_on()
            self._say_held(execution, number)
            return
        if execution.asked:
            raise _bad("a command that is to stand still twice")
        self._check_room()
        self._waits += 1
        execution.asked = True
        execution.whole.hold()
        if execution.whole.resting:
            self._say_held(execution, number)

    def _settled(self, number: int) -> None:
        self._say_held(self._running[number], number)

    def _say_held(self, execution: _Execution, number: int) -> None:
        if execution.asked:
            execution.asked = False
            self._nursery.start_soon(self._send_held, number)

    async def _send_held(self, number: int) -> None:
        await self._line.send(number_record(Kind.HELD, number))
        self._waits -= 1

    async def _execute(self, record: CommandRecord, aborts: int) -> None:
        outcome: Outcome = TASK_ABORTED
        execution = self._running[record.number]
        keep_pace(execution.pace)
        data = [self._staging.view[record.offset : record.offset + record.length]]
        command = Command(
            record.cdb, data if record.length else [], record.length, record.direction,
            self._initiator,
        )  # fmt: skip
        try:
            with execution.scope:
                if self._unit.aborts == aborts:  # else a reset was quicker than this task
                    found = self._unit.try_execute(command)
                    outcome = found if found is not None else await self._unit.execute(command)
        finally:
            execution.ended.set()
            if execution.asked:
                execution.asked = False
                self._waits -= 1
        if outcome.status or record.cdb[0] in _CHANGES:
            self._keeper.look()
        # Until it is said, it counts: a guest may ask and ask, and never read.
        await self._line.send(DoneRecord(record.number, outcome).encode())
        del self._running[record.number]

    async def _wait(self, number: int, ends: list[trio.Event]) -> None:
        """Answer when all commands have ended: this guest's that are there, and the unit's."""
        for ended in ends:
            await ended.wait()
        await self._unit.ended()
        await self._line.send(number_record(Kind.WAITED, number))
        self._waits -= 1

    def _check_room(self) -> None:
        if len(self._running) + self._waits >= MAX_COMMANDS:
            raise _bad("too many commands")

    def close(self) -> None:
        """Give line and staging area up."""
        self._line.close()
        self._staging.close()
