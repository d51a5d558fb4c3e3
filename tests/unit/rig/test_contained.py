"""Programs of the rig end with it, whatever it ends by."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Runs a program that starts another one and waits; both hold our pipe open as long as they live.
RIG = """
import sys
from tests.guest.rig.contained import contained, end_in_order
end_in_order()
try:
    with contained(["sh", "-c", "sleep 1000 & echo started; wait"]) as process:
        if sys.argv[1] == "end":
            raise RuntimeError("an end")
        process.wait()
finally:
    print("cleared away", flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "clears"),
    [
        (None, True),
        (signal.SIGTERM, True),
        (signal.SIGHUP, True),
        (signal.SIGINT, True),
        (signal.SIGKILL, False),
    ],
    ids=str,
)
def test_nothing_outlives_the_rig(ending: signal.Signals | None, clears: bool):
    reader, writer = os.pipe()
    rig = subprocess.Popen(
        [sys.executable, "-c", RIG, "end" if ending is None else "wait"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    with open(reader, "rb") as output:
        if ending is not None:
            assert output.readline() == b"started\n"
            rig.send_signal(ending)
        # This ends when the last process that has the pipe is gone.
        rest = output.read()
    assert rig.wait() != 0
    assert (b"cleared away" in rest) == clears
