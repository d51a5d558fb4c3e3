"""The tools and the machine that tests of the reference VMM share."""

import os
import shutil

import pytest

from tests.support.chipset import Machine


@pytest.fixture(scope="session")
def iasl():
    found = shutil.which("iasl")
    if found is None:
        message = "iasl is not installed (Debian: apt install acpica-tools)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture
def machine():
    return Machine()
