"""Transaction ids: whatever a guest completes, each request ends once."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vmbus.errors import BudgetError, GuestProtocolError
from vmbus.host.transactions import Transactions

LIMIT = 8
STEPS = st.lists(
    st.one_of(
        st.just("begin"),
        st.tuples(st.just("finish"), st.integers(0, 40)),
        st.tuples(st.just("invent"), st.integers(0, (1 << 64) - 1)),
        st.just("abandon"),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_request_ends_once_and_nothing_that_was_not_begun(steps):
    transactions: Transactions[int] = Transactions(LIMIT)
    under_way: dict[int, int] = {}
    given_out: list[int] = []
    for number, step in enumerate(steps):
        match step:
            case "begin" if len(under_way) == LIMIT:
                with pytest.raises(BudgetError):
                    transactions.begin(number)
            case "begin":
                ident = transactions.begin(number)
                assert 0 < ident < 1 << 63
                assert ident not in given_out, "an id names one request, for good"
                given_out.append(ident)
                under_way[ident] = number
            case "abandon":
                assert transactions.abandon() == list(under_way.values())
                under_way.clear()
            case (str(kind), int(value)):
                ident = (
                    given_out[value % len(given_out)] if kind == "finish" and given_out else value
                )
                if ident in under_way:
                    assert transactions.finish_untrusted(ident) == under_way.pop(ident)
                else:
                    with pytest.raises(GuestProtocolError):
                        transactions.finish_untrusted(ident)
            case _:
                raise AssertionError(step)
        assert len(transactions) == len(under_way)
        assert transactions.room == LIMIT - len(under_way)


@pytest.mark.parametrize("limit", [0, -1, 1 << 24])
def test_a_limit_that_makes_no_sense_is_refused(limit):
    with pytest.raises(ValueError, match="may be under way"):
        Transactions(limit)
