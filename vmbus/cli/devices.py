"""``vmbus devices``: what is installed, and how to write it on a command line.

Names, help and examples come from the plug-ins themselves: from the docstring of the module that
an entry point names. Its first line may begin with the way to write it, as in
````ram:SIZE``: a disk in memory``; the first longer literal after it is the example. Options are
those that the module describes (:mod:`vmbus.plugins.options`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence

import click

from vmbus.cli.output import print_json, print_table, safe
from vmbus.cli.params import json_option
from vmbus.plugins.devices import DEVICES, backend_registries
from vmbus.plugins.options import Option, read_options
from vmbus.plugins.registry import Entry

_USAGE = {"device": "--device 'NAME OPTION=VALUE'"}
_USAGE_OF_SPECS = "scheme:[option,option=value]target"
_LITERAL = re.compile(r"``(.+?)``")


@dataclasses.dataclass(frozen=True, slots=True)
class Plugin:
    """One installed plug-in."""

    kind: str
    """``device``, or what a back-end is."""
    name: str
    value: str
    """The object that the entry point names, as ``module:attribute``."""
    help: str
    """One line; empty if the module says nothing."""
    example: str
    """How to write it."""
    options: Sequence[Option]
    """What its module says about its options."""
    error: str | None
    """Why it cannot be used."""


def find_plugins() -> list[Plugin]:
    """Load every installed plug-in; a broken one breaks itself only."""
    return [
        _describe(registry.noun, entry)
        for registry in (DEVICES, *backend_registries())
        for entry in registry.entries()
    ]


def _describe(kind: str, entry: Entry) -> Plugin:
    point = entry.points[0]
    text, example, error = "", "", None
    options: Sequence[Option] = ()
    if len(entry.points) > 1:
        values = " and ".join(entry.values)
        error = f"several packages claim this name: {values}; uninstall all but one"
    else:
        try:
            loaded = point.load()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        else:
            module = sys.modules.get(point.module)
            doc = inspect.getdoc(module) or inspect.getdoc(loaded)
            options = read_options(module)
            text, example = read_docstring(doc or "", kind, entry.name)
    return Plugin(kind, entry.name, point.value, text, example, options, error)


def read_docstring(doc: str, kind: str, name: str) -> tuple[str, str]:
    """Return one line of help and an example, from a plug-in's docstring."""
    first, _, rest = doc.strip().partition("\n")
    usage = re.match(r"``(.+?)``: *", first)
    text = first[usage.end() :] if usage else first
    text = text.replace("``", "").rstrip(".")
    separator = " " if kind == "device" else ":"
    literals = [usage[1]] if usage else []
    examples = [text for text in _LITERAL.findall(rest) if text.startswith(f"{name}{separator}")]
    example = next(iter(examples + literals), name + separator.strip())
    if kind == "device":
        example = f"--device {example!r}" if " " in example else f"--device {example}"
    return text, example


@click.command()
@json_option
def command(*, as_json: bool) -> None:
    """Show the installed devices and disk back-ends.

    A plug-in that cannot be imported is shown as broken, with the reason; nothing else is
    affected by it.
    """
    plugins = find_plugins()
    if as_json:
        print_json([dataclasses.asdict(plugin) for plugin in plugins])
        return
    if not plugins:
        click.echo("No devices are installed. If this is a source tree, run: pip install -e .")
        return
    print_table(
        ("kind", "name", "what it is", "example"),
        [
            (
                plugin.kind,
                plugin.name,
                plugin.help if plugin.error is None else "broken",
                plugin.example,
            )
            for plugin in plugins
        ],
    )
    for kind in dict.fromkeys(plugin.kind for plugin in plugins):
        rows = [
            (plugin.name, option.usage, option.default or "-", option.meaning)
            for plugin in plugins
            for option in plugin.options
            if plugin.kind == kind
        ]
        if rows:
            click.echo(f"\nOptions of {kind}s, as in {_USAGE.get(kind, _USAGE_OF_SPECS)}:\n")
            print_table(("of", "option", "without it", "what it does"), rows)
    for plugin in plugins:
        if plugin.error is not None:
            click.echo(f"\n{plugin.kind} {plugin.name} ({plugin.value}) is broken:")
            click.echo(f"  {safe(plugin.error)}")
