"""Each benchmark runs; what it measures is nobody's business here."""

from __future__ import annotations

import importlib

import pytest

from tests.bench import harness
from tests.bench.__main__ import MODULES

pytestmark = pytest.mark.slow

LONG = {"bench_guests"}
"""Needs a minute and a half, however few rounds: `make bench` runs it."""


@pytest.mark.parametrize("name", [name for name in MODULES if name not in LONG])
def test_a_benchmark_comes_to_its_end(name, monkeypatch):
    module = importlib.import_module(f"tests.bench.{name}")
    for each in (harness, module):
        if hasattr(each, "ROUNDS"):
            monkeypatch.setattr(each, "ROUNDS", 1)
    figures = list(module.figures())
    assert figures
    assert all(figure.value > 0 for figure in figures)
