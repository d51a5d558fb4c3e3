"""What a shell offers to complete beside commands and options: disks, devices and files.

click makes the shells' side of it (bash: :mod:`vmbus.cli.bash_completion`); see
``docs/reference/cli.md``.
"""

from __future__ import annotations

import contextlib
import os

import click
from click.shell_completion import CompletionItem


def complete_spec(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return what a disk's specification that begins like this could be."""
    return _complete_backend("disk", incomplete)


def complete_endpoint(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return what an endpoint's specification that begins like this could be."""
    return _complete_backend("endpoint", incomplete)


def _complete_backend(noun: str, incomplete: str) -> list[CompletionItem]:
    """Return schemes, and files of theirs.

    A scheme is offered with and without brackets, so that the shell does not take it for complete
    and puts a space behind it.
    """
    from vmbus.errors import ConfigError
    from vmbus.plugins.devices import backend_registries

    with contextlib.suppress(ConfigError):
        schemes = [
            name
            for registry in backend_registries()
            if registry.noun == noun
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


def complete_device(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return what the words of a device, ``NAME [OPTION=VALUE]... [SPEC]...``, could be.

    A name that is the only one is offered with what can follow it, too: a shell would close the
    quotes behind what it takes for complete.
    """
    from vmbus.errors import ConfigError
    from vmbus.plugins.devices import DEVICES

    before, space, word = incomplete.rpartition(" ")
    try:
        if space:
            name = before.split(" ", 1)[0]
            found = _device_words(name, word)
            return [CompletionItem(f"{before} {text}") for text in found]
        names = [name for name in DEVICES.names() if name.startswith(word)]
        if len(names) == 1:
            names += [f"{names[0]} {text}" for text in _device_words(names[0], "")]
    except ConfigError:
        return []
    return [CompletionItem(name) for name in names]


def _device_words(name: str, word: str) -> list[str]:
    """Return options of a device, and specifications of what it can have. Raises ConfigError."""
    from vmbus.plugins.devices import DEVICES, load_device
    from vmbus.plugins.options import read_options

    plugin = load_device(name)
    found: list[str] = []
    for option in read_options(DEVICES.module(name)):
        choices = option.value.split("|") if "|" in option.value else [""]
        found += [f"{option.name}={choice}" for choice in choices]
    found = [text for text in found if text.startswith(word)]
    if plugin.backends is not None:
        found += [item.value for item in _complete_backend(plugin.backends.noun, word)]
    return found


def complete_file(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Have the shell itself complete the name of a file."""
    return [CompletionItem(incomplete, type="file")]


def _files(start: str) -> list[str]:
    """Return the names that begin so; those of directories end with a slash.

    A lone directory is followed by what is in it.
    """
    folder, _, name = start.rpartition("/")
    place = f"{folder}/" if start.startswith("/") or folder else ""
    try:
        with os.scandir(place or ".") as entries:
            found = sorted(
                f"{place}{entry.name}{'/' if entry.is_dir() else ''}"
                for entry in entries
                if entry.name.startswith(name) and (name or not entry.name.startswith("."))
            )
    except OSError:
        return []
    if len(found) == 1 and found[0].endswith("/"):
        found += _files(found[0])
    return found
