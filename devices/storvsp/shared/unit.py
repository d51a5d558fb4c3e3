"""What a controller has of a disk that is kept elsewhere: a unit that passes commands on."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import trio

from storvsp.scsi import cdb as op
from storvsp.scsi.cdb import command_name
from storvsp.scsi.pace import Pace, current_pace
from storvsp.scsi.sense import (
    HARDWARE_ERROR,
    LOGICAL_UNIT_COMMUNICATION_FAILURE,
    MEDIUM_ERROR,
    NOT_READY,
    SPACE_ALLOCATION_FAILED,
    CheckCondition,
    Sense,
)
from storvsp.scsi.target import report_luns_untrusted
from storvsp.scsi.unit import (
    STATUS_CHECK_CONDITION,
    STEP,
    TASK_ABORTED,
    Command,
    DataDirection,
    LogicalUnit,
    Outcome,
    check_condition,
)
from storvsp.shared.messages import (
    CommandRecord,
    DoneRecord,
    Kind,
    Line,
    decode_to_unit_untrusted,
    number_record,
)
from storvsp.shared.staging import Staging
from vmbus.errors import PeerProtocolError
from vmbus.memory import window

logger = logging.getLogger("storvsp")

_FAILURES = frozenset((bytes([MEDIUM_ERROR]), bytes([HARDWARE_ERROR])))
_FAILED = frozenset(
    code.to_bytes(2, "big")
    for code in (SPACE_ALLOCATION_FAILED, LOGICAL_UNIT_COMMUNICATION_FAILURE)
)
ABORT_PATIENCE = 8.0
"""Seconds for a keeper to end a command that is aborted; less than a guest's end may take."""

_LOST = check_condition(Sense(NOT_READY, LOGICAL_UNIT_COMMUNICATION_FAILURE))


class _Pending:
    """A record whose answer is waited for."""

    __slots__ = ("news", "outcome", "over", "owed")

    def __init__(self) -> None:
        self.news = trio.Event()
        """Set when something of this, or what is wanted of the command, has changed."""
        self.over = False
        """There is an answer, or there will be none."""
        self.outcome: Outcome | None = None
        self.owed = 0
        """HOLDs that have no answer yet."""

    def wake(self) -> None:
        """Have whoever waits look again. Cannot block."""
        self.news.set()

    async def wait(self) -> None:
        """Wait until there is something to look at. A checkpoint."""
        await self.news.wait()
        self.news = trio.Event()

    def end(self, outcome: Outcome | None) -> None:
        """There is an answer, or there will be none. Cannot block."""
        self.over = True
        self.outcome = outcome
        self.wake()


async def _nothing() -> None:
    return


class SharedUnit(LogicalUnit):
    """A logical unit at the other end of a line. Must be made inside a trio run.

    A command acts, as a pause sees it, while it copies between guest memory and the staging area
    and while its keeper works at it. For a pause the keeper is asked to let it stand still.

    Args:
        sock: SOCK_SEQPACKET to the keeper; owned.
        staging_fd: The staging area, sealed; owned.
        luns: Returns the LUNs of the target that this unit is part of, for REPORT LUNS.
        changed: Called when the disk has another size; cannot block.
        source: What people call the disk.
    """

    paced = True
    why_fixed = "a disk that guests share, which keeps the size that the server was started with"

    def __init__(
        self,
        sock: socket.socket,
        staging_fd: int,
        *,
        luns: Callable[[], Iterable[int]],
        changed: Callable[[], None],
        source: str = "",
    ) -> None:
        self._line = Line(sock)
        self._staging = Staging(staging_fd)
        self._luns = luns
        self._changed = changed
        self._source = source
        self._next = 0
        self._pending: dict[int, _Pending] = {}
        self._commands: dict[int, Command] = {}
        """Those under way, by the number of their task."""
        self._tasks = 0
        self._answered: trio.Event | None = None
        """Set when the next question for the end of commands has its answer."""
        self._asking = False
        self._idle = trio.lowlevel.ParkingLot()
        self._posts: list[bytes] = []
        self._lost = False
        self._closed = False
        self.info: dict[str, Any] = {}
        """Size in bytes, whether read-only, and the back-end's kind; empty until known."""
        self.known = trio.Event()
        """Set when the keeper has said so, or is gone."""
        trio.lowlevel.spawn_system_task(self._read)

    async def _read(self) -> None:
        try:
            while data := await self._line.receive():
                self._take_untrusted(data)
        except PeerProtocolError as error:
            logger.error("%s", error)
        except Exception:
            logger.exception("the line of a shared disk failed")
        self._lost = True
        if not self._closed:
            logger.error("the keeper of a shared disk is gone")
        for pending in self._pending.values():
            pending.end(None)
        self.known.set()
        while self._commands:
            await self._idle.park()
        self._line.close()
        self._staging.close()

    def _take_untrusted(self, data: bytes) -> None:
        match decode_to_unit_untrusted(data):
            case DoneRecord(number, outcome):
                self._answer(number, outcome)
            case (Kind.HELD, number):
                if number in self._pending:
                    self._pending[number].owed -= 1
                    self._pending[number].wake()
            case (_, number):
                self._answer(number, TASK_ABORTED)
            case dict(info):
                news = bool(self.info) and info["size"] != self.info["size"]
                self.info = info
                self.known.set()
                if news:
                    self._changed()

    def _answer(self, number: int, outcome: Outcome) -> None:
        if number in self._pending:
            self._pending[number].end(outcome)

    # -- commands --------------------------------------------------------------------------------

    def try_execute(self, command: Command) -> Outcome | None:
        """See :meth:`LogicalUnit.try_execute`: nothing but the list of neighbours is known here."""
        if command.cdb[:1] != bytes([op.REPORT_LUNS]):
            return None
        try:
            return report_luns_untrusted(self._luns(), command)
        except CheckCondition as error:
            return check_condition(error.sense)

    async def execute(self, command: Command) -> Outcome:
        """See :meth:`LogicalUnit.execute`."""
        if command.length > self._staging.size:
            return _LOST
        self._tasks += 1
        task = self._tasks
        self._commands[task] = command
        aborts = self.aborts
        try:
            offset = await self._staging.take(command.length)
            try:
                pace = current_pace()
                await pace.enter()
                try:
                    if self.aborts != aborts:  # while it waited; its keeper does not know of it
                        return TASK_ABORTED
                    outcome = await self._execute_at(command, offset, pace)
                finally:
                    pace.leave()
                self.errors += _is_failure(outcome)
                return outcome
            finally:
                self._staging.give(offset, command.length)
        except trio.EndOfChannel:  # nobody waits for it any more
            return TASK_ABORTED
        except OSError:
            self.errors += 1
            return _LOST
        finally:
            del self._commands[task]
            self._idle.unpark_all()

    async def _execute_at(self, command: Command, offset: int, pace: Pace) -> Outcome:
        if self._closed:
            return TASK_ABORTED
        if self._lost:
            return _LOST
        part = self._staging.view[offset : offset + command.length]
        if command.direction is DataDirection.WRITE:
            await _copy_in(part, command.data)
        record = CommandRecord(
            self._number(), command.cdb, command.direction, command.length, offset
        )
        outcome = await self._have_done(record, pace)
        if outcome is None:
            return TASK_ABORTED if self._closed else _LOST
        if command.direction is DataDirection.READ and outcome.transferred:
            done = min(outcome.transferred, command.length)
            await _copy_out(command.data, part[:done])
            outcome = outcome._replace(transferred=done)
        return outcome

    def _number(self) -> int:
        self._next = (self._next + 1) & 0xFFFFFFFF
        return self._next

    async def _have_done(self, record: CommandRecord, pace: Pace) -> Outcome | None:
        """Send a command and wait for its outcome; None if the keeper is gone.

        If it is cancelled, the command is aborted, and has ended when that is over: the staging
        area may not be given to another command before. A keeper whose disk hangs is not waited
        for: the disk is lost to this guest then, and its staging area used for nothing more.
        """
        number = record.number
        pending = self._pending[number] = _Pending()
        pace.heed(pending.wake)
        try:
            await self._line.send(record.encode())
            try:
                await self._follow(number, pending, pace)
            except trio.Cancelled:
                patience = trio.current_time() + ABORT_PATIENCE
                with trio.CancelScope(shield=True, deadline=patience):
                    await self._line.send(number_record(Kind.ABORT, number))
                    while not pending.over:
                        await pending.wait()
                if not pending.over:
                    self._give_up()
                raise
        finally:
            pace.heed(None)
            del self._pending[number]
        return pending.outcome

    async def _follow(self, number: int, pending: _Pending, pace: Pace) -> None:
        """Wait for an outcome; tell the keeper what is wanted of the command meanwhile."""
        held = aborted = False
        while not pending.over:
            if aborted:
                await pending.wait()
            elif pace.end_wanted:
                aborted = True
                await self._line.send(number_record(Kind.ABORT, number))
            elif held is not pace.rest_wanted:
                held = not held
                pending.owed += held
                await self._line.send(number_record(Kind.HOLD if held else Kind.GO_ON, number))
            elif held and not pending.owed:
                # The keeper touches neither disk nor staging area for it until it hears more.
                with contextlib.suppress(trio.EndOfChannel):
                    await pace.rest(_nothing)
            else:
                await pending.wait()

    def _give_up(self) -> None:
        """The keeper does not end a command: have no more to do with it."""
        if not self._lost:
            self._lost = True
            logger.error("%s: its keeper does not answer; the disk is lost", self._source)
            self._line.finish()
            for pending in self._pending.values():
                pending.end(None)

    # -- the rest of the contract ----------------------------------------------------------------

    def _post(self, kind: Kind, number: int = 0) -> None:
        """Send what has no answer, in order, by a task of its own. Cannot block."""
        record = number_record(kind, number)
        if len(self._posts) > 1 and self._posts[-1] == record:
            return  # what is not on its way yet says it as well; a guest may reset all the time
        self._posts.append(record)
        if len(self._posts) == 1:
            trio.lowlevel.spawn_system_task(self._send_posts)

    async def _send_posts(self) -> None:
        try:
            while self._posts:
                await self._line.send(self._posts[0])
                del self._posts[0]
        except OSError:
            self._posts.clear()
        finally:
            self._idle.unpark_all()

    def reset(self) -> None:
        """See :meth:`LogicalUnit.reset`; commands of all guests end."""
        self.aborts += 1
        self._post(Kind.RESET)

    @property
    def busy(self) -> bool:
        """See :attr:`LogicalUnit.busy`."""
        return bool(self._commands or self._posts)

    @property
    def under_way(self) -> list[str]:
        """See :attr:`LogicalUnit.under_way`."""
        return [command_name(command.cdb) for command in self._commands.values()]

    async def ended(self) -> None:
        """See :meth:`LogicalUnit.ended`: of this guest's commands, those sent before.

        Of a unit that is closed: all. A keeper whose disk hangs is not waited for then; what its
        threads write to is the staging area, which nobody uses any more.
        """
        if not self._closed:
            await self._ask_for_end()
            return
        with trio.move_on_after(ABORT_PATIENCE):
            while self._commands:
                await self._idle.park()
        if self._commands:
            self._give_up()
        while self._commands:
            await self._idle.park()

    async def _ask_for_end(self) -> None:
        """Ask the keeper when commands have ended. A checkpoint.

        Those who ask while a question has no answer yet share the next one.
        """
        if self._answered is None:
            self._answered = trio.Event()
            if not self._asking:
                self._asking = True
                trio.lowlevel.spawn_system_task(self._ask)
        await self._answered.wait()

    async def _ask(self) -> None:
        try:
            while True:
                while self._posts:
                    await self._idle.park()
                answered, self._answered = self._answered, None
                if answered is None:
                    return
                await self._ask_once()
                answered.set()
        finally:
            self._asking = False

    async def _ask_once(self) -> None:
        if self._lost:
            return
        number = self._number()
        pending = self._pending[number] = _Pending()
        try:
            await self._line.send(number_record(Kind.WAIT, number))
            while not pending.over:
                await pending.wait()
        except OSError:
            return
        finally:
            del self._pending[number]

    def detach(self, initiator: Hashable) -> None:
        """See :meth:`LogicalUnit.detach`; the keeper knows who we are."""
        del initiator
        self._post(Kind.DETACH)

    def raise_attention(self, code: int, *, but: Hashable | None = None) -> None:
        """See :meth:`LogicalUnit.raise_attention`: for this guest, whose neighbours they are."""
        del but
        self._post(Kind.ATTENTION, code)

    def introduce(self, initiator: Hashable, *, replaces: type[LogicalUnit] | None) -> None:
        """See :meth:`LogicalUnit.introduce`."""
        del initiator
        self._post(Kind.INTRODUCE, 0 if replaces is None else 1)

    def describe(self) -> dict[str, Any]:
        """See :meth:`LogicalUnit.describe`."""
        found = {name: value for name, value in self.info.items() if name != "warnings"}
        return {**found, "source": self._source, "shared": True, "lost": self._lost}

    def close(self) -> None:
        """See :meth:`LogicalUnit.close`: the end of the line aborts what it has brought."""
        if not self._closed:
            self._closed = True
            self._line.finish()


def _is_failure(outcome: Outcome) -> bool:
    """Whether the disk has failed a command, by what the keeper's unit makes of that."""
    sense = outcome.sense
    return outcome.status == STATUS_CHECK_CONDITION and (
        sense[2:3] in _FAILURES or sense[12:14] in _FAILED
    )


async def _copy_in(part: memoryview, data: list[memoryview]) -> None:
    """Copy a guest's buffer to the staging area, once. A checkpoint for long ones."""
    for at in range(0, len(part), STEP):
        done = at
        for view in window(data, at, min(STEP, len(part) - at)):
            part[done : done + len(view)] = view
            done += len(view)
        if done < len(part):
            await trio.lowlevel.checkpoint()


async def _copy_out(data: list[memoryview], part: memoryview) -> None:
    """Copy the staging area to a guest's buffer. A checkpoint for long ones."""
    for at in range(0, len(part), STEP):
        done = at
        for view in window(data, at, min(STEP, len(part) - at)):
            view[:] = part[done : done + len(view)]
            done += len(view)
        if done < len(part):
            await trio.lowlevel.checkpoint()
