"""Every guest there is, one after another."""

from __future__ import annotations

import pytest

from tests.support.worlds import ALL
from vmbus.guest import PERSONALITIES, Personality


@pytest.fixture(params=ALL)
def personality(request: pytest.FixtureRequest) -> Personality:
    return PERSONALITIES[request.param]
