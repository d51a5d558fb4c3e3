"""What the client library needs of its surroundings."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_the_client_needs_neither_trio_nor_construct() -> None:
    code = "import sys, vmbus.attach.client; print({'trio', 'construct'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
