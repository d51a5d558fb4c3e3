"""A medium that can be taken out: the tray, its locks, PREVENT ALLOW MEDIUM REMOVAL.

Shared by removable disks and CD-ROM drives. The tray is what the guest moves with START STOP UNIT;
whether there is a medium on it is the unit's business.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Protocol

from storvsp.scsi import cdb as op, sense
from storvsp.scsi.sense import CheckCondition, Sense, invalid_cdb_field
from storvsp.scsi.table import Access, Spec, usage
from storvsp.scsi.unit import GOOD, Command, Outcome


class Tray:
    """The state of a tray. Starts closed and unlocked."""

    __slots__ = ("_locks", "open")

    def __init__(self) -> None:
        self.open = False
        """True after the guest ejected."""
        self._locks: set[Hashable] = set()

    @property
    def locked(self) -> bool:
        """Whether any initiator prevents removal."""
        return bool(self._locks)

    def lock(self, initiator: Hashable, *, prevent: bool) -> None:
        """Prevent removal for an initiator, or allow it again as far as that one is concerned."""
        if prevent:
            self._locks.add(initiator)
        else:
            self._locks.discard(initiator)

    def unlock_all(self) -> None:
        """Drop every lock, as a reset does."""
        self._locks.clear()

    def check_unlocked(self) -> None:
        """Raise ILLEGAL REQUEST 53/02 if removal is prevented."""
        if self._locks:
            raise CheckCondition(Sense(sense.ILLEGAL_REQUEST, sense.MEDIUM_REMOVAL_PREVENTED))


class HasTray(Protocol):
    """A unit with a tray."""

    tray: Tray

    def refresh(self) -> None:
        """Called after every change of state."""


def prevent_allow(unit: HasTray, command: Command) -> Outcome:
    """PREVENT ALLOW MEDIUM REMOVAL, SBC-3 5.15; harmless where nothing can be removed."""
    prevent = command.cdb[4] & 0x03
    if prevent > 1:  # media changers, obsolete
        raise invalid_cdb_field(4, 1)
    unit.tray.lock(command.initiator, prevent=bool(prevent))
    unit.refresh()
    return GOOD


PREVENT_ALLOW: Final = Spec(
    op.PREVENT_ALLOW_MEDIUM_REMOVAL, usage("1e 00 00 00 03 04"), Access.PREVENT, prevent_allow
)
