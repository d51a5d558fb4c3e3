"""What all tests of ``vmbus-user`` need: both kinds of sockets, and no descriptor left open."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.attach import Recorder, make_eventfd
from tests.support.attach_client import RudeServer
from vmbus.attach.client.attachment import Attachment


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
