"""What two sides measured, side by side: the arithmetic and the table of ``make guest-bench``.

A median alone says nothing of how steady it is, and no figure anything without the machine. So the
table has the least and the most of all rounds beside each median, ratios are taken within a round,
where both sides met the same machine, and the machine's own speed, taken in each round as well,
stands above: if that spreads, so does everything.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

ROUNDS = 5
"""Below that there is no spread to speak of."""
STEPS = 1_000_000
COPY = 64 << 20
Results = dict[str, list[float]]
"""What was measured: one value a round."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What a line of the table is about; ``less`` says that less of it is better."""

    unit: str
    digits: int = 0
    less: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, and how far they are apart."""

    median: float
    least: float
    most: float

    def text(self, digits: int, unit: str = "") -> str:
        """Write it as ``median (least to most) unit``."""
        values = (self.median, self.least, self.most)
        median, least, most = (f"{value:.{digits}f}" for value in values)
        return f"{median} ({least} to {most}){unit and ' ' + unit}"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(mine: Sequence[float], theirs: Sequence[float], kind: Kind) -> list[float]:
    """Return for each round how many times better we were. Raises ValueError for other rounds."""
    pairs = list(zip(mine, theirs, strict=True))
    return [b / a if kind.less else a / b for a, b in pairs]


def order(number: int, *sides: Callable[[], None]) -> None:
    """Carry out one round; who begins changes, so that a machine that gets slower favours none."""
    first = number % len(sides)
    for side in sides[first:] + sides[:first]:
        side()


def machine_speed(clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Measure what this machine does with the least there is to do, in a tenth of a second."""
    begin = clock()
    for _ in range(STEPS):
        pass
    looped = clock()
    block = bytearray(COPY)
    view = memoryview(block)
    half = COPY // 2
    copying = clock()
    view[:half] = view[half:]
    copied = clock()
    return {
        "Python, steps of an empty loop": STEPS / (looped - begin) / 1e6,
        "copy of 32 MiB": half / (copied - copying) / 1e9,
    }


MACHINE = {
    "Python, steps of an empty loop": Kind("million/s", 1),
    "copy of 32 MiB": Kind("GB/s", 2),
}


def table(sides: Mapping[str, Results], kinds: Mapping[str, Kind]) -> list[str]:
    """Return the comparison as lines of Markdown.

    Args:
        sides: What each has measured, ours first; each title as many rounds on all of them.
        kinds: What the titles are.
    """
    (name, ours), *others = sides.items()
    heads = [name, *(head for other, _ in others for head in (other, "ratio"))]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, mine in ours.items():
        kind = kinds[title]
        cells = [spread(mine).text(kind.digits, kind.unit)]
        for _, results in others:
            theirs = results[title]
            cells.append(spread(theirs).text(kind.digits, kind.unit))
            cells.append(spread(ratios(mine, theirs, kind)).text(2))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def report(
    *,
    guest: str,
    emulator: str,
    machine: Mapping[str, Sequence[float]],
    comparison: Sequence[str],
    rounds: int,
) -> list[str]:
    """Return everything but the memory as lines of Markdown.

    Args:
        guest: Which guest it was.
        emulator: The version that the other side says it is.
        machine: :func:`machine_speed` of each round.
        comparison: The :func:`table`.
        rounds: How many there were.
    """
    few = f"; fewer than {ROUNDS} rounds say nothing of the spread" if rounds < ROUNDS else ""
    return [
        f"Guest: {guest}. Beside: {emulator}. Medians of {rounds} rounds, in which both sides took"
        f" turns, with the least and the most{few}.",
        "",
        "| this machine by itself | |",
        "|---|---|",
        *(
            f"| {title} | {spread(values).text(MACHINE[title].digits, MACHINE[title].unit)} |"
            for title, values in machine.items()
        ),
        "",
        *comparison,
    ]
