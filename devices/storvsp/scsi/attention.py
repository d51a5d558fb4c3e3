"""Unit attentions: what an initiator has to be told before its next command (SAM-5 5.14).

Initiators become known with their first command; what happened before that is not news to them.
Both the number of initiators and the conditions pending for each are bounded.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Final

MAX_INITIATORS: Final = 256
MAX_PENDING: Final = 16
_RESET_ASC: Final = 0x29


class Attentions:
    """The pending unit attentions of one logical unit, as ASC << 8 | ASCQ, per initiator."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending: dict[Hashable, list[int]] = {}

    def __iter__(self) -> Iterator[Hashable]:
        """Yield the known initiators."""
        return iter(self._pending)

    def know(self, initiator: Hashable) -> bool:
        """Make an initiator known; return True if it was not.

        When there are too many the one known longest is forgotten.
        """
        if initiator in self._pending:
            return False
        if len(self._pending) >= MAX_INITIATORS:
            del self._pending[next(iter(self._pending))]
        self._pending[initiator] = []
        return True

    def forget(self, initiator: Hashable) -> None:
        """Drop an initiator and what was pending for it."""
        self._pending.pop(initiator, None)

    def add(self, initiator: Hashable, code: int) -> None:
        """Queue a condition for one known initiator; others have nothing to be told.

        A condition is pending at most once. A reset (ASC 29) supersedes all that came before.
        """
        pending = self._pending.get(initiator)
        if pending is None or code in pending:
            return
        if code >> 8 == _RESET_ASC:
            pending[:] = [code]
        elif len(pending) < MAX_PENDING:
            pending.append(code)

    def add_all(self, code: int, *, but: Hashable | None = None) -> None:
        """Queue a condition for every known initiator except ``but``."""
        for initiator in self._pending:
            if initiator != but:
                self.add(initiator, code)

    def pending(self, initiator: Hashable) -> bool:
        """Whether anything is queued for the initiator."""
        return bool(self._pending.get(initiator))

    def pop(self, initiator: Hashable) -> int | None:
        """Take the oldest condition of the initiator, or return None."""
        pending = self._pending.get(initiator)
        return pending.pop(0) if pending else None

    def clear(self, initiator: Hashable, code: int) -> None:
        """Drop one condition of the initiator, because it has learned of it in another way."""
        pending = self._pending.get(initiator)
        if pending and code in pending:
            pending.remove(code)
