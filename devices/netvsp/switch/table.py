"""The addresses that a switch has learnt: bounded, forgetful, and shared out fairly.

An entry that has not been seen for :data:`AGE` is none, whether it has been swept away or not.
When the table is full, a port with less than its share gets the place of the oldest entry of the
port with most. So neither one port nor many can make a switch forget where another's stations are.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Generic, TypeVar

AGE = 300.0
"""Seconds: IEEE 802.1Q, table 8-6, recommended."""
CAPACITY = 16384
"""Addresses of a switch."""

_SWEEP_IF_FULL = 64

P = TypeVar("P")


class Learnt(enum.Enum):
    """What has become of an address that was to be learnt."""

    KNOWN = "it was there before"
    NEW = "it is there now"
    MOVED = "it was at another port"
    REFUSED = "the port has its limit, or the table is full"


class Entry(Generic[P]):
    """One address in one VLAN."""

    __slots__ = ("port", "seen")

    def __init__(self, port: P, seen: float) -> None:
        self.port = port
        self.seen = seen


Key = tuple[int, bytes]
"""VLAN and address."""


class AddressTable(Generic[P]):
    """Where stations are.

    Args:
        capacity: Entries at most.
        age: Seconds for which an entry is good.

    Attributes:
        moves: Entries that have gone from one port to another.
        evicted: Entries that had to make room.
    """

    def __init__(self, capacity: int = CAPACITY, age: float = AGE) -> None:
        self._capacity = capacity
        self._age = age
        self._entries: OrderedDict[Key, Entry[P]] = OrderedDict()
        self._of: dict[P, OrderedDict[Key, None]] = {}
        """Each port's, in the order in which they came to it."""
        self.moves = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, port: P) -> int:
        """Return how many entries a port has. Cannot block."""
        return len(self._of.get(port, ()))

    def find(self, vlan: int, address: bytes, now: float) -> P | None:
        """Return the port of a station; None: not known. Cannot block."""
        entry = self._entries.get((vlan, address))
        if entry is None or now - entry.seen >= self._age:
            return None
        return entry.port

    def touch(self, vlan: int, address: bytes, port: P, now: float) -> bool:
        """Take note that a station is where it was; whether it is. Cannot block."""
        entry = self._entries.get((vlan, address))
        if entry is None or entry.port is not port:
            return False
        entry.seen = now
        return True

    def learn(
        self, vlan: int, address: bytes, port: P, now: float, limit: int
    ) -> tuple[Learnt, P | None]:
        """Take note of where a station is. Cannot block.

        Args:
            vlan: 0 to 4095.
            address: Six bytes.
            port: Where a frame of its came from.
            now: Seconds.
            limit: Entries that this port may have.

        Returns:
            What became of it, and the port where it was before if it moved.
        """
        key = vlan, address
        entry = self._entries.get(key)
        if entry is not None:
            if entry.port is port:
                entry.seen = now
                return Learnt.KNOWN, None
            if now - entry.seen < self._age:
                if self.count(port) >= limit:
                    return Learnt.REFUSED, None
                before = entry.port
                self._leave(key, before)
                self._of.setdefault(port, OrderedDict())[key] = None
                entry.port, entry.seen = port, now
                self.moves += 1
                return Learnt.MOVED, before
            self._remove(key)
        if self.count(port) >= limit:
            self._sweep_port(port, now)
            if self.count(port) >= limit:
                return Learnt.REFUSED, None
        if len(self._entries) >= self._capacity and not self._make_room(port, now):
            return Learnt.REFUSED, None
        self._entries[key] = Entry(port, now)
        self._of.setdefault(port, OrderedDict())[key] = None
        return Learnt.NEW, None

    def _make_room(self, port: P, now: float) -> bool:
        self.sweep(now, _SWEEP_IF_FULL)
        if len(self._entries) < self._capacity:
            return True
        ports = len(self._of) + (port not in self._of)
        if (self.count(port) + 1) * ports > self._capacity:
            return False
        # It has less than its share, so somebody has more than his.
        most = max(self._of.values(), key=len)
        self._remove(next(iter(most)))
        self.evicted += 1
        return True

    def sweep(self, now: float, entries: int) -> None:
        """Look at some entries, those not looked at for longest, and forget old ones.

        Cannot block.
        """
        table = self._entries
        for _ in range(min(entries, len(table))):
            key = next(iter(table))
            if now - table[key].seen >= self._age:
                self._remove(key)
            else:
                table.move_to_end(key)

    def _sweep_port(self, port: P, now: float) -> None:
        """Forget old ones of a port that has all it may have; looks at a few."""
        mine = self._of[port] if port in self._of else OrderedDict()
        for _ in range(min(_SWEEP_IF_FULL, len(mine))):
            key = next(iter(mine))
            if now - self._entries[key].seen >= self._age:
                self._remove(key)
            else:
                mine.move_to_end(key)

    def forget(self, port: P) -> None:
        """Forget all stations of a port. Cannot block; takes as long as there are some."""
        for key in self._of.pop(port, ()):
            del self._entries[key]

    def _remove(self, key: Key) -> None:
        self._leave(key, self._entries.pop(key).port)

    def _leave(self, key: Key, port: P) -> None:
        mine = self._of[port]
        del mine[key]
        if not mine:
            del self._of[port]
