"""What the tests of the command line share: running it, a scripted server, plug-ins to find."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import trio
from click.testing import CliRunner, Result

from tests.support.patience import PATIENCE
from vmbus.attach.server import open_listener, serve_operators
from vmbus.cli.program import program


def run_cli(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(program, list(arguments), env=env, prog_name="vmbus")


def child_environment(**extra: str) -> dict[str, str]:
    """Environment in which a child finds the packages that this process has found."""
    paths = [path for path in sys.path if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TERM": "dumb", **extra}


COMMAND = [sys.executable, "-m", "vmbus.cli"]


def run_child(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=child_environment(**extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class ServerProcess:
    """A running ``vmbus serve``; its log is read line by line."""

    def __init__(self, *arguments: str, pass_fds: Sequence[int] = (), **extra: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *arguments],
            env=child_environment(**extra),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_line(self, text: str) -> str:
        """Wait for a line of the log with ``text`` in it; return it."""

        def find() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or self._ended, PATIENCE)
            line = find()
        assert line is not None, self.lines
        return line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit code once the process and its log have ended."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def serving(
    *arguments: str, ready: str = "listening on", pass_fds: Sequence[int] = (), **extra: str
) -> Iterator[ServerProcess]:
    """Run ``vmbus serve`` for the length of the block; it is ready when the block begins."""
    server = ServerProcess(*arguments, pass_fds=pass_fds, **extra)
    try:
        server.wait_line(ready)
        yield server
    finally:
        server.close()


Answer = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def scripted_server(
    path: Path, query: Answer | None = None, command: Answer | None = None
) -> Iterator[str]:
    """Answer operators on ``path`` with two functions, in a thread."""

    def run(listener: socket.socket) -> None:
        async def main() -> None:
            with scope:
                token.append(trio.lowlevel.current_trio_token())
                started.set()
                await serve_operators(listener, query=query, command=command)

        trio.run(main)

    scope = trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []
    started = threading.Event()
    with open_listener(path) as listener:
        thread = threading.Thread(target=run, args=(listener,))
        thread.start()
        assert started.wait(PATIENCE)
        try:
            yield str(path)
        finally:
            token[0].run_sync_soon(scope.cancel)
            thread.join(PATIENCE)


def install_plugin(
    directory: Path, group: str, name: str, value: str, source: str = "", *, package: str = ""
) -> None:
    """Make a package with one entry point in ``directory``, which has to be on ``sys.path``."""
    module = value.partition(":")[0]
    package = package or module
    info = directory / f"{package}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    (directory / f"{module}.py").write_text(source)


def make_channel(relid: int = 1, **changes: Any) -> dict[str, Any]:
    """A channel, as servers describe it."""
    names = ("batches", "packets_in", "packets_out", "bytes_in", "bytes_out", "signals_in",
             "signals_out", "ring_full")  # fmt: skip
    return {
        "device": 1,
        "relid": relid,
        "subchannel_index": 0,
        "outstanding": 0,
        "pending": 0,
        "incoming_size": 1000,
        "incoming_used": 0,
        "outgoing_size": 1000,
        "outgoing_used": 0,
        **dict.fromkeys(names, 0),
        **changes,
    }


def make_guest(name: str = "vm1", *channels: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A guest with one SCSI controller in the first place, as servers describe it."""
    return {
        "name": name,
        "number": 1,
        "version": "5.3",
        "memory": 1 << 30,
        "paused": False,
        "faults": 0,
        "gpadls": 0,
        "messages_waiting": 0,
        "monitor_polls": 0,
        "devices": [make_controller()],
        "channels": list(channels),
        **changes,
    }


def make_controller(place: int = 0, *units: dict[str, Any]) -> dict[str, Any]:
    """A SCSI controller, as servers describe it."""
    return {
        "key": place + 1,
        "class": "scsi",
        "instance": str(UUID(int=place)),
        "plugin": "storvsp",
        "index": place,
        "backend": "disk",
        "units": list(units),
    }


def make_unit(address: str = "0:0:0", **changes: Any) -> dict[str, Any]:
    """A disk, as servers describe it."""
    return {
        "address": address,
        "size": 1 << 20,
        "kind": "RamDisk",
        "source": "ram:1M",
        "read_only": False,
        **dict.fromkeys(("commands", "bytes_read", "bytes_written", "errors"), 0),
        **changes,
    }


def make_status(*guests: dict[str, Any]) -> dict[str, Any]:
    """The answer to the query ``guests``."""
    return {
        "server": "vmbus 1.2.3",
        "pid": 42,
        "guests_served": 7,
        "guests_attached": len(guests),
        "rss": 40 << 20,
        "guests": list(guests),
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True
