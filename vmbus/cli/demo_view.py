"""How ``vmbus demo`` tells what happens: lines with a time, and a summary at the end.

On a terminal there is colour, and a line at the bottom that moves; into a pipe go the lines alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from vmbus.cli.demo_report import DiskReport, Event, Report
from vmbus.cli.output import console, on_terminal, print_table, safe, size_text, styled

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

_TOLD_PHASES = frozenset({"write", "read", "mixed"})
_HEADERS = (
    "disk", "back-end", "size", "written", "read", "write rate", "read rate", "4 KiB rate", "data",
)  # fmt: skip
_LAST_LINES = 8


class Line(NamedTuple):
    """Something to tell."""

    topic: str
    """What it is about, at most 8 characters."""
    text: str
    style: str = ""
    """Colour on a terminal."""


class View:
    """Tells nothing; for ``--json``."""

    def tell(self, line: Line) -> None:
        """Tell something."""

    def status(self, text: str) -> None:
        """Tell what is going on just now; the next text takes its place."""

    def close(self) -> None:
        """Tell nothing more but the summary. Idempotent."""


class PlainView(View):
    """Lines for a pipe."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def stamp(self) -> str:
        """Return the time since the start, as a kernel would write it."""
        return f"[{time.perf_counter() - self._start:7.3f}]"

    def tell(self, line: Line) -> None:
        """Print a line."""
        click.echo(f"{self.stamp()} {line.topic:<8} {safe(line.text)}")


class RichView(PlainView):
    """Lines with colour, and one that moves."""

    def __init__(self) -> None:
        super().__init__()
        self._console: Console = console()
        self._status: Status = self._console.status("")
        self._status.start()

    def tell(self, line: Line) -> None:
        """Print a line above the one that moves."""
        from rich.text import Text

        self._console.print(
            Text.assemble(
                (self.stamp(), "dim"), " ", (f"{line.topic:<8}", "cyan"), " ",
                (safe(line.text), line.style),
            )
        )  # fmt: skip

    def status(self, text: str) -> None:
        """Change the line that moves."""
        from rich.text import Text

        self._status.update(Text(safe(text) or " "))  # an empty one would change nothing

    def close(self) -> None:
        """Remove the line that moves."""
        self._status.stop()


def make_view(*, quiet: bool) -> View:
    """Return what fits standard output."""
    if quiet:
        return View()
    return RichView() if on_terminal() else PlainView()


# -- one event ------------------------------------------------------------------------------------


def show(view: View, event: Event, report: Report, depth: int) -> None:
    """Tell what the guest has said; ``report`` knows of it already."""
    if event["event"] == "progress":
        disk = report.disks[event["address"]]
        view.status(f"{disk.address} {disk.backend}: {_phase_text(event, depth)}")
        return
    for line in narrate(event, report, depth):
        view.status("")
        view.tell(line)


def narrate(event: Event, report: Report, depth: int) -> Iterator[Line]:
    """Yield the lines for an event; many have none."""
    match event["event"]:
        case "start":
            yield Line(
                "guest",
                f"{event['guest']}: pid {event['pid']}, {event['vps']} VPs, "
                f"{size_text(event['ram'])} of RAM in a memfd",
            )
        case "attached":
            yield Line("guest", f"attached over vmbus-user: {', '.join(event['features'])}")
        case "contact":
            features = f", features: {', '.join(event['features'])}" if event["features"] else ""
            yield Line("contact", f"VMBus {event['version']}{features}")
        case "offer":
            yield Line("offer", _offer_text(event))
        case "vstor":
            yield Line(
                "vstor",
                f"{event['version']}: up to {size_text(event['max_transfer'])} per request, "
                f"{event['max_subchannels']} sub-channels",
            )
        case "channel":
            yield Line(
                "channel",
                f"relid {event['relid']}: 2 rings of {size_text(event['ring'])}, "
                f"GPADL of {event['gpadl_pages']} pages, interrupts VP {event['vp']}",
            )
        case "disk":
            yield Line(event["kind"], _disk_text(report.disks[event["address"]]))
        case "phase" if event["phase"] in _TOLD_PHASES and event["requests"]:
            yield Line(event["address"], _phase_text(event, depth))
        case "verified":
            disk = report.disks[event["address"]]
            yield Line(event["address"], _verified_text(disk), "green")
        case "notice":
            habit = "" if event["heeded"] else "this driver ignores it, by hand: "
            yield Line("guest", f"{event['operation']} from the host: {habit}scan again")
        case "gone":
            yield Line("guest", f"{event['address']} is gone, commands to it get INVALID_LUN")
        case "problem":
            yield Line(event["where"], event["text"], "bold red")
        case "left":
            yield Line(
                "guest",
                f"left: channels closed, GPADLs torn down; {event['interrupts']:,} interrupts in, "
                f"{event['signals']:,} signals out",
            )
        case _:  # what comes of it is told later
            pass


def _offer_text(event: Event) -> str:
    what = event["class"]
    if event["subchannel"]:
        what += f", sub-channel {event['subchannel']} of"
    words = [f"relid {event['relid']}: {what} {event['instance'][:8]}"]
    words.append(f"connection {event['connection']:#x}")
    if event["monitor"] is not None:
        words.append(f"monitor bit {event['monitor']}")
    if event["ignored"] is not None:
        words.append(event["ignored"])
    return ", ".join(words)


def _disk_text(disk: DiskReport) -> str:
    facts = disk.facts
    words = [size_text(facts["size"]), f"{facts['block_size']} B blocks"]
    if facts["unmaps"]:
        words.append("unmap")
    if facts["kind"] == "disk" and not facts["writable"]:
        words.append("read only")
    if facts["label"] is not None:
        words.append(f'volume "{facts["label"]}"')
    return f"{disk.address}  {facts['product']:<16}  {disk.backend:<12}  {', '.join(words)}"


def _phase_text(event: Event, depth: int) -> str:
    seconds = max(event["seconds"], 1e-9)
    return (
        f"{event['phase']:<5} {size_text(event['block']):>7} x {depth:<3}"
        f" {event['requests'] / seconds:>8,.0f} requests/s"
        f" {event['bytes'] / seconds / 1e6:>7,.0f} MB/s"
    )


def _verified_text(disk: DiskReport) -> str:
    back = disk.total("survey", "read", "check")
    words = [f"{size_text(back)} read and compared"]
    if disk.facts["writable"]:
        words.append("flushed")
    if disk.unmapped:
        words.append(f"{size_text(disk.unmapped)} unmapped, now zeros")
    return f"verified: {', '.join(words)}"


# -- the end --------------------------------------------------------------------------------------


def summarize(report: Report) -> None:
    """Print the summary: a table, and whether all is well or what is not."""
    if report.disks:
        broken = {problem.where for problem in report.problems}
        click.echo()
        print_table(_HEADERS, (_row(disk, broken) for disk in report.disks.values()))
    click.echo()
    if report.interrupted is not None:
        click.echo(f"ended by {signal.Signals(report.interrupted).name}")
    elif report.ok:
        frames = sum(each["received"]["frames"] for each in report.network.values())
        _say(
            f"All verified: {report.total('requests'):,} requests, "
            f"{size_text(report.total('bytes'))}, "
            + (f"{frames:,} datagrams, " if frames else "")
            + f"in {report.seconds:.1f} s.",
            "green",
        )
    else:
        for name, lines in report.last_lines.items():
            if lines:
                click.echo(f"the {name}'s last lines:")
                for line in lines[-_LAST_LINES:]:
                    click.echo(f"  {safe(line)}")
        for problem in report.problems:
            _say(f"{problem.where}: {safe(problem.text)}", "red")
    if report.directory is not None:
        click.echo(f"Images and logs are in {report.directory}")


def _say(text: str, colour: str) -> None:
    click.echo(click.style(text, fg=colour) if styled() else text)


def _row(disk: DiskReport, broken: Container[str]) -> tuple[str, ...]:
    verdict = "ok" if disk.verified else "-"
    return (
        disk.address,
        disk.backend,
        size_text(disk.facts["size"]),
        size_text(disk.total("write") or None),
        size_text(disk.total("survey", "read", "check")),
        _rate(disk.rate("write", "bytes"), 1e6, "MB/s"),
        _rate(disk.rate("read", "bytes"), 1e6, "MB/s"),
        _rate(disk.rate("mixed", "requests"), 1, "/s"),
        "broken" if disk.address in broken else verdict,
    )


def _rate(value: float | None, divisor: float, unit: str) -> str:
    return "-" if value is None else f"{value / divisor:,.0f} {unit}"
