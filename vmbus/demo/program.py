"""A demo's guest as a program: its command line and its exit code."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import trio

from vmbus.demo.guest import DemoGuest
from vmbus.demo.half import Half, Options
from vmbus.demo.story import Story
from vmbus.guest import PERSONALITIES
from vmbus.streams import EXIT_INTERRUPTED, guarded


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a type of arguments for ``argparse``: numbers from ``least`` to ``most``."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text[:20]) <= most):
            raise argparse.ArgumentTypeError(f"a number from {least} to {most}, not {text[:40]!r}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"seconds, not {text[:40]!r}")
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A demo's guest with the halves of its devices.

    Its exit codes are 0 if all is well, 1 if there was a problem, 2 if the arguments are wrong,
    130 if it was interrupted from the keyboard.
    """

    name: str
    """How it is started, as in "python -m my_device.demo"."""
    description: str
    """One sentence."""
    halves: tuple[type[Half[Any]], ...]
    """Have no options of the same name."""

    def parse(self, arguments: Sequence[str] | None) -> DemoGuest:
        """Return the guest that a command line describes.

        Args:
            arguments: Without the program's name; None: those of this process.

        Raises:
            SystemExit: They are wrong (code 2, after a line on standard error), or ask for help.
        """
        parser = argparse.ArgumentParser(prog=self.name, description=self.description)
        socket = os.environ.get("VMBUS_SOCKET") or None
        parser.add_argument(
            "--socket",
            default=socket,
            required=socket is None,
            help="where vmbus serve listens; VMBUS_SOCKET in the environment stands for it",
        )
        parser.add_argument("--name", default="demo", help="what the server calls the guest")
        parser.add_argument("--guest", choices=PERSONALITIES, default="linux-6.1")
        parser.add_argument(
            "--channels", type=whole_number(1, 16), default=4, help="channels, and VPs, 1 to 16"
        )
        parser.add_argument("--seconds", type=_seconds, default=6.0, help="of work, in all")
        for half in self.halves:
            half.add_options(parser)
        parsed = parser.parse_args(arguments)
        options = Options(
            socket=parsed.socket,
            personality=PERSONALITIES[parsed.guest],
            channels=parsed.channels,
            seconds=parsed.seconds / len(self.halves),
            name=parsed.name,
        )
        story = Story()
        return DemoGuest(options, [half(options, parsed, story) for half in self.halves], story)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the guest in a loop of its own; returns the exit code.

        Args:
            arguments: See :meth:`parse`; where that would end the process, its code is returned.
        """

        def run() -> int:
            guest = self.parse(arguments)
            good = trio.run(guest.run)
            interrupted = guest.story.interrupted == signal.SIGINT
            return 1 if not good else EXIT_INTERRUPTED if interrupted else 0

        return guarded(run)
