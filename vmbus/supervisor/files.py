"""Which files the disks of a command line name, for a sandbox that lets in no others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from vmbus.errors import ConfigError
from vmbus.plugins.specs import Spec
from vmbus.server import DeviceSetup
from vmbus.server.devices import for_guest


def named_files(setups: Iterable[DeviceSetup], guest: str) -> list[str]:
    """Return the paths that specifications mention, as far as they are there.

    ``raw:[ro]a.img``, ``overlay:[scratch=b.img]raw:a.img``: targets, those of specifications within
    specifications, and values of options. A file that is to be made yet stands for its directory:
    the kernel's rules are about what exists.

    Raises:
        ConfigError: A guest of this name cannot stand for ``{guest}``.
    """
    words = (
        word for setup in setups for spec in setup.specs for word in _words(for_guest(spec, guest))
    )
    return sorted({path for word in words if (path := _place(word))})


def _words(text: str) -> Iterator[str]:
    """Yield what could be a path in a specification: what is none itself."""
    try:
        spec = Spec.parse(text)
    except ConfigError:
        yield text
        return
    yield from spec.options.values()
    yield from _words(spec.target)


def _place(word: str) -> str:
    if os.path.exists(word):
        return word
    parent = os.path.dirname(word)
    looks_like_a_path = "/" in word or "." in word
    return (parent or ".") if looks_like_a_path and os.path.isdir(parent or ".") else ""
