"""Sides that take turns at the same work."""

from __future__ import annotations

import abc
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from tests.guest.rig.assets import Assets
from tests.guest.rig.comparison import Kind, Results, order
from tests.guest.rig.guest import Guest, GuestError
from tests.guest.versus.programs import Emulator

ATTEMPTS = 4
PATIENCE = 60
"""Seconds beyond a job's own for it to end."""


class Contest(abc.ABC):
    """Boots guests on every side and measures them.

    Args:
        assets: The rig's.
        folder: For disks and logs.
        emulator: The other sides.
        seconds: Of each job.
        poll: Microseconds for ``vmbus serve --poll``; None: its default.

    Attributes:
        kinds: What is measured.
        results: What was, by side; ours first.
        memory: MiB, by what uses it.
    """

    kinds: dict[str, Kind]

    def __init__(
        self, assets: Assets, folder: Path, emulator: Emulator, *, seconds: int, poll: int | None
    ) -> None:
        self.assets = assets
        self.folder = folder
        self.emulator = emulator
        self.seconds = seconds
        self.options = [] if poll is None else [f"--poll={poll}"]
        self.results: dict[str, Results] = {name: {} for name in self.sides}
        self.memory: dict[str, float] = {}

    @property
    @abc.abstractmethod
    def sides(self) -> tuple[str, ...]:
        """Their names; ours first."""

    @abc.abstractmethod
    def boot(self, side: str) -> AbstractContextManager[tuple[Guest, float]]:
        """Boot a guest. Yields it and the seconds that it took. Raises GuestError."""

    @abc.abstractmethod
    def work(self, side: str, guest: Guest, booted: float) -> dict[str, float]:
        """Have it do all jobs. Returns what was measured."""

    def round(self, number: int) -> None:
        """Measure every side once."""
        order(number, *(partial(self.measure, side) for side in self.sides))

    def measure(self, side: str) -> None:
        """Boot a side's guest, have it work, and add to the results.

        A guest on emulated processors may end on its own, on any side, and is measured again then:
        docs/explanation/nested-rig.md.
        """
        for attempt in range(ATTEMPTS):
            try:
                with self.boot(side) as (guest, booted):
                    found = self.work(side, guest, booted)
            except GuestError as error:
                if attempt == ATTEMPTS - 1:
                    raise
                reason = str(error).partition("\n")[0]
                print(f"{side}: {reason}; once more", file=sys.stderr, flush=True)
            else:
                for title, value in found.items():
                    self.results[side].setdefault(title, []).append(value)
                return
