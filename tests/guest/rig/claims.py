"""Which of several outer machines runs which test: each takes the next that nobody has taken.

The machines share a directory. A test that one has taken is a file in there, which only one of them
can create; what it was doing when it came to an end is given to the others.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ENVIRONMENT = "VMBUS_RIG_CLAIMS"
"""The variable that has the directory and the machine's number, with a colon between; unset if
there is one machine."""


class Claims:
    """The tests that have been taken.

    Args:
        folder: What the machines share.
        machine: Counts them.
    """

    def __init__(self, folder: Path, machine: int) -> None:
        self._folder = folder
        self._machine = machine

    @property
    def environment(self) -> str:
        """The value of :data:`ENVIRONMENT`."""
        return f"{self._folder}:{self._machine}"

    def _file(self, test: str) -> Path:
        return self._folder / hashlib.sha256(test.encode()).hexdigest()

    def take(self, test: str) -> bool:
        """Whether this machine is to run the test."""
        try:
            fd = os.open(self._file(test), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        with open(fd, "w") as file:
            file.write(f"{self._machine} {test}")
        return True

    def finish(self, test: str) -> None:
        """Say that the test has ended, however it did."""
        self._file(test).with_suffix(".done").touch()

    def unfinished(self) -> list[str]:
        """Return the tests that this machine has taken and not finished."""
        found = []
        for file in sorted(self._folder.iterdir()):
            if not file.suffix and not file.with_suffix(".done").exists():
                machine, _, test = file.read_text().partition(" ")
                if machine == str(self._machine):
                    found.append(test)
        return found

    def give_back(self) -> list[str]:
        """Let others take what this machine has not finished. Returns it."""
        tests = self.unfinished()
        for test in tests:
            self._file(test).unlink()
        return tests

    @property
    def finished(self) -> int:
        """How many tests have ended, on all machines."""
        return len(list(self._folder.glob("*.done")))


def take_or_leave(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Do as the hook ``pytest_runtest_protocol``: leave a test that another machine has taken.

    Returns:
        True if it is left; None if it is this machine's to run.
    """
    claims = load_claims()
    if claims is None or claims.take(item.nodeid):
        return None
    if nextitem is not None:
        # The test before has left standing what this one shares with it, its module for example,
        # and pytest does not set another one up on top of that. It has no public way to say so.
        item.session._setupstate.teardown_exact(nextitem)
    return True


def load_claims() -> Claims | None:
    """Return what the environment names, or None if all tests are this machine's."""
    value = os.environ.get(ENVIRONMENT)
    if value is None:
        return None
    folder, _, machine = value.rpartition(":")
    return Claims(Path(folder), int(machine))
