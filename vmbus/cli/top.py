"""``vmbus top``: the guests of a server, channel by channel."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from vmbus.cli.client import ask_guests
from vmbus.cli.output import console, make_table, on_terminal, print_json, safe, size_text
from vmbus.cli.params import json_option, socket_option
from vmbus.cli.rates import ChannelView, GuestView, Sample, ServerView, compare

if TYPE_CHECKING:
    from rich.console import RenderableType

HEADERS = ("channel", "ring\nin", "\nout", "\nopen", "packets/s\nin", "\nout",
           "bytes/s\nin", "\nout", "signals/s\nin", "\nout")  # fmt: skip
"""Two lines each; the table is to fit a terminal of 80 columns."""


@click.command()
@socket_option
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between looks; rates are averages over it.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Stop after N looks.")
@click.option("--once", is_flag=True, help="Stop after one look.")
@json_option
def command(
    *, socket_path: str, interval: float, count: int | None, once: bool, as_json: bool
) -> None:
    """Watch the guests of a server: channels, rings and rates.

    On a terminal a table is kept up to date until Ctrl-C; otherwise every look prints lines of
    key=value, or with --json one object. Every look takes one interval, because rates need two
    answers.
    """
    if once:
        if count is not None and count != 1:
            raise click.UsageError("--once is --count 1; give one of them")
        count = 1
    views = itertools.islice(look(socket_path, interval), count)
    if as_json:
        for view in views:
            print_json({"time": time.time(), **dataclasses.asdict(view)})
    elif on_terminal():
        watch(views)
    else:
        for view in views:
            for line in plain_lines(view):
                click.echo(line)


def look(
    path: str,
    interval: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ServerView]:
    """Yield what the server says, every ``interval`` seconds, forever.

    Raises:
        Failure: There is no server.
        AttachError: It is gone.
    """
    reply = ask_guests(path)
    before = Sample(clock(), reply)
    while True:
        sleep(interval)
        reply = ask_guests(path)
        after = Sample(clock(), reply)
        yield compare(before, after)
        before = after


def watch(views: Iterator[ServerView]) -> None:
    """Keep a table on the terminal up to date."""
    from rich.live import Live

    # The first look comes before the table, and so does the message that there is no server.
    first = next(views)
    with Live(render(first), console=console(), auto_refresh=False) as live:
        for view in views:
            live.update(render(view), refresh=True)


def render(view: ServerView) -> RenderableType:
    """Return the table of one look, for rich."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(
            f"{safe(view.server)}, pid {view.pid}, {size_text(view.rss)} in use, "
            f"{view.guests_served} guest(s) served, {len(view.guests)} attached"
        )
    ]
    for guest in view.guests:
        parts.append(Text())
        parts.append(Text(_headline(guest), style="bold yellow" if guest.faults else "bold"))
        if guest.channels:
            table = make_table(HEADERS, map(_cells, guest.channels))
            table.padding = (0, 1, 0, 0)
            for column in table.columns:
                column.no_wrap = True
            for column in table.columns[1:]:
                column.justify = "right"
            parts.append(table)
    return Group(*parts)


def _headline(guest: GuestView) -> str:
    words = [
        f"VMBus {guest.version}" if guest.version else "no contact yet",
        f"{size_text(guest.memory)} of memory",
        f"{guest.faults} fault(s)",
    ]
    if guest.paused:
        words.append("paused")
    if not guest.channels:
        words.append("no open channels")
    return f"{safe(guest.name)}: {', '.join(words)}"


def _cells(channel: ChannelView) -> tuple[str, ...]:
    name = f"{channel.relid} {safe(channel.device)}"
    if channel.subchannel_index:
        name += f".{channel.subchannel_index}"
    rates = channel.rates
    return (
        name,
        f"{channel.incoming_fill:.0%}",
        f"{channel.outgoing_fill:.0%}",
        str(channel.outstanding),
        short(rates["packets_in"], 1000),
        short(rates["packets_out"], 1000),
        short(rates["bytes_in"], 1024),
        short(rates["bytes_out"], 1024),
        short(rates["signals_in"], 1000),
        short(rates["signals_out"], 1000),
    )


def short(number: float, base: int) -> str:
    """Write a number in few characters: ``999``, ``4.39k``, ``1.5M``."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= base
    return f"{number:.3g}T"


def plain_lines(view: ServerView) -> Iterator[str]:
    """Yield the lines of one look for a pipe; each stands for itself."""
    yield (
        f"server={_word(view.server)} pid={view.pid} rss={view.rss} "
        f"guests_served={view.guests_served} guests={len(view.guests)}"
    )
    for guest in view.guests:
        yield (
            f"guest={_word(guest.name)} version={guest.version or '-'} memory={guest.memory} "
            f"paused={'yes' if guest.paused else 'no'} faults={guest.faults} "
            f"channels={len(guest.channels)}"
        )
        for channel in guest.channels:
            rates = " ".join(f"{name}={rate:.1f}" for name, rate in channel.rates.items())
            yield (
                f"guest={_word(guest.name)} channel={channel.relid} device={_word(channel.device)} "
                f"subchannel={channel.subchannel_index} ring_in={channel.incoming_fill:.3f} "
                f"ring_out={channel.outgoing_fill:.3f} outstanding={channel.outstanding} {rates}"
            )


def _word(text: str) -> str:
    """Return one word, whatever a guest calls itself."""
    return "_".join(safe(text).split()) or "-"
