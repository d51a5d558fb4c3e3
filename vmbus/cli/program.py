"""The group of all commands, and what becomes of exceptions.

A command is a module here with a click command named ``command``. It is imported when it is
called, and ``vmbus --help`` takes its line from :data:`COMMANDS`, because a command may need trio,
rich or a device, and those take longer to import than most commands take to run.
"""

from __future__ import annotations

import importlib
from typing import cast

import click
from click.shell_completion import CompletionItem, add_completion_class

from vmbus import __version__
from vmbus.cli.bash_completion import SpecComplete
from vmbus.errors import AttachError, ConfigError, ProtocolError, VMBusError, leaves
from vmbus.streams import OutputError

COMMANDS = {
    "boot": "Boot Linux on KVM with a bus of ours.",
    "demo": "Show a guest at work: it comes up, finds its disks and uses them.",
    "serve": "Serve guests: listen on a socket where VMMs attach them.",
    "top": "Watch the guests of a server: channels, rings and rates.",
    "disk": "List, add, remove and resize the disks of a running guest, and change media.",
    "nic": "List, add and remove the network adapters of a running guest, and change links.",
    "devices": "Show the installed devices and disk back-ends.",
    "doctor": "Show what this machine can do, and what to do about the rest.",
}
"""Names, each also the name of a module here, and their lines in ``vmbus --help``."""

add_completion_class(SpecComplete)  # instead of click's own for bash

EPILOG = (
    "Exit codes: 0 done; 1 it could not be done; 2 the command line is wrong; 3 a guest or a peer "
    "broke a protocol; 130 interrupted."
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PROTOCOL = 3
EXIT_INTERRUPTED = 130


class Failure(click.ClickException):
    """Ends the program with a message: it could not be done."""

    exit_code = EXIT_FAILED


class UsageFailure(Failure):
    """The same, and it is the command line that has to change."""

    exit_code = EXIT_USAGE


class ProtocolFailure(Failure):
    """The same, because somebody broke a protocol."""

    exit_code = EXIT_PROTOCOL


class Program(click.Group):
    """Imports commands when they are called, and words the end of those that fail."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, if there is one of this name."""
        if cmd_name not in COMMANDS:
            return None
        return cast("click.Command", importlib.import_module(f"vmbus.cli.{cmd_name}").command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer commands without importing any; see :class:`click.Group`."""
        found = [
            CompletionItem(name, help=text)
            for name, text in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the one that was probably meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib  # only for typing errors: it takes a while

            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            ctx.fail(f"there is no command {name!r}; {hint}there are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; expected exceptions become messages and exit codes."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except (VMBusError, OSError, BaseExceptionGroup) as error:
            failure = explain(error)
            if failure is None:
                raise
            raise failure from error


def explain(error: BaseException) -> Failure | None:
    """Return what to tell the user about an exception; None if it is a bug, or the output's."""
    if isinstance(error, BaseExceptionGroup):
        causes = leaves(error)
        return explain(causes[0]) if len(causes) == 1 else None
    if isinstance(error, Failure):
        return error
    if isinstance(error, OutputError):
        return None
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return Failure(f"{error.filename}: {reason}" if error.filename else reason)
    if isinstance(error, ConfigError):
        return UsageFailure(str(error))
    if isinstance(error, ProtocolError) or (
        # The operator's side wraps a server's protocol error.
        isinstance(error, AttachError) and isinstance(error.__cause__, ProtocolError)
    ):
        return ProtocolFailure(str(error))
    return Failure(str(error)) if isinstance(error, VMBusError) else None


@click.group(
    cls=Program,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="vmbus %(version)s")
def program() -> None:
    """The host side of Hyper-V's VMBus: buses, devices and disks for guests.

    A virtual machine monitor attaches its guest over a socket; the guest then finds the devices
    that the server offers, with the drivers it has anyway.
    """
