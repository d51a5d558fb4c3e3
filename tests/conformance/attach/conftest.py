"""What all tests of ``vmbus-user`` need: both kinds of sockets, and no descriptor left open."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.attach import Recorder, count_fds, make_eventfd
from tests.support.attach_client import RudeServer
from vmbus.attach.client.attachment import Attachment


@pytest.fixture
async def no_descriptor_is_leaked() -> AsyncIterator[None]:
    """For tests in a loop, whose own descriptors are open before and after."""
    before = count_fds(collect=True)
    yield
    assert count_fds() == before


@pytest.fixture
def no_descriptor_is_leaked_by_threads() -> Iterator[None]:
    """For tests without a loop of their own."""
    before = count_fds(collect=True)
    yield
    assert count_fds() == before


@pytest.fixture(params=["seqpacket", "stream"])
def mode(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = make_eventfd()
    yield fd
    os.close(fd)


@pytest.fixture
def rude(mode: str) -> Iterator[RudeServer]:
    server = RudeServer(mode)
    yield server
    server.close()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def attached(rude: RudeServer, recorder: Recorder) -> Iterator[Attachment]:
    with rude.attach(recorder) as attachment:
        yield attachment
