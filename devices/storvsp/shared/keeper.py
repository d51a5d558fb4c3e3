"""Where a shared disk is: its one logical unit, and a line for each guest that has it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Hashable
from typing import Any

import trio

from storvsp.disk import Disk
from storvsp.scsi import CdromUnit, Command, DiskUnit, Outcome
from storvsp.scsi.unit import TASK_ABORTED
from storvsp.shared.messages import (
    MAX_COMMANDS,
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
from vmbus.plugins import sharing

logger = logging.getLogger("storvsp")


class Keeper:
    """Keeps one disk for any number of guests.

    Args:
        disk: The back-end; owned.
        identity: What the unit is called if the disk has no identity of its own.
    """

    def __init__(self, disk: Disk, identity: bytes) -> None:
        self.disk = disk
        kind = CdromUnit if disk.info.optical else DiskUnit
        self.unit = kind(disk, luns=tuple, identity=identity)
        self._visits: dict[Hashable, trio.Event] = {}
        """Guests with a line, and what is set at its end."""

    def describe(self) -> dict[str, Any]:
        """Return what guests' operators see of it."""
        info = self.disk.info
        return {
            "size": info.size, "read_only": info.read_only, "kind": type(self.disk).__name__
        }  # fmt: skip

    async def serve(self, line: sharing.Line, initiator: Hashable, spec: str) -> None:
        """See :meth:`vmbus.plugins.sharing.Keeper.serve`."""
        del spec  # there is one
        assert line.staging_fd is not None
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


def _bad(text: str) -> PeerProtocolError:
    return PeerProtocolError(f"shared disk: {text}", errno=errno.EPROTO, fatal=True)


class _Visit:
    """One guest's line."""

    def __init__(self, keeper: Keeper, line: Line, staging: Staging, initiator: Hashable) -> None:
        self._keeper = keeper
        self._unit = keeper.unit
        self._line = line
        self._staging = staging
        self._initiator = initiator
        self._running: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        """Commands that have no answer yet, and what is set when they have an outcome."""
        self._waits = 0
        """Questions for the end of commands that have no answer yet."""
        self._news = trio.Event()

    async def run(self) -> None:
        unwatch = self._keeper.disk.watch(self._tell)
        try:
            async with trio.open_nursery() as nursery:
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
                self._running[record.number] = trio.CancelScope(), trio.Event()
                nursery.start_soon(self._execute, record, unit.aborts)
            case (Kind.ABORT, number):
                if number in self._running:
                    self._running[number][0].cancel()
            case (Kind.RESET, _):
                unit.reset()
            case (Kind.WAIT, number):
                self._check_room()
                self._waits += 1
                ends = [ended for _, ended in self._running.values()]
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

    async def _execute(self, record: CommandRecord, aborts: int) -> None:
        outcome: Outcome = TASK_ABORTED
        scope, ended = self._running[record.number]
        data = [self._staging.view[record.offset : record.offset + record.length]]
        command = Command(
            record.cdb, data if record.length else [], record.length, record.direction,
            self._initiator,
        )  # fmt: skip
        try:
            with scope:
                if self._unit.aborts == aborts:  # else a reset was quicker than this task
                    found = self._unit.try_execute(command)
                    outcome = found if found is not None else await self._unit.execute(command)
        finally:
            ended.set()
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
