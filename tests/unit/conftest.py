"""Guest memory for tests of rings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = allocate_memory(300 * PAGE_SIZE)
    yield memory
    memory.close()
