r"""Back-ends by name: the ``scheme:[options]target`` grammar.

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

What a kind of back-end has of its own, its name for people and the options that its device takes
for itself, is said by a subclass of :class:`Spec`. A back-end reads its options through
:meth:`Spec.reader`, which words the error messages; a device reads its own through an
:class:`OptionReader`, too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import ClassVar, Self, TypeVar

from vmbus.errors import ConfigError
from vmbus.plugins.words import enumerate_words, suggest

T = TypeVar("T")

MAX_TEXT = 16384
"""Characters of a specification: some paths of the greatest length."""
MAX_DIGITS = 20
"""Digits of a number, before the suffix of a size."""
MAX_SIZE = (1 << 63) - 1
"""Bytes: the largest offset in a file (off_t)."""

_SCHEME = re.compile(r"([a-z][a-z0-9_-]*):", re.ASCII)
_NAME = re.compile(r"[a-z][a-z0-9_-]*", re.ASCII)
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.ASCII)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)", re.ASCII)
_SIZE_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DURATION_SCALE = {"us": 1_000_000, "ms": 1_000, "s": 1}
_YES = {"", "on", "yes", "true", "1"}
_NO = {"off", "no", "false", "0"}
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """A parsed specification. ``str(spec)`` gives text that parses to an equal one."""

    scheme: str
    """Which back-end."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """The options in the order given; a flag has the value ``""``. Read-only."""
    target: str = ""
    """Everything after the brackets, as it was written."""

    noun: ClassVar[str] = "back-end"
    """What people call such a back-end."""
    example: ClassVar[str] = "scheme:target"
    """A specification that stands for itself."""
    file_scheme: ClassVar[str] = ""
    """The scheme that somebody who wrote a bare path may have meant."""
    reserved: ClassVar[Mapping[str, str]] = {}
    """Options that the device takes for itself, and what each does there. Back-ends must not use
    these names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __str__(self) -> str:
        options = ",".join(
            f"{name}={_escape(value)}" if value else name for name, value in self.options.items()
        )
        brackets = f"[{options}]" if options or self.target.startswith("[") else ""
        return f"{self.scheme}:{brackets}{self.target}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``scheme:[options]target``. Does not look at what the scheme is.

        Raises:
            ConfigError: Says where the text is wrong.
        """
        check_text(text, f"{cls.noun} specification")
        match = _SCHEME.match(text)
        if match is None:
            if not text:
                raise ConfigError(
                    f"an empty {cls.noun} specification; write for example {cls.example}"
                )
            hint = f"; for an image file write {cls.file_scheme}:{text}" if cls.file_scheme else ""
            raise ConfigError(f"{text!r} does not begin with a scheme{hint}")
        rest = text[match.end() :]
        options: dict[str, str] = {}
        if rest.startswith("["):
            options, rest = _parse_options(text, rest)
        return cls(match[1], options, rest)

    def split(self) -> tuple[Self, dict[str, str]]:
        """Split off the options that are meant for the device.

        Returns:
            The specification without them, and what was split off.
        """
        taken = {name: value for name, value in self.options.items() if name in self.reserved}
        kept = {name: value for name, value in self.options.items() if name not in self.reserved}
        return dataclasses.replace(self, options=kept), taken

    def reader(self) -> OptionReader:
        """Read the options; see :class:`OptionReader`."""
        return OptionReader(self._quoted, self.options, self.reserved)

    @property
    def _quoted(self) -> str:
        text = str(self)
        return repr(text) if text.endswith(":") else text

    def error(self, text: str) -> ConfigError:
        """Return an error about this specification, to be raised."""
        return ConfigError(f"{self._quoted}: {text}")

    def size(self) -> int:
        """Parse the target as a size in bytes, for back-ends whose target is one.

        Raises:
            ConfigError: It is not one.
        """
        if not self.target:
            raise self.error(f"needs a size, as in {self.scheme}:64M")
        try:
            return parse_size(self.target)
        except ConfigError as error:
            raise self.error(str(error)) from None

    def inner(self) -> Self:
        """Parse the target as a specification, for back-ends on top of another one.

        Raises:
            ConfigError: It is not one.
        """
        if not self.target:
            raise self.error(f"needs a {self.noun} to work on, as in {self.scheme}:{self.example}")
        return self.parse(self.target)


class OptionReader:
    """Takes options by name and type: those of a specification, or those of a device.

    Every method names one option that the back-end or device knows; :meth:`finish` then rejects
    the rest. All of them raise :class:`ConfigError` for a value that cannot be understood.

    Args:
        owner: Whose they are, for messages: a specification, or what people call the device.
        options: By name. Values are text; numbers and booleans, as programs have them, are taken
            for what a command line would say instead. A flag has the value ``""``.
        reserved: Options that somebody else takes, and what each does there.
    """

    def __init__(
        self, owner: str, options: Mapping[str, object], reserved: Mapping[str, str] = _NOTHING
    ) -> None:
        self._owner = owner
        self._options = {name: _option_text(value) for name, value in options.items()}
        self._reserved = reserved
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        """The value as written, or None if the option is absent."""
        self._known.append(name)
        value = self._options.get(name)
        if value == "":
            raise self._error(name, "needs a value")
        return value

    def flag(self, name: str) -> bool:
        """True for ``name`` alone or ``=on``; False if absent or ``=off``."""
        self._known.append(name)
        value = self._options.get(name, "off").lower()
        if value not in _YES | _NO:
            raise self._error(name, f"is {value!r}; it can be on or off")
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
        value = self._convert(name, parse_number)
        if value is not None and choices and value not in choices:
            raise self._error(
                name, f"is {value}; it can be {enumerate_words(map(str, choices), 'or')}"
            )
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
            raise self._error(name, f"is {value!r}; {suggest(value, choices)}")
        return value

    def finish(self) -> None:
        """Reject options that no method asked for.

        Raises:
            ConfigError: Names the option, the known ones and the closest.
        """
        for name in self._options:
            if name in self._known:
                continue
            if name in self._reserved:
                does = self._reserved[name]
                raise self._error(name, f"{does} and belongs to the outermost brackets")
            raise ConfigError(
                f"{self._owner}: unknown option {name!r}; {suggest(name, self._known)}"
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
        return ConfigError(f"{self._owner}: option {name!r} {text}")


def _option_text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def check_text(text: str, what: str) -> None:
    """Raise ConfigError for what no file can be called, and for what nobody has typed."""
    if len(text) > MAX_TEXT:
        raise ConfigError(f"a {what} of {len(text)} characters; {MAX_TEXT} are possible")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        # NUL ends a name for the kernel. Undecodable bytes of an argument are surrogates in Python,
        # and cannot be sent or logged.
        raise ConfigError(f"a {what} with NUL or undecodable bytes: {text[:80]!a}")


def parse_number(text: str, *, signed: bool = False) -> int:
    """A whole decimal number.

    Args:
        text: Digits.
        signed: A minus may stand before them.

    Raises:
        ConfigError: The text is no number, or has more digits than any that means something.
    """
    digits = text.removeprefix("-") if signed else text
    if not (digits.isascii() and digits.isdigit()):
        raise ConfigError(f"{text[:40]!r} is not a whole number")
    if len(digits) > MAX_DIGITS:
        raise ConfigError(f"{text[:MAX_DIGITS]}... has {len(digits)} digits")
    return int(text)


def parse_size(text: str) -> int:
    """Bytes from ``512``, ``64K``, ``10G``; suffixes K, M, G, T are powers of 1024.

    Raises:
        ConfigError: The text is not a size.
    """
    match = _SIZE.fullmatch(text.upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write bytes, or a number with K, M, G or T")
    size = int(match[1]) << _SIZE_SHIFT[match[2]] if len(match[1]) <= MAX_DIGITS else -1
    if not 0 <= size <= MAX_SIZE:
        raise ConfigError(f"{text[:40]} is more than a file can have")
    return size


def parse_duration(text: str) -> float:
    """Seconds from ``250us``, ``1.5ms`` or ``2s``.

    Raises:
        ConfigError: The text is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a duration; write a number with us, ms or s")
    return float(match[1]) / _DURATION_SCALE[match[2]]


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
