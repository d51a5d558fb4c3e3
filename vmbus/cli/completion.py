"""What a shell offers to complete, beside commands and options: specifications of disks.

click makes the shells' side of it; see ``docs/reference/cli.md``.
"""

from __future__ import annotations

import contextlib
import os

import click
from click.shell_completion import CompletionItem


def complete_spec(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return what a specification that begins like this could be: schemes, and files of theirs.

    A scheme is offered with and without brackets, so that the shell does not take it for complete
    and puts a space behind it.
    """
    from vmbus.errors import ConfigError
    from vmbus.plugins.devices import backend_registries

    with contextlib.suppress(ConfigError):
        schemes = [
            name
            for registry in backend_registries()
            if registry.noun == "disk"
            for name in registry.names()
        ]
        head, colon, rest = incomplete.rpartition(":")
        found = [
            f"{head}{colon}{name}:{bracket}"
            for name in schemes
            for bracket in ("", "[")
            if name.startswith(rest)
        ]
        if head.partition(":")[0] in schemes:
            brackets, bracket, path = rest.rpartition("]")
            prefix = f"{head}{colon}{brackets}{bracket}"
            found += [f"{prefix}{name}" for name in _files(path)]
        return [CompletionItem(text) for text in found]
    return []


def _files(start: str) -> list[str]:
    """Return the names that begin so; those of directories end with a slash."""
    folder, _, name = start.rpartition("/")
    place = f"{folder}/" if start.startswith("/") or folder else ""
    try:
        with os.scandir(place or ".") as entries:
            return sorted(
                f"{place}{entry.name}{'/' if entry.is_dir() else ''}"
                for entry in entries
                if entry.name.startswith(name) and (name or not entry.name.startswith("."))
            )
    except OSError:
        return []
