"""What somebody should know of what has been done as asked: an image with a tail, for example.

It is no error, so it cannot be raised. A back-end says it with :func:`remark`; it is logged as a
warning, and whoever carries out an operator's request gathers it for the answer with
:func:`remarks`.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

_gathered: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "gathered", default=None
)


def remark(logger: logging.Logger, text: str) -> None:
    """Say something to whoever has asked for what is being done. Cannot block.

    Args:
        logger: Logs it as a warning.
        text: Names what it is about, such as a file.
    """
    logger.warning("%s", text)
    found = _gathered.get()
    if found is not None:
        found.append(text)


@contextlib.contextmanager
def remarks() -> Iterator[list[str]]:
    """Gather what is said within a ``with`` block, by this task. Yields the list."""
    found: list[str] = []
    token = _gathered.set(found)
    try:
        yield found
    finally:
        _gathered.reset(token)
