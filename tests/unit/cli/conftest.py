"""Where a server is to listen."""

import pytest


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "socket")
