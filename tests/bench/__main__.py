"""Run the benchmarks: ``python -m tests.bench [--json FILE] [--markdown PAGE] [--only WORD]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path

from tests.bench import harness
from tests.bench.bench_storvsp import preadv_floor
from tests.bench.harness import Figure
from tests.bench.page import make_page

MODULES = (
    "bench_ring",
    "bench_storvsp",
    "bench_control",
    "bench_memory",
    "bench_netvsp",
    "bench_turns",
    "bench_switch",
    "bench_guests",
    "bench_channels",
    "bench_trace",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--markdown", type=Path, help="make this page of the docs, or its part")
    parser.add_argument("--only", default="", help="only modules with this in their name")
    parser.add_argument(
        "--rounds", type=int, default=harness.ROUNDS, help="fewer are quicker, and say less"
    )
    options = parser.parse_args()
    harness.ROUNDS = options.rounds
    figures: dict[str, list[Figure]] = {}
    for name in MODULES:
        if options.only in name:
            module = importlib.import_module(f"tests.bench.{name}")
            figures[name] = []
            for figure in module.figures():
                figures[name].append(figure)
                print(_line(figure), flush=True)
    if options.json:
        report = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "kernel": platform.release(),
            "figures": [figure.as_dict() for some in figures.values() for figure in some],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        page = options.markdown
        old = page.read_text() if page.exists() else ""
        page.write_text(make_page(old, figures, _machine()))


def _machine() -> str:
    """Say what the figures were measured on."""
    return (
        f"CPython {platform.python_version()}, {platform.machine()}, {os.cpu_count()} processors; "
        f"a bare `preadv` of 4 KiB: {preadv_floor() / 1000:.2f} us."
    )


def _line(figure: Figure) -> str:
    line = f"{figure.name:<48} {figure.value:>10.2f} {figure.unit:<4}"
    if figure.ratio is not None:
        line += f" {figure.ratio:>7.1f} x {figure.floor_name} ({figure.floor:.2f} {figure.unit})"
    if figure.target is not None:
        line += f"   target {figure.target:g}"
    return line


if __name__ == "__main__":
    main()
