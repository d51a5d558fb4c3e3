"""``vmbus top``: the guests of a server, disk by disk and channel by channel."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial

import click

from vmbus.cli.client import ask_guests
from vmbus.cli.columns import fit
from vmbus.cli.output import on_terminal, print_json
from vmbus.cli.params import Number, json_option, seconds_type, socket_option
from vmbus.cli.rates import Sample, ServerView, compare
from vmbus.cli.screen import Quit, open_screen
from vmbus.cli.top_view import plain_lines, table_lines


@click.command()
@socket_option
@click.option(
    "--interval",
    type=seconds_type(0.1, 86400),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between looks; rates are averages over it.",
)
@click.option("--count", type=Number(1), metavar="N", help="Stop after N looks.")
@click.option("--once", is_flag=True, help="Stop after one look.")
@json_option
def command(
    *, socket_path: str, interval: float, count: int | None, once: bool, as_json: bool
) -> None:
    """Watch the guests of a server: channels, rings and rates.

    On a terminal a table is kept up to date until q is typed; it leaves out what it has no room
    for. Otherwise every look prints lines of key=value, or with --json one object. Every look takes
    one interval, because rates need two answers.
    """
    if once:
        if count is not None and count != 1:
            raise click.UsageError("--once is --count 1; give one of them")
        count = 1
    if on_terminal() and not (as_json or once):
        watch(socket_path, interval, count)
        return
    views = itertools.islice(look(socket_path, interval), count)
    if as_json:
        for view in views:
            print_json({"time": time.time(), **dataclasses.asdict(view)})
    elif on_terminal():
        for view in views:
            show(view)
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


def watch(path: str, interval: float, count: int | None) -> None:
    """Keep a table on the terminal up to date; the last one stays there.

    Raises:
        Failure: There is no server.
        AttachError: It is gone.
    """
    ask_guests(path)  # before the screen is another one: there may be no server
    view: ServerView | None = None
    try:
        with open_screen() as screen:
            screen.show(lambda width: [fit(f"looking for {interval:g} s; q leaves", width)])
            for view in itertools.islice(look(path, interval, sleep=screen.wait), count):
                screen.show(partial(table_lines, view))
    except Quit:
        pass
    finally:
        if view is not None:
            show(view)


def show(view: ServerView) -> None:
    """Print one look for the width of the terminal."""
    for line in table_lines(view, shutil.get_terminal_size().columns):
        click.echo(line)
