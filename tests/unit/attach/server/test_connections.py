"""Accepting connections when that fails."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from tests.support.attach import Bus, raw_vmm
from tests.support.patience import PATIENCE
from vmbus.attach.server import open_listener, serve
from vmbus.attach.server.connections import accept
from vmbus.log_budget import LogBudget

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


async def test_a_lack_of_descriptors_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    import errno

    class Exhausted:
        def __init__(self, sock: socket.socket, failures: list[OSError]) -> None:
            self._sock = sock
            self.failures = failures

        def fileno(self) -> int:
            return self._sock.fileno()

        def setblocking(self, _: object) -> None:
            self._sock.setblocking(False)

        def accept(self) -> tuple[socket.socket, object]:
            if self.failures:
                raise self.failures.pop(0)
            return self._sock.accept()

    with open_listener(tmp_path / "s") as listener, raw_vmm(tmp_path / "s"):
        failing = Exhausted(
            listener,
            [OSError(errno.EMFILE, "too many"), ConnectionAbortedError(), BlockingIOError()],
        )
        sock = await accept(failing, LogBudget())  # type: ignore[arg-type]
        assert failing.failures == []
        sock.close()
        with raw_vmm(tmp_path / "s"):
            failing.failures.append(OSError(errno.EINVAL, "broken"))
            with pytest.raises(OSError, match="broken"):
                await accept(failing, LogBudget())  # type: ignore[arg-type]


async def test_a_broken_listener_ends_the_server(tmp_path: Path) -> None:
    # Neither listening nor connected: treated as a connection, which is dead.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with trio.fail_after(PATIENCE):
        await serve(sock, Bus())
    assert sock.fileno() == -1
