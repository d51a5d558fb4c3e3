"""Standard streams that are closed, full, or have lost their reader."""

import subprocess
import sys

import pytest

from tests.support.cli import child_environment
from tests.support.patience import PATIENCE


def run(body: str, shell: str = "{}") -> subprocess.CompletedProcess[str]:
    """Run a program that is guarded, with its streams as the shell arranges them."""
    program = (
        "import os, sys\n"
        "from vmbus.streams import OutputError, guarded\n"
        f"def work():\n    {body}\n    return 0\n"
        "sys.exit(guarded(work))"
    )
    return subprocess.run(
        shell.format(f"{sys.executable} -c '{program}'"),
        shell=True,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


PRINT = 'print("x" * 10)'
GROUP = (
    "import trio\n"
    "    async def say(): print(1, flush=True)\n"
    "    async def main():\n"
    "        async with trio.open_nursery() as nursery: nursery.start_soon(say)\n"
    "    trio.run(main)"
)


@pytest.mark.parametrize(
    "body", [PRINT, f"{PRINT}; sys.stdout.flush()", f"{PRINT}; sys.exit(0)", GROUP]
)
@pytest.mark.parametrize(
    ("shell", "told"),
    [
        ("{} >/dev/full", "Error: standard output: No space left on device\n"),
        ("{} >&-", "Error: standard output: Bad file descriptor\n"),
        ("{} >&- <&-", "Error: standard output: Bad file descriptor\n"),
        ("{} >&- 2>&- <&-", ""),
        ("{} >/dev/full 2>/dev/full", ""),
    ],
)
def test_output_that_cannot_be_written_ends_a_program_with_1(body, shell, told):
    result = run(body, shell)
    assert (result.returncode, result.stderr) == (1, told)


@pytest.mark.parametrize("body", [PRINT, f"{PRINT}; sys.stdout.flush()", GROUP])
def test_a_reader_that_has_left_is_not_talked_about(body):
    result = run(f"sys.stdin.read(); {body}", "(sleep 0.2 | {}; echo $? >&2) | true")
    assert result.stderr == "1\n"


@pytest.mark.parametrize("shell", ["{} >&-", "{} 2>&-", "{} <&-", "{} >&- 2>&- <&-"])
def test_who_prints_nothing_does_not_mind_closed_streams(shell):
    result = run("assert sys.stdin.read() == str() if sys.stdin else 1", shell + " </dev/null")
    assert (result.returncode, result.stderr) == (0, "")
    # The next file that is opened is none of the standard streams.
    assert run('sys.exit(os.open("/", 0))', shell).returncode > 2


@pytest.mark.parametrize(
    ("body", "code"), [("sys.exit(7)", 7), ("sys.exit()", 0), ('sys.exit("why")', 1), ("0", 0)]
)
def test_exit_codes_are_kept(body, code):
    assert run(body).returncode == code
    assert run(body, "{} 2>/dev/full").returncode == code


def test_other_errors_are_left_alone():
    result = run('raise FileNotFoundError(2, "No", "file")')
    assert (result.returncode, "Traceback" in result.stderr) == (1, True)
