"""Opening a back-end: what a specification names, checked for being what the device expects."""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Awaitable, Callable
from typing import cast

from vmbus.errors import ConfigError
from vmbus.plugins.registry import Registry
from vmbus.plugins.specs import Spec

MAX_NESTING = 32
"""Back-ends within each other: overlays, delays, captures."""
_level: contextvars.ContextVar[int] = contextvars.ContextVar("level", default=0)

_Opener = Callable[[Spec], Awaitable[object]]


async def open_backend(registry: Registry, spec: Spec, kind: type) -> object:
    """Open what a specification names. A checkpoint if its opener makes one.

    The object of an entry point is ``async def open_spec(spec) -> kind``. One that opens others
    comes here again.

    Args:
        registry: Where its scheme is looked up.
        spec: Without the options that are the device's own.
        kind: The contract of such back-ends.

    Returns:
        An open back-end of that kind; the caller closes it.

    Raises:
        ConfigError: The scheme is not installed, its plug-in is broken, or what it names cannot be
            opened.
    """
    level = _level.get()
    if level >= MAX_NESTING:
        raise ConfigError(
            f"more than {MAX_NESTING} {registry.noun}s within each other: {str(spec)[:40]}..."
        )
    token = _level.set(level + 1)
    try:
        return await _open(registry, spec, kind)
    finally:
        _level.reset(token)


async def _open(registry: Registry, spec: Spec, kind: type) -> object:
    broken = f"{registry.noun} plug-in {spec.scheme!r} is broken"
    opener = registry.load(spec.scheme)
    opening = cast("_Opener", opener)(spec) if callable(opener) else None
    if not inspect.isawaitable(opening):
        raise ConfigError(f"{broken}: it has to be an async function of one {type(spec).__name__}")
    try:
        found: object = await opening
    except OSError as error:
        raise spec.error(error.strerror or str(error)) from error
    except OverflowError as error:  # of a number that no file is large enough for
        raise spec.error(str(error)) from error
    if not isinstance(found, kind):
        raise ConfigError(f"{broken}: it returned {type(found).__name__}, no {kind.__name__}")
    return found
