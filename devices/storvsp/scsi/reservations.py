"""Reservations: persistent ones (SPC-4 5.12) and the RESERVE/RELEASE pair of SPC-2.

The state of one logical unit, without any I/O. Everything here happens between two checkpoints,
so a change of reservations is one step for all other commands. Registrations belong to initiators
(the VMBus guests), live in memory and are bounded; APTPL is refused, because nothing survives the
process.

RESERVE and RELEASE follow SPC-4 5.12.3 with CRH = 1: they succeed without effect for those whom a
persistent reservation lets in anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Final

from storvsp.scsi import cdb as op, sense
from storvsp.scsi.sense import (
    CheckCondition,
    ReservationConflict,
    Sense,
    invalid_cdb_field,
    invalid_parameter,
)
from storvsp.scsi.table import Access

MAX_REGISTRATIONS: Final = 64

WRITE_EXCLUSIVE: Final = 1
EXCLUSIVE_ACCESS: Final = 3
WRITE_EXCLUSIVE_REGISTRANTS: Final = 5
EXCLUSIVE_ACCESS_REGISTRANTS: Final = 6
WRITE_EXCLUSIVE_ALL: Final = 7
EXCLUSIVE_ACCESS_ALL: Final = 8

_WRITE_EXCLUSIVE_TYPES = frozenset(
    (WRITE_EXCLUSIVE, WRITE_EXCLUSIVE_REGISTRANTS, WRITE_EXCLUSIVE_ALL)
)
_ALL_REGISTRANTS_TYPES = frozenset((WRITE_EXCLUSIVE_ALL, EXCLUSIVE_ACCESS_ALL))
_SHARED_TYPES = _ALL_REGISTRANTS_TYPES | {
    WRITE_EXCLUSIVE_REGISTRANTS,
    EXCLUSIVE_ACCESS_REGISTRANTS,
}
TYPES: Final = _SHARED_TYPES | {WRITE_EXCLUSIVE, EXCLUSIVE_ACCESS}


@dataclasses.dataclass(slots=True)
class Effect:
    """What a PERSISTENT RESERVE OUT does to others.

    Attributes:
        attentions: Initiators and the unit attentions to raise for them.
        aborted: Initiators whose commands have to be aborted.
    """

    attentions: list[tuple[Hashable, int]] = dataclasses.field(default_factory=list)
    aborted: list[Hashable] = dataclasses.field(default_factory=list)


class Reservations:
    """Registrations and the reservation of one logical unit."""

    __slots__ = ("_holder", "_legacy", "generation", "keys", "type")

    def __init__(self) -> None:
        self.generation = 0
        """PRGENERATION, 32 bits."""
        self.keys: dict[Hashable, int] = {}
        """Registered initiators and their keys."""
        self.type = 0
        """Type of the persistent reservation; 0 if there is none."""
        self._holder: Hashable = None
        self._legacy: tuple[Hashable] | None = None

    @property
    def all_registrants(self) -> bool:
        """Whether every registrant holds the reservation."""
        return self.type in _ALL_REGISTRANTS_TYPES

    def holds(self, initiator: Hashable) -> bool:
        """Whether the initiator holds the persistent reservation."""
        if not self.type or initiator not in self.keys:
            return False
        return self.all_registrants or initiator == self._holder

    def _lets_in(self, initiator: Hashable) -> bool:
        if self.type in _SHARED_TYPES:
            return initiator in self.keys
        return self.holds(initiator)

    def holder_key(self) -> int:
        """Return the key of the reservation: the holder's, or 0 if all registrants hold it."""
        return 0 if self.all_registrants else self.keys[self._holder]

    def conflicts(self, initiator: Hashable, access: Access, cdb: bytes) -> bool:
        """Whether a command has to end with RESERVATION CONFLICT.

        Args:
            initiator: Who sent it.
            access: Its row in the tables of SPC-4 and SBC-3.
            cdb: For the two commands whose row depends on a bit.
        """
        if access is Access.FREE:
            return False
        if self._legacy is not None:
            if initiator == self._legacy[0]:
                return False
            column = 0
        elif not self.type or self._lets_in(initiator):
            return False
        else:
            column = 1 if self.type in _WRITE_EXCLUSIVE_TYPES else 2
        if access is Access.START_STOP:
            access = Access.FREE if len(cdb) > 4 and cdb[4] & 0xF1 == 0x01 else Access.WRITE
        elif access is Access.PREVENT:
            access = Access.FREE if len(cdb) > 4 and not cdb[4] & 0x03 else Access.WRITE
        return access.value[column] == "x"

    # RESERVE and RELEASE.

    def reserve(self, initiator: Hashable) -> None:
        """RESERVE(6) and (10), SPC-2 7.21. Raises ReservationConflict."""
        if self.keys:
            if self.type and self._lets_in(initiator):
                return
            raise ReservationConflict("persistent registrations exclude RESERVE")
        if self._legacy is not None and self._legacy[0] != initiator:
            raise ReservationConflict("reserved by another initiator")
        self._legacy = (initiator,)

    def release(self, initiator: Hashable) -> None:
        """RELEASE(6) and (10), SPC-2 7.16: no effect unless the initiator has the reservation."""
        if self._legacy is not None and self._legacy[0] == initiator:
            self._legacy = None

    def release_any(self) -> None:
        """Drop the RESERVE reservation, as a reset does; persistent ones stay."""
        self._legacy = None

    # PERSISTENT RESERVE OUT.

    def change(
        self, initiator: Hashable, action: int, scope_type: int, key: int, new_key: int
    ) -> Effect:
        """Do one service action of PERSISTENT RESERVE OUT (SPC-4 6.16).

        Args:
            initiator: Who asks.
            action: Service action.
            scope_type: Byte 2 of the CDB.
            key: RESERVATION KEY.
            new_key: SERVICE ACTION RESERVATION KEY.

        Returns:
            What others have to be told.

        Raises:
            ReservationConflict: The key is wrong or somebody else holds the reservation.
            CheckCondition: A field is invalid.
        """
        if self._legacy is not None:
            raise ReservationConflict("reserved with RESERVE")
        effect = Effect()
        if action in {op.PR_REGISTER, op.PR_REGISTER_AND_IGNORE}:
            ignore = action == op.PR_REGISTER_AND_IGNORE
            self._register(initiator, key, new_key, effect, ignore=ignore)
            return effect
        if self.keys.get(initiator) != key:
            raise ReservationConflict("not registered with this reservation key")
        if action == op.PR_CLEAR:
            for other in self.keys:
                if other != initiator:
                    effect.attentions.append((other, sense.RESERVATIONS_PREEMPTED))
            self.keys.clear()
            self.type = 0
            self._advance()
            return effect
        if scope_type >> 4:
            raise invalid_cdb_field(2, 7)
        kind = scope_type & 0x0F
        if action == op.PR_RELEASE:
            self._release(initiator, kind, effect)
            return effect
        if action == op.PR_RESERVE:
            self._reserve(initiator, kind)
        else:
            self._preempt(initiator, kind, new_key, effect, abort=action == op.PR_PREEMPT_AND_ABORT)
        return effect

    def _advance(self) -> None:
        self.generation = (self.generation + 1) & 0xFFFFFFFF

    def _register(
        self, initiator: Hashable, key: int, new_key: int, effect: Effect, *, ignore: bool
    ) -> None:
        old = self.keys.get(initiator)
        if not ignore and key != (old or 0):
            raise ReservationConflict("wrong reservation key")
        if old is None:
            if not new_key:
                return
            if len(self.keys) >= MAX_REGISTRATIONS:
                raise CheckCondition(
                    Sense(sense.ILLEGAL_REQUEST, sense.INSUFFICIENT_REGISTRATION_RESOURCES)
                )
            self.keys[initiator] = new_key
        elif new_key:
            self.keys[initiator] = new_key
        else:
            self._unregister(initiator, effect)
        self._advance()

    def _unregister(self, initiator: Hashable, effect: Effect) -> None:
        held = self.holds(initiator)
        del self.keys[initiator]
        if held and (not self.all_registrants or not self.keys):
            if self.type in _SHARED_TYPES:
                self._tell(effect, sense.RESERVATIONS_RELEASED, but=initiator)
            self.type = 0

    def _tell(self, effect: Effect, code: int, *, but: Hashable) -> None:
        effect.attentions.extend((other, code) for other in self.keys if other != but)

    def _release(self, initiator: Hashable, kind: int, effect: Effect) -> None:
        if not self.holds(initiator):
            return
        if kind != self.type:
            raise CheckCondition(
                Sense(sense.ILLEGAL_REQUEST, sense.INVALID_RELEASE_OF_PERSISTENT_RESERVATION)
            )
        if self.type in _SHARED_TYPES:
            self._tell(effect, sense.RESERVATIONS_RELEASED, but=initiator)
        self.type = 0

    def _reserve(self, initiator: Hashable, kind: int) -> None:
        if kind not in TYPES:
            raise invalid_cdb_field(2, 3)
        if self.type:
            if not self.holds(initiator) or kind != self.type:
                raise ReservationConflict("there is another persistent reservation")
            return
        self.type = kind
        self._holder = initiator

    def _preempt(
        self, initiator: Hashable, kind: int, victim_key: int, effect: Effect, *, abort: bool
    ) -> None:
        """PREEMPT and PREEMPT AND ABORT, SPC-4 5.12.11.4."""
        if self.all_registrants and not victim_key:
            victims = [other for other in self.keys if other != initiator]
            takes_over = True
        else:
            if not victim_key:
                raise invalid_parameter(8)
            takes_over = bool(
                self.type and not self.all_registrants and victim_key == self.holder_key()
            )
            if victim_key not in self.keys.values():
                raise ReservationConflict("nobody is registered with the key to preempt")
            victims = [
                other
                for other, key in self.keys.items()
                if key == victim_key and other != initiator
            ]
        if takes_over and kind not in TYPES:
            raise invalid_cdb_field(2, 3)
        if not takes_over and victim_key == self.keys[initiator]:
            self._unregister(initiator, effect)
        for victim in victims:
            del self.keys[victim]
            effect.attentions.append((victim, sense.REGISTRATIONS_PREEMPTED))
            if abort:
                effect.aborted.append(victim)
        if takes_over:
            if self.type in _SHARED_TYPES and kind != self.type:
                self._tell(effect, sense.RESERVATIONS_RELEASED, but=initiator)
            self.type = kind
            self._holder = initiator
        elif self.type and not self.keys:
            self.type = 0
        self._advance()
