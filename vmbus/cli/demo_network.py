"""The second act of ``vmbus demo``: two guests on a switch, which talk to each other.

A server with nothing but a network adapter for each guest, and the program that the adapter's
plug-in names, twice. What they tell goes into the report; each also says what it has got of what
the other one sent.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import trio

from vmbus.cli import demo_child
from vmbus.cli.demo_child import LISTENING, Child, Lines, how
from vmbus.cli.demo_report import Event, Report
from vmbus.cli.demo_view import Line, View
from vmbus.cli.program import EXIT_USAGE
from vmbus.errors import ConfigError
from vmbus.guest.personality import PERSONALITIES
from vmbus.plugins.devices import device_with, load_device

BACKEND = "endpoint"
"""What the devices have that this act is about."""
STATIONS = (1, 2)
SHARE = 1 / 6
"""Of the time for disks."""
MOST_SECONDS = 1.0


class Network:
    """The act.

    Args:
        directory: For the socket and logs.
        report: Gets to know everything.
        view: Tells it.
        guest: Whose drivers both guests play.
        channels: Of each adapter.
        seconds: Time for the disks.

    Attributes:
        begun: Whether it was performed, or is.
    """

    def __init__(
        self,
        directory: Path,
        report: Report,
        view: View,
        *,
        guest: str,
        channels: int,
        seconds: float,
    ) -> None:
        self.report = report
        self.view = view
        self._socket = str(directory / "switch.sock")
        self._listening = trio.Event()
        self.begun = False
        options = "[monitor]" if PERSONALITIES[guest].needs_monitor else ""
        self._spec = f"switch:{options}demo"
        self.server = Child(
            "network",
            ["-m", "vmbus.cli", "serve", "--single-process", "--net", self._spec,
             "--socket", self._socket],
            directory / "network.log",
        )  # fmt: skip
        seconds = min(SHARE * seconds, MOST_SECONDS)
        self.guests = {
            number: Child(
                f"station {number}",
                ["-m", _program(), "--socket", self._socket, "--name", f"station{number}",
                 "--station", str(number), "--guest", guest, "--channels", str(channels),
                 "--seconds", str(seconds)],
                directory / f"station{number}.log",
            )
            for number in STATIONS
        }  # fmt: skip

    @property
    def children(self) -> Iterator[Child]:
        """All processes, in the order in which they are to end."""
        yield from self.guests.values()
        yield self.server

    async def perform(self, listeners: trio.Nursery) -> None:
        """Perform; whatever goes wrong is in the report afterwards. A checkpoint.

        Args:
            listeners: For tasks that read what the processes say, until these have ended.
        """
        self.begun = True
        self.report.network = {number: {} for number in STATIONS}
        process = await self.server.start(stdout=DEVNULL)
        listeners.start_soon(self.server.follow, self._server_said)
        words = [Path(word).name if "/" in word else word for word in self.server.arguments[2:]]
        self.view.tell(Line("server", f"pid {process.pid}: vmbus {shlex.join(words)}"))
        with trio.move_on_after(demo_child.SILENCE) as waiting:
            await self._listening.wait()
        if waiting.cancelled_caught:
            self._problem(self.server, "did not come up")
            return
        async with trio.open_nursery() as nursery:
            for number, guest in self.guests.items():
                nursery.start_soon(self._perform, number, guest, listeners)
        await self.server.end()
        if self.server.returncode:
            self._problem(self.server, how(self.server.returncode))
        else:
            self.view.tell(Line("server", how(0)))

    def _server_said(self, line: str) -> None:
        if LISTENING in line:
            self._listening.set()

    async def _perform(self, number: int, guest: Child, listeners: trio.Nursery) -> None:
        process = await guest.start(stdout=PIPE)
        listeners.start_soon(guest.follow, lambda line: None)
        assert process.stdout is not None
        lines = Lines(process.stdout)
        line: str | None = ""
        while line is not None:
            with trio.move_on_after(demo_child.SILENCE) as silence:
                line = await lines.next()
            if silence.cancelled_caught:
                self._problem(guest, f"hangs: it has said nothing for {demo_child.SILENCE:g} s")
                return
            if line:
                self._heard(number, guest, line)
        with trio.move_on_after(demo_child.GRACE):
            await guest.wait()
        if guest.returncode == EXIT_USAGE and guest.lines:
            # Not every driver is played.
            self.report.network.pop(number)
            self.view.tell(Line("network", f"{number}: {guest.lines[-1]}"))
        elif "left" not in self.report.network[number]:
            self._problem(guest, f"{how(guest.returncode)} before its time")

    def _heard(self, number: int, guest: Child, line: str) -> None:
        try:
            event: Event = json.loads(line)
        except ValueError:  # whatever else prints in that process
            guest.lines.append(line)
            return
        name = event.pop("event")
        if name == "problem":
            self._problem(guest, f"{event['where']}: {event['text']}")
            return
        facts = self.report.network[number]
        facts[event.pop("way") if name == "stream" else name] = event
        for told in narrate(number, name, event, facts):
            self.view.tell(told)

    def _problem(self, child: Child, text: str) -> None:
        self.report.problem(child.name, text)
        self.view.tell(Line(child.name[:8], text, "bold red"))


def make_network(
    directory: Path, report: Report, view: View, *, guest: str, channels: int, seconds: float
) -> Network | None:
    """Return the act, None if no installed device can perform it; arguments as above."""
    try:
        _program()
    except ConfigError as error:
        view.tell(Line("network", f"none: {error}"))
        return None
    return Network(directory, report, view, guest=guest, channels=channels, seconds=seconds)


def _program() -> str:
    module = load_device(device_with(BACKEND)).demo
    if module is None:
        raise ConfigError(f"the device that has an {BACKEND} as its back-end has no demo")
    return module


def narrate(number: int, name: str, event: dict[str, Any], facts: dict[str, Any]) -> Iterator[Line]:
    """Yield the lines for what a station has told; much of it has none.

    Args:
        number: Of the station.
        name: What it is about.
        event: What it has told.
        facts: What is known of the station, this included.
    """
    match name:
        case "adapter":
            sums = "fills in checksums" if event["leaves_sums"] else "leaves checksums alone"
            yield Line(
                "nic",
                f"{number}: {event['mac']}, NVSP {event['version']}, MTU {event['mtu']}, {sums}",
            )
        case "met":
            yield Line("arp", f"{number}: {event['address']} is at {event['mac']}")
        case "ping":
            yield Line(
                "ping",
                f"{number}: {event['answered']} of {event['sent']} answered, "
                f"{event['mean'] * 1e3:.2f} ms, the quickest {event['best'] * 1e3:.2f} ms",
            )
        case "stream" if facts.get("received") is event:
            seconds = max(event["seconds"], 1e-9)
            good = not (event["lost"] or event["damaged"])
            yield Line(
                f"{3 - number} to {number}",
                f"{event['frames']:,} datagrams, {event['frames'] / seconds:,.0f}/s, "
                f"{event['bytes'] / seconds / 1e6:.1f} MB/s, {event['lost']:,} lost, "
                + (f"{event['damaged']:,} damaged" if event["damaged"] else "every byte verified"),
                "green" if good else "",
            )
