"""How the benchmarks measure and what they report.

A figure means little without knowing the machine, so each one is divided by a *floor*: the least
that any Python program would have to do for it (the bare ``preadv``, the bare copy, the bare
``struct`` parse), measured in the same run on the same machine. Figures are medians of several
rounds; nothing here passes or fails.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable

ROUNDS = 7


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    name: str
    value: float
    unit: str
    floor_name: str = ""
    floor: float = 0.0
    target: float | None = None
    """What the design asks for, in ``unit``; smaller is better."""

    @property
    def ratio(self) -> float | None:
        """How many times the floor, or None without one."""
        return self.value / self.floor if self.floor else None

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def median_ns(run: Callable[[int], None], count: int) -> float:
    """Return the median over rounds of the nanoseconds that one of ``count`` operations takes.

    Args:
        run: Does the operation as many times as it is told.
        count: Operations per round; there is one in the beginning that is not counted.
    """
    run(max(1, count // 10))
    times = []
    for _ in range(ROUNDS):
        gc.collect()
        start = time.perf_counter_ns()
        run(count)
        times.append((time.perf_counter_ns() - start) / count)
    return statistics.median(times)
