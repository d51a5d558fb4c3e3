"""``vmbus demo``: a server, a guest in another process, and an operator who adds a disk.

Then two guests on a switch (:mod:`vmbus.cli.demo_network`). The server is ``vmbus serve`` and the
guest is the program that the device's plug-in names, each as anybody could start them; this program
makes the images, passes the operator's commands, looks on and keeps the books.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import click
import trio

from vmbus.attach.client import operator
from vmbus.cli import demo_child
from vmbus.cli.completion import complete_spec
from vmbus.cli.demo_child import LISTENING, Child, Lines, how
from vmbus.cli.demo_network import make_network
from vmbus.cli.demo_report import Event, Images, Report, size_option
from vmbus.cli.demo_room import check_machine
from vmbus.cli.demo_view import Line, View, make_view, show, summarize
from vmbus.cli.output import print_json
from vmbus.cli.params import Number, json_option, parse_size, seconds_type
from vmbus.cli.program import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UsageFailure
from vmbus.errors import AttachError, ConfigError
from vmbus.guest.personality import PERSONALITIES
from vmbus.plugins.devices import device_with, load_device

BACKEND = "disk"
"""What the devices have that the demo is about."""
HOT_SIZE = 16 << 20
"""Bytes of the disk that comes and goes, at most."""
MIN_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command line of ``vmbus demo``, understood."""

    guest: str
    disks: tuple[str, ...]
    channels: int
    depth: int
    seconds: float
    size: int


@click.command(
    epilog="Exit codes: 0 if every byte was verified, 1 if not or if something failed, 130 after "
    "Ctrl-C. docs/tutorials/demo.md explains each line."
)
@click.option(
    "--guest",
    type=click.Choice(list(PERSONALITIES)),
    default="linux-6.1",
    show_default=True,
    help="Whose drivers the guest plays.",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="SPEC",
    shell_complete=complete_spec,
    help="One more disk, scheme:[options]target; may be repeated. The guest overwrites it.",
)
@click.option(
    "--channels",
    type=Number(1, 16),
    default=4,
    show_default=True,
    help="Channels to the controller, and VPs of the guest.",
)
@click.option(
    "--depth", type=Number(1, 1024), default=32, show_default=True,
    help="Requests in flight.",
)  # fmt: skip
@click.option(
    "--seconds",
    type=seconds_type(0, 1e6),
    default=6.0,
    show_default=True,
    help="Time for the work on all disks together; each is written and read at least once.",
)
@click.option(
    "--size", type=parse_size, default="32M", show_default=True, metavar="SIZE",
    help="Size of the disks, and how much of others is used.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep images and logs even if all is well.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    *,
    guest: str,
    disks: tuple[str, ...],
    channels: int,
    depth: int,
    seconds: float,
    size: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Show a guest at work: it comes up on our bus, finds its disks and uses them.

    Starts a server with four disks and a guest in a process of its own, which share the guest's
    memory and nothing else. The guest negotiates, opens its channels, writes random data to each
    disk, reads everything back and compares checksums. Then a disk is added while it runs, used,
    and removed. At last two guests are connected by a switch, find and ping each other, and each
    streams to the other.
    """
    if size < MIN_SIZE or size % 4096:
        raise click.BadParameter("at least 1M, in whole 4K", param_hint="--size")
    check_machine(size)
    settings = Settings(
        guest=guest, disks=disks, channels=channels, depth=depth, seconds=seconds, size=size
    )
    view = make_view(quiet=as_json)
    report = Report()
    start = time.perf_counter()
    with directory_for(report, keep=keep) as directory:
        try:
            trio.run(Demo(settings, directory, report, view).run)
        finally:
            view.close()
        report.seconds = time.perf_counter() - start
    if report.mistake is not None:
        raise UsageFailure(report.mistake)
    if as_json:
        print_json(report.as_json())
    else:
        summarize(report)
    ctx.exit(exit_code(report))


def exit_code(report: Report) -> int:
    """Return the exit code of a demo."""
    if report.interrupted is not None:
        return EXIT_INTERRUPTED - signal.SIGINT + report.interrupted
    return 0 if report.ok else EXIT_FAILED


@contextlib.contextmanager
def directory_for(report: Report, *, keep: bool) -> Iterator[Path]:
    """Make a directory, and remove it unless it is to be kept or might explain a problem."""
    directory = Path(tempfile.mkdtemp(prefix="vmbus-demo-"))
    report.directory = str(directory)
    try:
        yield directory
    finally:
        if not keep and not report.problems:
            report.directory = None
            shutil.rmtree(directory)


class Demo:
    """One performance.

    Args:
        settings: The command line.
        directory: For socket, images and logs.
        report: Gets to know everything.
        view: Tells it.
    """

    def __init__(self, settings: Settings, directory: Path, report: Report, view: View) -> None:
        self.settings = settings
        self.report = report
        self.view = view
        self.socket = str(directory / "vmbus.sock")
        self.images = Images(directory, settings.size)
        self.server = Child("server", self._serve_arguments(), directory / "server.log")
        self.guest = Child("guest", self._guest_arguments(), directory / "guest.log")
        self.network = make_network(
            directory,
            report,
            view,
            guest=settings.guest,
            channels=settings.channels,
            seconds=settings.seconds,
        )
        self._directory = directory
        self._is_listening = False
        self._hot = ""

    def _serve_arguments(self) -> list[str]:
        switches = ["--once", "--single-process"]  # there is one guest, and it is ours
        if PERSONALITIES[self.settings.guest].needs_monitor:
            switches.append("--monitor")
        arguments = ["-m", "vmbus.cli", "serve", *switches, "--socket", self.socket]
        for spec in (*self.images.specs, *self.settings.disks):
            arguments += ["--disk", spec]
        return arguments

    def _guest_arguments(self) -> list[str]:
        settings = self.settings
        module = load_device(device_with(BACKEND)).demo
        if module is None:
            raise ConfigError(f"the device that has a {BACKEND} as its back-end has no demo")
        return [
            *("-m", module, "--hotplug", "--socket", self.socket),
            *("--guest", settings.guest, "--channels", str(settings.channels)),
            *("--depth", str(settings.depth), "--seconds", str(settings.seconds)),
            *("--size", str(settings.size)),
        ]

    async def run(self) -> None:
        """Perform; whatever goes wrong is in the report afterwards."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._end_on_signal, nursery.cancel_scope)
            async with trio.open_nursery() as listeners:
                try:
                    await self._perform(listeners)
                    if self.network is not None and self.report.mistake is None:
                        await self.network.perform(listeners)
                finally:
                    with trio.CancelScope(shield=True):
                        for child in reversed(self._children):
                            await child.end()
            nursery.cancel_scope.cancel()
        for child in self._children:
            self.report.exit_codes[child.name] = child.returncode
            self.report.last_lines[child.name] = list(child.lines)

    @property
    def _children(self) -> list[Child]:
        if self.network is None or not self.network.begun:
            return [self.server, self.guest]
        return [self.server, self.guest, *self.network.children]

    async def _end_on_signal(
        self, scope: trio.CancelScope, task_status: trio.TaskStatus[None]
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                self.report.interrupted = number
                scope.cancel()

    async def _perform(self, listeners: trio.Nursery) -> None:
        self.images.make()
        if not await self._start_server(listeners):
            return
        process = await self.guest.start(stdout=PIPE)
        listeners.start_soon(self.guest.follow, lambda line: None)
        assert process.stdout is not None
        lines = Lines(process.stdout)
        line: str | None = ""
        while line is not None:
            with trio.move_on_after(demo_child.SILENCE) as silence:
                line = await lines.next()
            if silence.cancelled_caught:
                self._problem("guest", f"hangs: it has said nothing for {demo_child.SILENCE:g} s")
                return
            if line:
                await self._heard(line)
        if await self._ended(self.guest, "has closed its output but goes on"):
            code = self.guest.returncode
            told = bool(self.report.problems) or "left" in self.report.facts
            if code not in (0, 1) or not told:
                self._problem("guest", f"{how(code)} before its time")
        if await self._ended(self.server, "goes on although its only guest has left"):
            if self.server.returncode:
                self._problem("server", how(self.server.returncode))
            else:
                self.view.tell(Line("server", how(0)))
        for text in self.images.compare(self.report):
            self.view.tell(Line("files", text, "green"))

    async def _start_server(self, listeners: trio.Nursery) -> bool:
        """Start the server; returns whether guests may connect."""
        server = self.server
        process = await server.start(stdout=DEVNULL)
        words = [self._short(shlex.quote(word)) for word in server.arguments[2:]]
        first = words.index("--socket")
        self.view.tell(Line("server", f"pid {process.pid}: vmbus {' '.join(words[:first])}"))
        for option, value in zip(words[first::2], words[first + 1 :: 2], strict=True):
            self.view.tell(Line("", f"  {option} {value}"))
        with trio.move_on_after(demo_child.SILENCE):
            await listeners.start(self._follow_server)
        if self._is_listening:
            return True
        await server.end()
        if server.returncode == EXIT_USAGE and server.lines:  # our own part of it is right
            self.report.mistake = server.lines[-1].removeprefix("Error: ")
        else:
            self._problem("server", f"did not come up: {how(server.returncode)}")
        return False

    async def _follow_server(self, task_status: trio.TaskStatus[None]) -> None:
        """Keep what the server writes; has started when the server listens, or never will."""

        def heard(line: str) -> None:
            if LISTENING in line and not self._is_listening:
                self._is_listening = True
                task_status.started()

        await self.server.follow(heard)
        if not self._is_listening:
            task_status.started()

    async def _ended(self, child: Child, otherwise: str) -> bool:
        """Wait until a child has ended by itself; it is a problem if it does not."""
        with trio.move_on_after(demo_child.GRACE):
            await child.wait()
            return True
        self._problem(child.name, otherwise)
        return False

    def _problem(self, where: str, text: str) -> None:
        self.report.problem(where, text)
        self.view.tell(Line(where, text, "bold red"))

    def _short(self, text: str) -> str:
        return text.replace(f"{self._directory}/", "")

    # -- the guest ---------------------------------------------------------------------------------

    async def _heard(self, line: str) -> None:
        """Act on a line of the guest's."""
        try:
            event: Event = json.loads(line)
        except ValueError:  # whatever else prints in that process
            self.guest.lines.append(line)
            return
        if event["event"] == "disk" and event["address"] not in self.report.backends:
            await self._look_up_backends()
        self.report.take(event)
        show(self.view, event, self.report, self.settings.depth)
        if event["event"] == "ready":
            await self._operate(event["action"])

    async def _operate(self, action: str) -> None:
        """Add a disk, or remove it again, as ``vmbus disk`` does."""
        request = {"backend": BACKEND, "action": action}
        if action == "add":
            request["spec"] = f"ram:{size_option(min(HOT_SIZE, self.settings.size))}"
        else:
            request["address"] = self._hot
        self.view.tell(Line("operator", f"vmbus disk {action} {[*request.values()][-1]}"))
        reply = await self._ask(partial(operator.command, self.socket, request))
        self._hot = reply.get("address", "")

    async def _look_up_backends(self) -> None:
        """Ask the server what is behind the addresses."""
        status = await self._ask(partial(operator.query, self.socket, "guests"))
        for guest in status.get("guests", ()):
            for device in guest["devices"]:
                for unit in device["units"]:
                    self.report.backends[unit["address"]] = unit["kind"]

    async def _ask(self, request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask the server as an operator; nothing comes of it if that is a problem."""
        try:
            return await trio.to_thread.run_sync(request, abandon_on_cancel=True)
        except AttachError as error:
            self._problem("operator", str(error))
            return {}
