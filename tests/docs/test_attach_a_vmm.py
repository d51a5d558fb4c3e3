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
        done = run_example(path)
        assert (done.returncode, done.stderr) == (0, "")
        assert server.wait() == 0, server.lines
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert done.stdout == printed


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_the_example_says_what_it_wants(tmp_path):
    assert run_example().stderr == "usage: python example_vmm.py SOCKET\n"
    nobody = run_example(str(tmp_path / "vm.sock"))
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr == f"cannot connect to {tmp_path}/vm.sock: No such file or directory\n"
