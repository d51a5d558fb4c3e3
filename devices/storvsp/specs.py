r"""Disks by name: the ``scheme:[options]target`` grammar and the registry of back-ends.

Grammar
-------
::

    spec    = scheme ":" [ "[" [ option *( "," option ) ] "]" ] target
    option  = name [ "=" value ]
    scheme  = name = lower-case letter, then letters, digits, "-" or "_"

``ram:64M``, ``raw:[ro,sector=4096]disk.img``, ``overlay:[scratch=new.img]raw:base.img``. What the
target means is up to the scheme: a size, a path, or another specification. Only the brackets have
an escape: a backslash makes the next character ordinary, so that a value may contain ``,``, ``]``
and ``\``. A target that itself begins with ``[`` needs an empty pair of brackets before it.

Values are sizes (``512``, ``64K``, ``10G``: powers of 1024), durations (``250us``, ``1.5ms``,
``2s``), integers, words or paths; a name alone is a flag.

Back-ends
---------
A scheme is an entry point in the group ``storvsp.disks``; its object is
``async def open_spec(spec: DiskSpec) -> Disk``. The back-ends of this project are registered in
just that way, and nothing is imported before its scheme is asked for. An opener reads its
options through :meth:`DiskSpec.reader`, which words the error messages.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import inspect
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar, cast

from storvsp.disk import Disk
from vmbus.errors import ConfigError

T = TypeVar("T")

ENTRY_POINT_GROUP = "storvsp.disks"

RESERVED_OPTIONS = frozenset({"path", "target", "lun"})
"""Options that place a disk on the controller; back-ends must not use these names."""

Opener = Callable[["DiskSpec"], Awaitable[Disk]]

_SCHEME = re.compile(r"([a-z][a-z0-9_-]*):", re.ASCII)
_NAME = re.compile(r"[a-z][a-z0-9_-]*", re.ASCII)
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.ASCII)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)", re.ASCII)
_SIZE_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DURATION_SCALE = {"us": 1_000_000, "ms": 1_000, "s": 1}
_YES = {"", "on", "yes", "true", "1"}
_NO = {"off", "no", "false", "0"}


@dataclasses.dataclass(frozen=True, slots=True)
class DiskSpec:
    """A parsed specification. ``str(spec)`` gives text that parses to an equal one."""

    scheme: str
    """Which back-end."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """The options in the order given; a flag has the value ``""``. Read-only."""
    target: str = ""
    """Everything after the brackets, as it was written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __str__(self) -> str:
        options = ",".join(
            f"{name}={_escape(value)}" if value else name for name, value in self.options.items()
        )
        brackets = f"[{options}]" if options or self.target.startswith("[") else ""
        return f"{self.scheme}:{brackets}{self.target}"

    def reader(self) -> OptionReader:
        """Read the options; see :class:`OptionReader`."""
        return OptionReader(self)

    def inner(self) -> DiskSpec:
        """Parse the target as a specification, for back-ends on top of another disk.

        Raises:
            ConfigError: It is not one.
        """
        if not self.target:
            raise ConfigError(f"{self}: needs a disk to work on, as in {self.scheme}:ram:64M")
        return parse_spec(self.target)


class OptionReader:
    """Takes options from a specification by name and type.

    Every method names one option that the back-end knows; :meth:`finish` then rejects the rest.
    All of them raise :class:`ConfigError` for a value that cannot be understood.
    """

    def __init__(self, spec: DiskSpec) -> None:
        self._spec = spec
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        """The value as written, or None if the option is absent."""
        self._known.append(name)
        value = self._spec.options.get(name)
        if value == "":
            raise self._error(name, "needs a value")
        return value

    def flag(self, name: str) -> bool:
        """True for ``name`` alone or ``=on``; False if absent or ``=off``."""
        self._known.append(name)
        value = self._spec.options.get(name, "off").lower()
        if value not in _YES | _NO:
            raise self._error(name, f"is {value!r}; write it alone, or with =on or =off")
        return value in _YES

    def size(self, name: str) -> int | None:
        """Bytes, or None if the option is absent."""
        return self._convert(name, parse_size)

    def duration(self, name: str) -> float:
        """Seconds; 0.0 if the option is absent."""
        return self._convert(name, parse_duration) or 0.0

    def integer(self, name: str, *, choices: Collection[int] = ()) -> int | None:
        """A decimal number, or None if the option is absent.

        Args:
            name: Option.
            choices: The only values allowed; empty for any number from 0.
        """

        def convert(text: str) -> int:
            if not (text.isascii() and text.isdigit()):
                raise ConfigError(f"{text!r} is not a whole number")
            return int(text)

        value = self._convert(name, convert)
        if value is not None and choices and value not in choices:
            raise self._error(name, f"is {value}; it can be {_list(map(str, choices), 'or')}")
        return value

    def probability(self, name: str) -> float:
        """A number from 0 to 1; 1.0 if the option is absent."""

        def convert(text: str) -> float:
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{text!r} is not a number from 0 to 1")
            return value

        value = self._convert(name, convert)
        return 1.0 if value is None else value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """One of ``choices``, or None if the option is absent."""
        value = self.text(name)
        if value is not None and value not in choices:
            raise self._error(name, f"is {value!r}; {_suggest(value, choices)}")
        return value

    def finish(self) -> None:
        """Reject options that no method asked for.

        Raises:
            ConfigError: Names the option, the known ones and the closest.
        """
        for name in self._spec.options:
            if name in self._known:
                continue
            if name in RESERVED_OPTIONS:
                raise self._error(
                    name, "places a disk on the controller and belongs to the outermost brackets"
                )
            raise ConfigError(
                f"{self._spec}: unknown option {name!r}; {_suggest(name, self._known)}"
            )

    def _convert(self, name: str, convert: Callable[[str], T]) -> T | None:
        text = self.text(name)
        if text is None:
            return None
        try:
            return convert(text)
        except ConfigError as error:
            raise self._error(name, f"cannot be used: {error}") from None

    def _error(self, name: str, text: str) -> ConfigError:
        return ConfigError(f"{self._spec}: option {name!r} {text}")


def parse_spec(text: str) -> DiskSpec:
    """Parse ``scheme:[options]target``. Does not look at what the scheme is.

    Raises:
        ConfigError: Says where the text is wrong.
    """
    match = _SCHEME.match(text)
    if match is None:
        raise ConfigError(
            f"{text!r} does not begin with a scheme; for an image file write raw:{text}"
            if text
            else "an empty disk specification; write for example ram:64M"
        )
    rest = text[match.end() :]
    options: dict[str, str] = {}
    if rest.startswith("["):
        options, rest = _parse_options(text, rest)
    return DiskSpec(match[1], options, rest)


def split_options(
    spec: DiskSpec, names: Collection[str] = RESERVED_OPTIONS
) -> tuple[DiskSpec, dict[str, str]]:
    """Split off the options that are meant for somebody else, usually the controller.

    Returns:
        The specification without them, and what was split off.
    """
    taken = {name: value for name, value in spec.options.items() if name in names}
    kept = {name: value for name, value in spec.options.items() if name not in names}
    return dataclasses.replace(spec, options=kept), taken


def parse_size(text: str) -> int:
    """Bytes from ``512``, ``64K``, ``10G``; suffixes K, M, G, T are powers of 1024.

    Raises:
        ConfigError: The text is not a size.
    """
    match = _SIZE.fullmatch(text.upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write bytes, or a number with K, M, G or T")
    return int(match[1]) << _SIZE_SHIFT[match[2]]


def parse_duration(text: str) -> float:
    """Seconds from ``250us``, ``1.5ms`` or ``2s``.

    Raises:
        ConfigError: The text is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a duration; write a number with us, ms or s")
    return float(match[1]) / _DURATION_SCALE[match[2]]


def known_schemes() -> list[str]:
    """The schemes that are installed, sorted. Imports no back-end."""
    return sorted({point.name for point in _entry_points()})


async def open_disk(spec: str | DiskSpec) -> Disk:
    """Open the disk that a specification describes. A checkpoint if its back-end makes one.

    Args:
        spec: Text or a parsed specification, without the reserved options.

    Returns:
        An open disk; the caller closes it.

    Raises:
        ConfigError: The text is wrong, the scheme is not installed, its plug-in is broken, or
            what it names cannot be opened.
        DiskError: The back-end was reached and failed.
    """
    if isinstance(spec, str):
        spec = parse_spec(spec)
    point = _find(spec.scheme)
    where = f"disk plug-in {point.name!r} ({point.value})"
    try:
        opener = point.load()
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be imported: {type(error).__name__}: {error}; repair or uninstall it"
        ) from error
    opening = cast("Opener", opener)(spec) if callable(opener) else None
    if not inspect.isawaitable(opening):
        raise ConfigError(f"{where} is broken: it has to be an async function of one DiskSpec")
    try:
        disk = await opening
    except OSError as error:
        raise ConfigError(f"{spec}: {error.strerror or error}") from error
    if not isinstance(disk, Disk):
        raise ConfigError(f"{where} is broken: it returned {type(disk).__name__}, not a Disk")
    return disk


def _find(scheme: str) -> importlib.metadata.EntryPoint:
    points = [point for point in _entry_points() if point.name == scheme]
    if not points:
        raise ConfigError(f"unknown disk scheme {scheme!r}; {_suggest(scheme, known_schemes())}")
    values = sorted({point.value for point in points})
    if len(values) > 1:
        raise ConfigError(
            f"two plug-ins claim the disk scheme {scheme!r}: {_list(values, 'and')};"
            " uninstall all but one"
        )
    return points[0]


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)


def _parse_options(text: str, rest: str) -> tuple[dict[str, str], str]:
    """Parse the brackets that ``rest`` begins with; returns the options and what follows."""
    items = [""]
    position = 1
    while (character := rest[position : position + 1]) != "]":
        if character == "\\":
            position += 1
            character = rest[position : position + 1]
        elif character == ",":
            items.append("")
            character = ""
        if position >= len(rest):
            raise ConfigError(f"{text!r}: the option brackets are not closed with ]")
        items[-1] += character
        position += 1
    options: dict[str, str] = {}
    for item in items if items != [""] else ():
        name, equals, value = item.partition("=")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{text!r}: {item!r} is not an option; write name or name=value")
        if name in options:
            raise ConfigError(f"{text!r}: option {name!r} is given twice")
        if equals and not value:
            raise ConfigError(f"{text!r}: option {name!r} has nothing after its =")
        options[name] = value
    return options, rest[position + 1 :]


def _escape(value: str) -> str:
    return re.sub(r"([\\,\]])", r"\\\1", value)


def _suggest(word: str, known: Collection[str]) -> str:
    if not known:
        return "there are none"
    close = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {_list(sorted(known), 'and')}"


def _list(words: Iterable[str], conjunction: str) -> str:
    *head, last = words
    return f"{', '.join(head)} {conjunction} {last}" if head else last
