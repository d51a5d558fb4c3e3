"""Several outer machines share the tests out among themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests
from tests.guest.rig.claims import ENVIRONMENT, Claims, load_claims

CONFTEST = """
from tests.guest.rig.claims import take_or_leave

def pytest_runtest_protocol(item, nextitem):
    return take_or_leave(item, nextitem)
"""
MODULE = """
def test_a():
    pass

def test_b():
    pass
"""


def test_each_test_is_one_machines(tmp_path):
    first, second = Claims(tmp_path, 1), Claims(tmp_path, 2)
    assert first.take("tests/a.py::test_a[x/y]")
    assert not second.take("tests/a.py::test_a[x/y]")
    assert second.take("tests/a.py::test_b")
    assert not first.take("tests/a.py::test_b")
    first.finish("tests/a.py::test_a[x/y]")
    assert first.unfinished() == []
    assert second.unfinished() == ["tests/a.py::test_b"]
    assert first.finished == second.finished == 1


def test_what_a_machine_was_doing_when_it_ended_is_run_by_another(tmp_path):
    first, second = Claims(tmp_path, 1), Claims(tmp_path, 2)
    assert first.take("done")
    assert first.take("under way")
    assert second.take("elsewhere")
    first.finish("done")
    assert first.give_back() == ["under way"]
    assert not second.take("done")
    assert second.take("under way")
    assert first.give_back() == []
    assert sorted(second.unfinished()) == ["elsewhere", "under way"]


def test_a_machine_by_itself_runs_everything(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_claims() is None
    monkeypatch.setenv(ENVIRONMENT, Claims(tmp_path, 3).environment)
    claims = load_claims()
    assert claims is not None
    assert claims.take("some")
    assert Claims(tmp_path, 3).unfinished() == ["some"]


@pytest.mark.parametrize("elsewhere", ["one b", "one a, two a", "two b, one b", "two a, two b"])
def test_a_test_that_is_left_to_another_machine_spoils_none_of_ours(tmp_path, elsewhere):
    for name in ("one", "two", "three"):
        (tmp_path / f"test_{name}.py").write_text(MODULE)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    folder = tmp_path / "claims"
    folder.mkdir()
    taken = [each.split() for each in elsewhere.split(", ")]
    for module, test in taken:
        assert Claims(folder, 2).take(f"test_{module}.py::test_{test}")

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=tmp_path,
        env={
            **os.environ,
            ENVIRONMENT: Claims(folder, 1).environment,
            "PYTHONPATH": str(Path(tests.__path__[0]).parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{6 - len(taken)} passed" in ran.stdout
