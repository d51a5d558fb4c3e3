"""The program in the README runs as it stands, and is typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.house import ROOT
from tests.support.patience import PATIENCE


@pytest.fixture
def program(tmp_path) -> Path:
    text = (ROOT / "README.md").read_text()
    (found,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    path: Path = tmp_path / "example.py"
    path.write_text(found)
    return path


def run(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Run Python where our packages are found, and nothing else of the repository."""
    ours = os.pathsep.join([str(ROOT), str(ROOT / "devices")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=where,
        env={**os.environ, "PYTHONPATH": ours, "MYPYPATH": ours},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_the_program_runs_and_says_what_it_has_done(program):
    done = run(program.name, where=program.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "VMBus 5.3 carried b'hello'\n"


@pytest.mark.slow
def test_the_program_is_typed_strictly(program):
    done = run("-m", "mypy", "--strict", program.name, where=program.parent)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
