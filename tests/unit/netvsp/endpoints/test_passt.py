"""A passt that ends by itself, and what is said of it."""

from __future__ import annotations

import pytest

from netvsp.endpoints.passt import Passt, PasstEndpoint, spawn
from tests.support.leaks import count_fds
from vmbus.errors import ConfigError


class Program:
    """Starts a shell instead."""

    def __init__(self, script: str) -> None:
        self.script = script

    async def start(self) -> Passt:
        process, sock, messages = await spawn("/bin/sh", ["-c", self.script])
        return Passt(sock, messages, process.pid, process)

    def close(self) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo all is well >&2; kill -KILL $$", "killed by SIGKILL; it said last: all is well"),
        ("kill -40 $$", "killed by signal 40; it says nothing"),
        ("echo no such option >&2; exit 3", "exit status 3; it said last: no such option"),
        ("exit 0", "exit status 0; it says nothing"),
    ],
    ids=["signal", "real-time-signal", "status", "nothing"],
)
async def test_how_a_program_ended_comes_before_what_it_said(script, words):
    before = count_fds(collect=True)
    with pytest.raises(ConfigError) as caught:
        await PasstEndpoint.open(Program(script))
    assert str(caught.value) == f"passt has ended: {words}"
    assert count_fds() == before
