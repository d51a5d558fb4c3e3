"""Requests that a device sends to its guest, and the completions that come back."""

from __future__ import annotations

from typing import Generic, TypeVar

from vmbus.errors import BudgetError, GuestProtocolError

T = TypeVar("T")

_SLOT_BITS = 24
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_ROUND_MASK = (1 << (63 - _SLOT_BITS)) - 1


class Transactions(Generic[T]):
    """Gives out transaction ids, and takes each back exactly once.

    An id is never 0, which drivers take for "no completion", and never has its top bit set, which
    Linux keeps for ids of its own (VMBUS_RQST_ERROR is all ones). The low 24 bits are a slot, the
    rest counts how often that slot was used: an id that a guest completes twice, or late, or that
    it made up, names nothing.

    Args:
        limit: Requests that may be under way.
    """

    def __init__(self, limit: int) -> None:
        if not 0 < limit <= _SLOT_MASK:
            raise ValueError(f"1 to {_SLOT_MASK} transactions may be under way, not {limit}")
        self._limit = limit
        self._open: dict[int, T] = {}
        self._free: list[int] = []
        self._rounds: list[int] = []

    def __len__(self) -> int:
        """Requests that are under way."""
        return len(self._open)

    @property
    def room(self) -> int:
        """How many more may begin."""
        return self._limit - len(self._open)

    def begin(self, request: T) -> int:
        """Keep a request until its completion comes. Cannot block.

        Returns:
            The transaction id to send it with.

        Raises:
            BudgetError: Too many are under way.
        """
        if len(self._open) >= self._limit:
            raise BudgetError(f"{self._limit} requests wait for the guest")
        if self._free:
            slot = self._free.pop()
            self._rounds[slot] = (self._rounds[slot] + 1) & _ROUND_MASK
        else:
            slot = len(self._rounds)
            self._rounds.append(1)
        transaction_id = self._rounds[slot] << _SLOT_BITS | slot + 1
        self._open[transaction_id] = request
        return transaction_id

    def finish_untrusted(self, transaction_id: int) -> T:
        """Return the request that a completion is for; it is under way no more. Cannot block.

        Raises:
            GuestProtocolError: No request is under way with this id.
        """
        try:
            request = self._open.pop(transaction_id)
        except KeyError:
            raise GuestProtocolError(
                f"completion of transaction {transaction_id:#x}, which is not under way",
                field="transaction_id",
            ) from None
        self._free.append((transaction_id & _SLOT_MASK) - 1)
        return request

    def abandon(self) -> list[T]:
        """Return all requests that are under way, oldest first, and forget them. Cannot block.

        For the end of a channel: late completions are errors from here on.
        """
        requests = list(self._open.values())
        for transaction_id in self._open:
            self._free.append((transaction_id & _SLOT_MASK) - 1)
        self._open.clear()
        return requests
