"""Messages that wait for their SynIC slot."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vmbus.errors import BudgetError
from vmbus.synic.model import Delivery, Synic, check_message
from vmbus.wire.synic import SINT_COUNT


class _Waiting(NamedTuple):
    message_type: int
    payload: bytes
    done: Callable[[Delivery], None]


class _Slot:
    """The queue of one slot."""

    __slots__ = ("again", "draining", "messages")

    def __init__(self) -> None:
        self.messages: deque[_Waiting] = deque()
        self.draining = False
        self.again = False


class MessageQueue:
    """First in, first out queues of messages, one per (VP, SINT), in front of a :class:`Synic`.

    For a VMM that has taken on a delivery and has to carry it through: it calls :meth:`put` for
    each message, :meth:`retry` from :attr:`Synic.slot_free`, and :meth:`poll` now and then if it
    cannot see all EOMs. May be used from any number of threads; callbacks run with no lock held,
    in whichever thread made the delivery, and may call back into the queue and the SynIC.

    Args:
        synic: Where messages go.
        limit: Most messages that may wait for one slot.
    """

    def __init__(self, synic: Synic, *, limit: int = 64) -> None:
        self._synic = synic
        self._limit = limit
        self._lock = threading.Lock()
        self._slots: dict[tuple[int, int], _Slot] = {}

    def __len__(self) -> int:
        """Messages that wait."""
        with self._lock:
            return sum(len(slot.messages) for slot in self._slots.values())

    def put(
        self,
        vp: int,
        sint: int,
        message_type: int,
        payload: bytes,
        done: Callable[[Delivery], None],
    ) -> None:
        """Deliver a message, now or as soon as those before it are gone. Cannot block.

        Args:
            vp: VP index.
            sint: 0 to 15.
            message_type: Not 0.
            payload: At most 240 bytes.
            done: Called once, with DELIVERED or DROPPED, perhaps before this returns.

        Raises:
            BudgetError: Too many wait already; ``done`` is not called.
            LocalProtocolError: The message cannot be sent; ``done`` is not called.
        """
        check_message(message_type, payload)
        if not (0 <= vp < self._synic.vp_count and 0 <= sint < SINT_COUNT):
            done(Delivery.DROPPED)
            return
        with self._lock:
            slot = self._slots.setdefault((vp, sint), _Slot())
            if len(slot.messages) >= self._limit:
                raise BudgetError(f"{self._limit} messages wait for SINT {sint} of VP {vp}")
            slot.messages.append(_Waiting(message_type, payload, done))
        self._drain((vp, sint), slot)

    def retry(self, vp: int) -> None:
        """Try all slots of ``vp`` again: the guest wrote EOM. Cannot block."""
        with self._lock:
            found = [(key, slot) for key, slot in self._slots.items() if key[0] == vp]
        for key, slot in found:
            self._drain(key, slot)

    def poll(self) -> bool:
        """Try all slots again; returns whether messages still wait. Cannot block."""
        with self._lock:
            found = list(self._slots.items())
        for key, slot in found:
            self._drain(key, slot)
        return len(self) > 0

    def cancel(self) -> None:
        """Drop what waits, telling each ``done`` so. Cannot block."""
        with self._lock:
            dropped = [message for slot in self._slots.values() for message in slot.messages]
            for slot in self._slots.values():
                slot.messages.clear()
        for message in dropped:
            message.done(Delivery.DROPPED)

    def _drain(self, key: tuple[int, int], slot: _Slot) -> None:
        """Deliver from the front until the slot is busy.

        One thread at a time does it, so that messages stay in order; another that comes along
        (or a callback) leaves word that it has to look once more.
        """
        with self._lock:
            if slot.draining:
                slot.again = True
                return
            slot.draining = True
        while True:
            with self._lock:
                slot.again = False
                if not slot.messages:
                    slot.draining = False
                    return
                message = slot.messages[0]
            outcome = self._synic.deliver_message(*key, message.message_type, message.payload)
            with self._lock:
                if outcome is Delivery.BUSY:
                    if slot.again:
                        continue
                    slot.draining = False
                    return
                # Unless it was cancelled meanwhile, it is still in front.
                told = bool(slot.messages) and slot.messages[0] is message
                if told:
                    slot.messages.popleft()
            if told:
                message.done(outcome)
