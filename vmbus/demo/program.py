"""A demo's guest as a program: its command line and its exit code."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import trio

from vmbus.demo.guest import DemoGuest
from vmbus.demo.half import Half, Options
from vmbus.demo.story import Story
from vmbus.guest import PERSONALITIES


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A demo's guest with the halves of its devices.

    Its exit codes are 0 if all is well, 1 if there was a problem, 2 if the arguments are wrong.
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
        parser.add_argument("--socket", required=True, help="where vmbus serve listens")
        parser.add_argument("--guest", choices=PERSONALITIES, default="linux-6.1")
        parser.add_argument("--channels", type=int, default=4, help="channels, and VPs")
        parser.add_argument("--seconds", type=float, default=6.0, help="of work, in all")
        for half in self.halves:
            half.add_options(parser)
        parsed = parser.parse_args(arguments)
        options = Options(
            socket=parsed.socket,
            personality=PERSONALITIES[parsed.guest],
            channels=parsed.channels,
            seconds=parsed.seconds / len(self.halves),
        )
        story = Story()
        return DemoGuest(options, [half(options, parsed, story) for half in self.halves], story)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the guest in a loop of its own; returns the exit code.

        Args:
            arguments: See :meth:`parse`, also for what is raised.
        """
        return 0 if trio.run(self.parse(arguments).run) else 1
