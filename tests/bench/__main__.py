"""Run the benchmarks: ``python -m tests.bench [--json FILE] [--only WORD]``."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from pathlib import Path

from tests.bench.harness import Figure

MODULES = (
    "bench_ring",
    "bench_storvsp",
    "bench_control",
    "bench_memory",
    "bench_turns",
    "bench_switch",
    "bench_guests",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--markdown", type=Path, help="write the table as a page of the docs")
    parser.add_argument("--only", default="", help="only modules with this in their name")
    options = parser.parse_args()
    figures: list[Figure] = []
    for name in MODULES:
        if options.only in name:
            module = importlib.import_module(f"tests.bench.{name}")
            for figure in module.figures():
                figures.append(figure)
                print(_line(figure), flush=True)
    if options.json:
        report = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "kernel": platform.release(),
            "figures": [figure.as_dict() for figure in figures],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(_page(figures))


HEAD = """# Benchmarks

Made by `make bench` (`python -m tests.bench --markdown docs/reference/benchmarks.md`): medians of
several rounds on one otherwise idle core of a two-core x86-64 virtual machine, {python}. Absolute
figures say as much about the machine as about the code, so each stands beside a *floor*, the least
that any Python program would have to do for it, measured in the same run. Storage figures are the
host's side alone, from a full ring to the interrupt: ring, vstor, SCSI, disk and back.

| what | measured | floor | times the floor | target |
|---|---|---|---|---|
"""


def _page(figures: list[Figure]) -> str:
    rows = []
    for figure in figures:
        floor = f"{figure.floor_name}, {figure.floor:.2f} {figure.unit}" if figure.floor else ""
        ratio = f"{figure.ratio:.1f}" if figure.ratio is not None else ""
        target = f"at most {figure.target:g} {figure.unit}" if figure.target is not None else ""
        rows.append(
            f"| {figure.name} | {figure.value:.2f} {figure.unit} | {floor} | {ratio} | {target} |"
        )
    python = f"CPython {platform.python_version()}"
    return HEAD.format(python=python) + "\n".join(rows) + "\n"


def _line(figure: Figure) -> str:
    line = f"{figure.name:<48} {figure.value:>10.2f} {figure.unit:<4}"
    if figure.ratio is not None:
        line += f" {figure.ratio:>7.1f} x {figure.floor_name} ({figure.floor:.2f} {figure.unit})"
    if figure.target is not None:
        line += f"   target {figure.target:g}"
    return line


if __name__ == "__main__":
    main()
