"""An image file, for every test that wants one."""

import os

import pytest

from tests.support.disks import MIB


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path
