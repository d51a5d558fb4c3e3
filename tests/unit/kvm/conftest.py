"""The tools and the machine that tests of the reference VMM share."""

import shutil

import pytest

from tests.support.chipset import Machine


@pytest.fixture(scope="session")
def iasl():
    found = shutil.which("iasl")
    if found is None:
        pytest.fail("iasl is not installed; make tools installs it")
    return found


@pytest.fixture
def machine():
    return Machine()
