"""What the options of a back-end mean, for people.

A module that has a plug-in may say so in :data:`OPTIONS_NAME`, a tuple of :class:`Option`;
``vmbus devices`` and the reference show it. It is a description: what is accepted is up to the code
that reads the options, and a test can compare the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

OPTIONS_NAME = "OPTIONS"
"""The attribute of a plug-in's module."""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option, as it is written between the brackets of a specification."""

    name: str
    meaning: str
    """A phrase, without a full stop."""
    value: str = ""
    """How its value is written: ``SIZE``, ``TIME``, ``N``, ``PATH`` or the choices, ``512|4096``;
    empty for a flag."""
    default: str = ""
    """What holds without it; empty for a flag, which is off then."""

    @property
    def usage(self) -> str:
        """How to write it."""
        return f"{self.name}={self.value}" if self.value else self.name


def read_options(module: ModuleType | None) -> Sequence[Option]:
    """Return what a plug-in's module says about its options; nothing if it says nothing."""
    found = getattr(module, OPTIONS_NAME, ())
    if not isinstance(found, tuple | list):
        return ()
    return [option for option in found if isinstance(option, Option)]
