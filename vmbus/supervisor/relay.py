"""Lines of a worker's log on their way to the supervisor's, which writes them.

So a line looks the same whoever caused it, a program with a supervisor has them where it has its
own, and a worker that a guest has taken over can write nowhere, and no more than its share.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

from vmbus.errors import VMBusError

MAX_TEXT = 16 << 10
"""Characters of a line."""


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


def replay_untrusted(line: object) -> None:
    """Log a line that a worker has sent. What makes no sense is logged as it is."""
    fields = line if isinstance(line, dict) else {"text": repr(line)}
    text, level, name = fields.get("text"), fields.get("level"), fields.get("logger")
    logger = logging.getLogger(name if isinstance(name, str) and len(name) < 100 else "vmbus")
    number = level if isinstance(level, int) and 0 <= level <= logging.CRITICAL else logging.WARNING
    if not logger.isEnabledFor(number):
        return
    error = fields.get("error")
    text = str(text)[:MAX_TEXT]
    if (trace := fields.get("traceback")) is not None:
        text += f"\n{str(trace)[:MAX_TEXT]}"
        error = None
    failure = WorkerError(str(error)[:MAX_TEXT]) if error is not None else None
    info = (type(failure), failure, None) if failure is not None else None
    logger.log(number, "%s", text, exc_info=info)
