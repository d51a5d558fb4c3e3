"""Options and types of arguments that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.ASCII)
_OCTAL = re.compile(r"[0-7]{3}", re.ASCII)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes from a number, or a number with K, M, G or T (powers of 1024).

    Raises:
        click.BadParameter: The text is not a size.
    """
    match = _SIZE.fullmatch(text.upper())
    if match is None:
        raise click.BadParameter(
            f"{text!r} is not a size; write bytes, or a number with K, M, G or T"
        )
    return int(match[1]) << _SHIFT[match[2]]


def parse_permissions(text: str) -> int:
    """File permissions from octal digits. Raises click.BadParameter."""
    if not _OCTAL.fullmatch(text):
        raise click.BadParameter(f"{text!r} is not what file permissions look like, as in 660")
    return int(text, 8)


def socket_option(function: F) -> F:
    """Add ``--socket``, where a server listens."""
    return click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
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
