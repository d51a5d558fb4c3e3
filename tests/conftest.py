"""Settings of the whole test suite."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

# How long one example takes says something about the machine and nothing about the code.
settings.register_profile("vmbus", deadline=None)
settings.load_profile("vmbus")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put a net under tests that would otherwise hang for ever; ``--timeout`` sets another."""
    from tests.support.patience import WHOLE_TEST

    if config.getoption("timeout") is None:
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(WHOLE_TEST))


def pytest_collection_finish() -> None:
    """Keep what stays until the end out of the way of the garbage collector.

    Tests that count descriptors look for garbage first, which took most of their time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
async def no_descriptor_is_leaked() -> AsyncIterator[None]:
    """For tests in a loop, whose own descriptors are open before and after."""
    from tests.support.leaks import count_fds

    before = count_fds(collect=True)
    yield
    assert count_fds() == before


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    """For tests whose own loop, if they have one, ends with them."""
    from tests.support.leaks import count_fds

    before = count_fds(collect=True)
    yield
    assert count_fds() == before
