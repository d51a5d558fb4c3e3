"""docs/howto/attach-a-vmm.md quotes the code as it is, and its example attaches."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.cli import child_environment, serving
from tests.support.house import ROOT
from tests.support.patience import PATIENCE

PAGE = (ROOT / "docs/howto/attach-a-vmm.md").read_text()
EXAMPLE = ROOT / "docs/howto/example_vmm.py"


def test_the_page_shows_code_that_is_there():
    delegate, order = re.findall(r"```python\n( .*?)```", PAGE, re.DOTALL)
    assert delegate in (ROOT / "vmbus/attach/client/machine.py").read_text()
    assert order in EXAMPLE.read_text()


def test_the_example_attaches_and_prints_what_the_page_says(tmp_path):
    path = str(tmp_path / "vm.sock")
    with serving("--socket", path, "--disk", "ram:1M", "--once") as server:
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), path],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert server.wait() == 0, server.lines
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("closed: ")]
    assert lines == printed.splitlines()
