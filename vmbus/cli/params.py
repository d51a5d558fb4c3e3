"""Options and types of arguments that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from vmbus.cli.completion import complete_file
from vmbus.errors import ConfigError
from vmbus.plugins import specs

F = TypeVar("F", bound=Callable[..., Any])

_OCTAL = re.compile(r"[0-7]{3}", re.ASCII)


class Number(click.IntRange):
    """Whole numbers within bounds, with words for others that say the bounds."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number. Raises click.BadParameter."""
        try:
            number: float = specs.parse_number(str(value), signed=True)
        except ConfigError:
            number = math.nan
        least = -math.inf if self.min is None else self.min
        most = math.inf if self.max is None else self.max
        if not least <= number <= most:
            bounds = f"{self.min} on" if self.max is None else f"{self.min} to {self.max}"
            self.fail(f"{str(value)[:40]!r} is not a whole number from {bounds}", param, ctx)
        return int(number)


def parse_size(text: str) -> int:
    """Bytes, as in back-ends' options; see :func:`vmbus.plugins.specs.parse_size`.

    Raises:
        click.BadParameter: The text is not a size.
    """
    try:
        return specs.parse_size(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None


MIN_TRANSFER, MAX_TRANSFER = 64 << 10, 128 << 20
"""Bytes of one SCSI request that a controller can be told to take."""


def parse_transfer(text: str) -> int:
    """Bytes of one SCSI request, in whole pages. Raises click.BadParameter."""
    size = parse_size(text)
    if size % 4096 or not MIN_TRANSFER <= size <= MAX_TRANSFER:
        raise click.BadParameter(f"{text[:40]!r} is not a multiple of 4K from 64K to 128M")
    return size


def parse_permissions(text: str) -> int:
    """File permissions from octal digits. Raises click.BadParameter."""
    if not _OCTAL.fullmatch(text):
        raise click.BadParameter(f"{text!r} is not what file permissions look like, as in 660")
    return int(text, 8)


def seconds_type(least: float, most: float) -> Callable[[str], float]:
    """Return a type of options for ``click``: seconds within bounds; ``nan`` is within none."""

    def seconds(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise click.BadParameter(
                f"{str(text)[:40]!r} is not a number of seconds from {least:g} to {most:g}"
            )
        return value

    return seconds


def socket_option(function: F) -> F:
    """Add ``--socket``, where a server listens."""
    return click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        shell_complete=complete_file,
        required=True,
        envvar="VMBUS_SOCKET",
        show_envvar=True,
        help="Where the server listens, as given to vmbus serve.",
    )(function)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for other programs.")(
        function
    )
