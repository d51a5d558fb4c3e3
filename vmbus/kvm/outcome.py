"""How a guest's life ends."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Outcome(enum.Enum):
    """What became of the guest; the value is the exit code of ``vmbus boot``."""

    POWER_OFF = 0
    """It switched itself off."""
    FAILURE = 1
    """The VMM, KVM or the server could not go on; no fault of the guest's."""
    PANIC = 3
    """It reported its crash through the Hyper-V crash registers."""
    TRIPLE_FAULT = 4
    """It could not handle an exception any more, and reported nothing."""
    INTERRUPTED = 130
    """Somebody at the keyboard ended it."""
    RESET = -1
    """It wants to start again; the machine sees to that, nobody exits with it."""

    @property
    def words(self) -> str:
        """What became of the guest, for people."""
        return {
            Outcome.POWER_OFF: "the guest switched itself off",
            Outcome.FAILURE: "the guest cannot go on",
            Outcome.PANIC: "the guest panicked",
            Outcome.TRIPLE_FAULT: "the guest crashed",
            Outcome.INTERRUPTED: "ended from the keyboard",
            Outcome.RESET: "the guest starts again",
        }[self]


class End(NamedTuple):
    """The end of a life."""

    outcome: Outcome
    text: str = ""
    """For people: the guest's last words, or what failed."""
