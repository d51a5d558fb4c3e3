"""The page of the docs that the benchmarks make: a section for each kind, with the prose that goes
with its table.

A section begins with a comment that has its name. Those whose benchmarks were not run stay as they
are in the page that was there, so the page can be made one part at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from tests.bench.bench_channels import LONGEST, MEDIAN
from tests.bench.bench_guests import MODES
from tests.bench.harness import Figure

HEAD = """# Benchmarks

`python -m tests.bench --markdown docs/reference/benchmarks.md` makes this page, `make bench` prints
the figures, and `--only WORD` runs, and replaces, a part. Absolute figures say as much about the
machine as about the code, so each section says how long a bare `preadv` of 4 KiB from the page
cache took on it, in Python.
"""

Table = Callable[[Sequence[Figure]], list[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """A part of the page."""

    name: str
    modules: tuple[str, ...]
    """Whose figures it has; all of them have to have run."""
    text: str
    """Title, if any, and what is to be known of the figures."""
    table: Table


def plain(figures: Sequence[Figure]) -> list[str]:
    """Return the lines of a table of figures, each beside its floor."""
    rows = [
        "| what | measured | floor | times the floor | target |",
        "|---|---|---|---|---|",
    ]
    for each in figures:
        floor = f"{each.floor_name}, {each.floor:.2f} {each.unit}" if each.floor else ""
        ratio = f"{each.ratio:.1f}" if each.ratio is not None else ""
        rows.append(
            f"| {each.name} | {each.value:.2f} {each.unit} | {floor} | {ratio} | {_target(each)} |"
        )
    return rows


def side_by_side(ends: Sequence[str], heads: Sequence[str], joint: str) -> Table:
    """Return what makes a table with several figures of each kind in a row.

    Args:
        ends: How their names end.
        heads: Of their columns.
        joint: What is before the end in a name.
    """

    def table(figures: Sequence[Figure]) -> list[str]:
        found: dict[str, dict[str, Figure]] = {}
        for each in figures:
            name, _, end = each.name.rpartition(joint)
            if end not in ends:  # it is of no kind, or of the first one only
                name, end = each.name, ends[0]
            found.setdefault(name, {})[end] = each
        rows = [f"| what | {' | '.join(heads)} | target |", f"|---|{'---|' * len(heads)}---|"]
        for name, by_end in found.items():
            cells = [
                f"{by_end[end].value:.1f} {by_end[end].unit}" if end in by_end else ""
                for end in ends
            ]
            target = max(map(_target, by_end.values()))
            rows.append(f"| {name} | {' | '.join(cells)} | {target} |")
        return rows

    return table


def turns(figures: Sequence[Figure]) -> list[str]:
    """Return the lines of a table of turns beside what they took once."""
    rows = ["| what | before | now | target |", "|---|---|---|---|"]
    for each in figures:
        before = f"{BEFORE[each.name]} ms" if each.name in BEFORE else ""
        rows.append(f"| {each.name} | {before} | {each.value:.0f} {each.unit} | {_target(each)} |")
    return rows


BEFORE = {
    "16 channels: lists of 65 000 pages": 1592,
    "16 channels: scattered reads of 2 MiB": 288,
    "16 channels: REPORT SUPPORTED OPERATION CODES": 351,
    "16 channels: commands that wait": 257,
    "16 x GET LBA STATUS, shredded overlay": 9373,
    "16 x GET LBA STATUS, shredded raw file": 377,
    "4 x READ of 8 MiB, shredded overlay": 5437,
    "UNMAP of 1 GiB, RAM disk": 44,
    "FORMAT UNIT of 1 GiB, RAM disk": 48,
    "reset of 2000 commands that wait": 194,
}
"""Milliseconds before turns were bounded in work, single runs on a loaded machine."""


def _target(figure: Figure) -> str:
    return f"at most {figure.target:g} {figure.unit}" if figure.target is not None else ""


SECTIONS = (
    Section(
        "one request, one channel, one guest",
        ("bench_ring", "bench_storvsp", "bench_control", "bench_memory"),
        """Medians of several rounds. Beside a figure is its *floor*, the least that any Python
program would have to do for it, measured in the same run. Storage figures are the host's side
alone, from a full ring to the interrupt: ring, vstor, SCSI, disk and back.""",
        plain,
    ),
    Section(
        "guests",
        ("bench_guests",),
        """## Guests beside each other

Guests are Python programs that take more of the processor than the server does, so two cores are
full with one of them; what the table shows is that processes cost no throughput, and how long a
guest waits that asks for one read a millisecond beside a neighbour that does its worst.""",
        side_by_side([*MODES], [*MODES], ", "),
    ),
    Section(
        "channels",
        ("bench_channels",),
        """## Channels beside each other

How long a read of 4 KiB takes on one channel of a guest while fifteen other ones of the same guest
have full queues; without the guest's half.""",
        side_by_side([MEDIAN, LONGEST], ["median", "longest"], ": "),
    ),
    Section(
        "network",
        ("bench_netvsp", "bench_switch"),
        """## Frames

What a frame costs the host on its way, without the guest's half; through the switch, all processes
together.""",
        plain,
    ),
    Section(
        "traces",
        ("bench_trace",),
        """## Traces

A record is a message, a packet, or a piece of the memory that one points to: a recorded read has
three. Recording is measured without the file, in the process that serves the guest.""",
        plain,
    ),
    Section(
        "turns",
        ("bench_turns",),
        """## Longest turns

Processor time of the loop's thread in its longest turn while one guest does the most of one kind:
single runs, so orders of magnitude. The first figure is from before turns were bounded in work, of
a loaded machine.""",
        turns,
    ),
)

_MARK = "<!-- section: {} -->"


def make_page(old: str, figures: Mapping[str, Sequence[Figure]], machine: str) -> str:
    """Return the page.

    Args:
        old: The page that was there, or nothing.
        figures: What has been measured, by module.
        machine: What it was measured on, in words.
    """
    parts = re.split(f"^{_MARK.format('(.*)')}\n", old, flags=re.MULTILINE)
    kept = dict(zip(parts[1::2], parts[2::2], strict=True))
    page = [HEAD]
    for section in SECTIONS:
        body = kept.get(section.name, "").strip()
        if all(module in figures for module in section.modules):
            found = [each for module in section.modules for each in figures[module]]
            body = "\n\n".join((section.text, machine, "\n".join(section.table(found))))
        if body:
            page.append(f"{_MARK.format(section.name)}\n{body}\n")
    return "\n".join(page)
