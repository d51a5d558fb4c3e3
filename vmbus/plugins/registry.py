"""Plug-ins by name: one look-up of entry points for devices and for every kind of back-end.

Nothing is imported before its name is asked for, and a plug-in that cannot be imported breaks
itself only.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType

from vmbus.errors import ConfigError
from vmbus.plugins.words import enumerate_words, suggest


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One name of a group."""

    name: str
    points: tuple[importlib.metadata.EntryPoint, ...]
    """What claims the name, each value once; more than one is an error."""

    @property
    def values(self) -> list[str]:
        """The objects that are claimed, as ``module:attribute``, in order."""
        return sorted(point.value for point in self.points)


@dataclasses.dataclass(frozen=True, slots=True)
class Registry:
    """The plug-ins of one kind.

    The group ``storvsp.disks`` has entry points like this one::

        [project.entry-points."storvsp.disks"]
        chess = "chess_disk:open_spec"
    """

    group: str
    """Of entry points."""
    noun: str
    """What people call such a plug-in, as in "disk"."""
    names_are: str = ""
    """What people call its name, as in "scheme", if it has a word of its own."""

    @property
    def _what(self) -> str:
        return f"{self.noun} {self.names_are}".rstrip()

    def entries(self) -> Iterator[Entry]:
        """Yield what is installed, by name. Imports no plug-in."""
        found: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            found.setdefault(point.name, {}).setdefault(point.value, point)
        for name, points in sorted(found.items()):
            yield Entry(name, tuple(points.values()))

    def names(self) -> list[str]:
        """Return the names of all that is installed, in order. Imports no plug-in."""
        return [entry.name for entry in self.entries()]

    def load(self, name: str) -> object:
        """Import a plug-in and return its object.

        Raises:
            ConfigError: There is none of this name, there are two, or it cannot be imported.
        """
        entries = {entry.name: entry for entry in self.entries()}
        if name not in entries:
            raise ConfigError(f"unknown {self._what} {name!r}; {suggest(name, entries)}")
        return self.load_entry(entries[name])

    def load_entry(self, entry: Entry) -> object:
        """Import the plug-in of an entry, as :meth:`load` does. Raises ConfigError."""
        if len(entry.points) > 1:
            raise ConfigError(
                f"two plug-ins claim the {self._what} {entry.name!r}: "
                f"{enumerate_words(entry.values, 'and')}; uninstall all but one"
            )
        try:
            return entry.points[0].load()
        except Exception as error:
            raise ConfigError(
                f"{self.where(entry)} cannot be imported: {type(error).__name__}: {error}; "
                "repair or uninstall it"
            ) from error

    def module(self, name: str) -> ModuleType | None:
        """Return the module that a name's entry point is in; None if it is not loaded."""
        points = [entry.points[0] for entry in self.entries() if entry.name == name]
        return sys.modules.get(points[0].module) if points else None

    def where(self, entry: Entry) -> str:
        """Name a plug-in for a message about it."""
        return f"{self.noun} plug-in {entry.name!r} ({', '.join(entry.values)})"
