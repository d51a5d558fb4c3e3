"""Whatever comes and goes at the gate, nobody is where somebody else is alone, and all get in."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given, strategies as st

from storvsp.scsi.gate import EVERYWHERE, SECTION_SHIFT, Gate, sections
from tests.support.patience import PATIENCE

lbas = st.integers(0, (1 << 64) - 1)
counts = st.integers(0, 1 << 32)
places = st.one_of(
    st.just(EVERYWHERE), st.integers(0, 5).map(lambda at: sections(at << SECTION_SHIFT, 3000))
)


@given(lbas, counts, st.integers(-(1 << 18), 1 << 18), counts)
def test_ranges_that_overlap_are_in_a_common_section(lba, count, distance, other):
    second = max(lba + distance, 0)
    if max(lba, second) < min(lba + count, second + other):
        assert sections(lba, count) & sections(second, other)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.booleans(), places, st.integers(0, 4), st.booleans()),
        max_size=20,
    ),
    st.randoms(use_true_random=False),
)
def test_nobody_is_where_somebody_else_is_alone(commands, chance):
    inside: list[tuple[bool, int]] = []
    gate = Gate(lambda: None)
    ended = 0

    async def command(
        scope: trio.CancelScope, whose: int, exclusive: bool, where: int, steps: int
    ) -> None:
        with scope:
            await pass_by(whose, exclusive, where, steps)

    async def pass_by(whose: int, exclusive: bool, where: int, steps: int) -> None:
        nonlocal ended
        await gate.acquire(exclusive=exclusive, whose=whose, where=where)
        try:
            for other, place in inside:
                assert not (exclusive or other) or not where & place
            inside.append((exclusive, where))
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
                assert gate.bars(where) == any(alone and where & at for alone, at in inside)
        finally:
            inside.remove((exclusive, where))
            gate.release(exclusive=exclusive, where=where)
        ended += 1

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            given_up = []
            for whose, exclusive, where, steps, stays in commands:
                scope = trio.CancelScope()
                nursery.start_soon(command, scope, whose, exclusive, where, steps)
                if not stays:
                    given_up.append(scope)
                if chance.random() < 0.5:
                    await trio.lowlevel.checkpoint()
                if given_up and chance.random() < 0.5:
                    given_up.pop().cancel()
        assert not gate.closed
        assert ended >= sum(each[4] for each in commands)
        with trio.fail_after(PATIENCE):
            await gate.acquire(exclusive=True)

    trio.run(run)
