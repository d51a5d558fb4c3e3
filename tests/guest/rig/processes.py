"""Servers and VMMs as processes.

Each is what the command ``vmbus`` would be, in a process of its own; only Python is not started
and the program not imported anew, which in an emulated machine takes longer than a guest's boot.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from tests.guest.rig.namespaces import Place

PRELOAD = (
    "click", "trio", "vmbus.cli.program", "vmbus.cli.serve", "vmbus.cli.boot", "vmbus.host",
    "vmbus.server", "vmbus.attach.server", "vmbus.plugins.devices", "vmbus.supervisor",
    "vmbus.supervisor.zygote", "vmbus.cli.serving",
    "vmbus.kvm.machine", "vmbus.kvm.console", "vmbus.kvm.bzimage", "storvsp", "storvsp.plugin",
    "storvsp.disks.raw", "storvsp.disks.overlay", "storvsp.disks.ram", "storvsp.disks.cd",
    "storvsp.disks.fault", "storvsp.disks.delay", "netvsp", "netvsp.plugin",
    "netvsp.endpoints.tap", "netvsp.endpoints.nat", "netvsp.endpoints.null",
    "netvsp.endpoints.switch",
)  # fmt: skip

T = TypeVar("T")
_context = multiprocessing.get_context("forkserver")


def start_forking() -> None:
    """Start the process that all others are forked from, which takes a while."""
    _context.set_forkserver_preload(list(PRELOAD))
    multiprocessing.forkserver.ensure_running()


def _become(fd: int, number: int) -> None:
    """Let ``fd`` be descriptor ``number`` from now on."""
    os.dup2(fd, number)
    os.close(fd)


def _main(
    arguments: Sequence[str],
    stdin: Connection | None,
    stdout: Connection | None,
    log: str,
    place: Place | None,
) -> None:
    """Be ``vmbus ARGUMENTS``, in the child."""
    os.setsid()
    if place is not None:
        place.enter()
    _become(os.open(os.devnull, os.O_RDONLY) if stdin is None else os.dup(stdin.fileno()), 0)
    _become(os.open(os.devnull, os.O_WRONLY) if stdout is None else os.dup(stdout.fileno()), 1)
    _become(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    for end in (stdin, stdout):
        if end is not None:
            end.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments[0] == "serve":
        _fork_zygote()
    from vmbus.cli.program import program

    code: object = 70
    try:
        program.main(list(arguments), prog_name="vmbus")
    except SystemExit as end_of_it:
        code = end_of_it.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the end that multiprocessing gives its children: it waits for threads.
    os._exit(code if isinstance(code, int) else 1)


def _fork_zygote() -> None:
    """Have the server's zygote here, before there is a loop, instead of starting a program."""
    from vmbus.supervisor import supervisor, zygote

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        sys.argv = ["zygote", str(theirs.detach())]
        try:
            zygote.main()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    theirs.close()

    async def wait() -> None:
        os.waitpid(pid, 0)  # it has been told to end

    async def started() -> tuple[socket.socket, Callable[[], Awaitable[object]]]:
        await trio.lowlevel.checkpoint()
        return ours, wait

    supervisor.start_zygote = started


class Source(Protocol):
    """Something to read."""

    def fileno(self) -> int:
        """Return its descriptor."""

    def close(self) -> None:
        """Close it."""


class Lines:
    """Reads output in a thread, and waits for what comes.

    Args:
        source: Owned.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._source.fileno(), 1 << 16)
            except OSError:
                data = b""
            with self._changed:
                self._data += data
                self._ended = not data
                self._changed.notify_all()
            if not data:
                self._source.close()
                return

    @property
    def data(self) -> bytes:
        """All that has come."""
        with self._changed:
            return bytes(self._data)

    def wait_for(self, find: Callable[[bytearray], T | None], seconds: float) -> T:
        """Return what ``find`` makes of all that has come, as soon as it is not None.

        Raises:
            TimeoutError: It did not come.
            EOFError: It will not come any more.
        """
        found: list[T] = []

        def ready() -> bool:
            result = find(self._data)
            if result is not None:
                found.append(result)
            return bool(found) or self._ended

        with self._changed:
            if not self._changed.wait_for(ready, seconds):
                raise TimeoutError(f"nothing came for {seconds:g} s")
        if not found:
            raise EOFError("the guest has ended")
        return found[0]


class Command:
    """A running ``vmbus`` command.

    Args:
        arguments: Behind ``vmbus``.
        log: What it writes to standard error goes here.
        console: Give it a standard input to write to, and output to read: :attr:`console`.
        place: The network that it has; None: the machine's own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        console: bool = False,
        place: Place | None = None,
    ) -> None:
        self.log_path = log
        log.write_bytes(b"")  # what an earlier one said is not what this one says
        self._input: Connection | None = None
        self.output: Lines | None = None
        stdin = stdout = source = None
        if console:
            stdin, self._input = _context.Pipe(duplex=False)
            source, stdout = _context.Pipe(duplex=False)
        self._process: BaseProcess = _context.Process(
            target=_main, args=(list(arguments), stdin, stdout, str(log), place), daemon=True
        )
        self._process.start()
        for end in (stdin, stdout):
            if end is not None:
                end.close()
        if source is not None:
            self.output = Lines(source)

    def write(self, data: bytes) -> None:
        """Write to its standard input. Raises BrokenPipeError if it has ended."""
        assert self._input is not None
        while data:
            data = data[os.write(self._input.fileno(), data) :]

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def log(self) -> str:
        """What it has written to standard error."""
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:  # it was never started
            return ""

    def wait(self, seconds: float) -> int:
        """Return the exit code. Raises TimeoutError."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} does not end; its log:\n{self.log()}")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, whatever it does. Idempotent."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        if self._input is not None:
            self._input.close()
