"""Lines of a worker's log on their way to the supervisor's, which writes them.

So a line looks the same whoever caused it, a program with a supervisor has them where it has its
own, and a worker that a guest has taken over can write nowhere, and no more than its share.
"""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable
from typing import Any

from vmbus.errors import PeerProtocolError, VMBusError

MAX_TEXT = 16 << 10
"""Characters of a line."""


MAX_LOGGERS = 100
"""Names of loggers that workers can bring."""


class WorkerError(VMBusError):
    """An exception in a worker, as its text."""


def levels() -> dict[str, int]:
    """Return the levels of this process's loggers, the root's as ``""``."""
    root = logging.getLogger()
    found = {
        name: logger.level
        for name, logger in root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and logger.level
    }
    return {"": root.level, **found}


class RelayHandler(logging.Handler):
    """Sends records up.

    Args:
        send: Takes a message for the supervisor.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            line: dict[str, Any] = {
                "logger": record.name,
                "level": record.levelno,
                "text": record.getMessage()[:MAX_TEXT],
            }
            error = record.exc_info[1] if record.exc_info else None
            if error is not None:
                line["error"] = str(error)[:MAX_TEXT]
                if not isinstance(error, VMBusError | OSError):
                    line["traceback"] = "".join(traceback.format_exception(error))[-MAX_TEXT:]
            self._send({"log": line})
        except Exception:  # as logging.Handler wants it
            self.handleError(record)


def install(send: Callable[[dict[str, Any]], None], wanted: dict[str, int]) -> None:
    """Make this process's log go through ``send``, and only there.

    Args:
        send: As in :class:`RelayHandler`.
        wanted: As :func:`levels` returned it in the supervisor.
    """
    root = logging.getLogger()
    for handler in tuple(root.handlers):
        root.removeHandler(handler)
    root.addHandler(RelayHandler(send))
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)


def _logger(name: str) -> logging.Logger:
    """Return a logger. They are never forgotten, so a worker does not get to make many."""
    known = logging.root.manager.loggerDict
    if name not in known and name != "root":
        if len(name) >= 100 or len(_made) >= MAX_LOGGERS:
            name = "vmbus"
        else:
            _made.add(name)
    return logging.getLogger(name)


_made: set[str] = set()


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[:MAX_TEXT])


def is_detail_untrusted(line: object) -> bool:
    """Whether a line that a worker has sent is one for who debugs, if it is one at all."""
    level = line.get("level") if isinstance(line, dict) else None
    return isinstance(level, int) and level < logging.INFO


def replay_untrusted(line: object) -> None:
    """Log a line that a worker has sent, as one line, so that it can pretend to be no other.

    Raises:
        PeerProtocolError: It is no line, or not of text.
    """
    fields = line if isinstance(line, dict) else {}
    text, level, name = fields.get("text"), fields.get("level"), fields.get("logger")
    error, trace = fields.get("error", ""), fields.get("traceback", "")
    if not (
        isinstance(text, str)
        and isinstance(name, str)
        and isinstance(error, str)
        and isinstance(trace, str)
    ):
        raise PeerProtocolError("a line of its log that is no text", errno=errno.EPROTO)
    logger = _logger(name)
    number = level if isinstance(level, int) and 0 <= level <= logging.CRITICAL else logging.WARNING
    if not logger.isEnabledFor(number):
        return
    text = _printable(text)
    if trace:
        text = "\n  ".join([text, *map(_printable, trace[:MAX_TEXT].splitlines())])
    failure = WorkerError(_printable(error)) if "error" in fields and not trace else None
    info = (type(failure), failure, None) if failure is not None else None
    logger.log(number, "%s", text, exc_info=info)
