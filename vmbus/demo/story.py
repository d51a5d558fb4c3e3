"""What the guest of a demo tells: one JSON object per line on standard output."""

from __future__ import annotations

import json
import sys


class Story:
    """The lines of one guest, and whether one of them was about a problem."""

    def __init__(self) -> None:
        self.failed = False
        """Whether there was a problem."""
        self.interrupted: int | None = None
        """The signal that has ended a guest that stays until then."""

    def emit(self, event: str, **members: object) -> None:
        """Write one line. Blocks if nobody reads.

        Args:
            event: Its name, one of those that :mod:`vmbus.demo` or the half lists.
            members: What JSON can say.
        """
        sys.stdout.write(json.dumps({"event": event, **members}) + "\n")
        sys.stdout.flush()

    def problem(self, where: str, error: BaseException | str) -> None:
        """Report a problem. Blocks if nobody reads.

        Args:
            where: Name of what is tried, or a part of the system.
            error: What has happened.
        """
        self.failed = True
        self.emit("problem", where=where, text=str(error))
