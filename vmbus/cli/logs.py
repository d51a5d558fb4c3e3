"""The log of ``vmbus serve``: one line per happening on standard error, or one JSON object.

====== ==========================================================================================
level  what is shown
====== ==========================================================================================
-2     ``-qq``: errors
-1     ``-q``: warnings and errors
0      guests coming and going, and what they do wrong
1      ``-v``: every connection, and what devices report
2      ``-vv``: everything
====== ==========================================================================================
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import TextIO

import click

from vmbus.cli.output import safe, styled
from vmbus.errors import VMBusError

TOLD = ("vmbus.server", "vmbus.bus", "vmbus.cli", "vmbus.kvm")
"""Loggers whose INFO is about guests, not about connections; shown by default."""


def _exception(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    """Return the traceback of a record, unless its exception explains itself."""
    if record.exc_info and not isinstance(record.exc_info[1], VMBusError | OSError | None):
        return formatter.formatException(record.exc_info)
    return None


class LineFormatter(logging.Formatter):
    """``12:03:05 warning: vm1: ...``; a traceback only for what nobody expected."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = safe(record.getMessage())
        if (error := _exception(record)) is not None:
            text += f": {safe(error)}"
        if record.levelno >= logging.WARNING:
            label = f"{record.levelname.lower()}:"
            if self._colour:
                label = click.style(label, "red" if record.levelno > logging.WARNING else "yellow")
            text = f"{label} {text}"
        line = f"{self.formatTime(record, self.datefmt)} {text}"
        traceback = _traceback(self, record)
        return line if traceback is None else f"{line}\n{traceback}"


class JsonFormatter(logging.Formatter):
    """One object per line: time (RFC 3339, UTC), level, logger, message, and error if any."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (error := _exception(record)) is not None:
            fields["error"] = str(error)
        if (traceback := _traceback(self, record)) is not None:
            fields["traceback"] = traceback
        return json.dumps(fields, ensure_ascii=False)


@contextlib.contextmanager
def logging_to(stream: TextIO, *, level: int = 0, as_json: bool = False) -> Iterator[None]:
    """Log to ``stream`` for the length of a ``with`` block; see the module for ``level``."""
    root = logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter(colour=styled(stream)))
    levels: dict[logging.Logger, int] = {root: logging.WARNING if level >= -1 else logging.ERROR}
    if level == 0:
        levels |= {logging.getLogger(name): logging.INFO for name in TOLD}
    elif level > 0:
        levels[root] = logging.INFO if level == 1 else logging.DEBUG
    before = {logger: logger.level for logger in levels}
    for logger, number in levels.items():
        logger.setLevel(number)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, number in before.items():
            logger.setLevel(number)
