"""Commands in progress: aborted some at a time, and waited for by whoever needs their end.

A guest can have thousands of commands under way, and thousands of requests that wait for their end
(resets). So the end of a command wakes those only who can go on, and aborts are spread over several
turns of the loop.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable
from typing import Final

import trio

from storvsp.scsi.cdb import command_name
from storvsp.scsi.unit import Command

ABORTS_AT_ONCE: Final = 64
"""Commands that are ended in one turn of the loop. Each has a stack to unwind: 4000 of them, ended
at once, would have everybody else wait for a quarter of a second."""


class Endings:
    """Numbers of what is in progress, in the order in which it began, and who waits for its end."""

    def __init__(self) -> None:
        # Not a dict: finding its first key means looking at all that were in front of it.
        self._running: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._waiting: collections.OrderedDict[trio.Event, int] = collections.OrderedDict()
        """By what each may go on: the end of the last one that had begun."""
        self._last = 0

    def __len__(self) -> int:
        """How many there are in progress."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many wait for ends."""
        return len(self._waiting)

    def begin(self) -> int:
        """Begin one; return its number. Cannot block."""
        self._last += 1
        self._running[self._last] = None
        return self._last

    def end(self, number: int) -> None:
        """One has ended: wake those who have waited for that, in their order. Cannot block."""
        del self._running[number]
        oldest = next(iter(self._running), self._last + 1)
        while self._waiting:
            event, last = next(iter(self._waiting.items()))
            if last >= oldest:
                return
            del self._waiting[event]
            event.set()

    async def ended(self) -> None:
        """Wait until all that is in progress now has ended. A checkpoint if anything is."""
        if self._running:
            event = trio.Event()
            self._waiting[event] = self._last
            try:
                await event.wait()
            finally:
                self._waiting.pop(event, None)


class Running:
    """The commands of one unit that wait for the disk."""

    def __init__(self) -> None:
        self._commands: dict[trio.CancelScope, tuple[Command, int, int]] = {}
        """With their numbers among all, and among those of their initiator."""
        self._doomed: dict[trio.CancelScope, None] = {}
        self._all = Endings()
        self._of: dict[Hashable, Endings] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._commands)

    @property
    def names(self) -> list[str]:
        """What they are, for people."""
        return [command_name(command.cdb) for command, _, _ in self._commands.values()]

    def begin(self, scope: trio.CancelScope, command: Command) -> None:
        """Take note of a command that may be ended by its scope. Cannot block."""
        own = self._of.setdefault(command.initiator, Endings())
        self._commands[scope] = command, self._all.begin(), own.begin()

    def end(self, scope: trio.CancelScope) -> None:
        """A command has ended. Cannot block."""
        command, number, own_number = self._commands.pop(scope)
        self._doomed.pop(scope, None)
        own = self._of[command.initiator]
        own.end(own_number)
        if not own:
            del self._of[command.initiator]
        self._all.end(number)

    def abort(self, initiator: Hashable | None) -> None:
        """Cancel the commands of an initiator, or of everybody, in their order. Cannot block."""
        going_on = bool(self._doomed)
        for scope, (command, _, _) in self._commands.items():
            if scope.cancel_called:
                continue  # by one of the many resets of a guest that is fond of them
            if initiator is None or command.initiator == initiator:
                self._doomed[scope] = None
        if not going_on:
            self._abort_some()
            if self._doomed:
                trio.lowlevel.spawn_system_task(self._abort_rest)

    def _abort_some(self) -> None:
        for scope in [*itertools.islice(self._doomed, ABORTS_AT_ONCE)]:
            del self._doomed[scope]
            scope.cancel()

    async def _abort_rest(self) -> None:
        while self._doomed:
            await trio.lowlevel.checkpoint()
            self._abort_some()

    async def ended(self, initiator: Hashable | None) -> None:
        """Wait until those in progress now have ended: an initiator's, or all. A checkpoint.

        Not a checkpoint if there are none.
        """
        endings = self._all if initiator is None else self._of.get(initiator)
        if endings is not None:
            await endings.ended()
