"""Endpoints by name: ``tap:vnet0``, ``nat:[tcp=8080:80]``; see :mod:`vmbus.plugins.specs`.

A scheme is an entry point in the group ``netvsp.endpoints``; its object is
``async def open_spec(spec: EndpointSpec) -> Endpoint``. The endpoints of this project are
registered in just that way, and nothing is imported before its scheme is asked for.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Awaitable, Callable
from typing import cast

from netvsp.endpoint import Endpoint
from netvsp.spec import EndpointSpec
from vmbus.errors import ConfigError
from vmbus.plugins.registry import Registry

ENDPOINTS = Registry("netvsp.endpoints", "endpoint", "scheme")
"""The endpoints that are installed."""

MAX_NESTING = 32
"""Endpoints around each other: captures."""
_level: contextvars.ContextVar[int] = contextvars.ContextVar("level", default=0)

Opener = Callable[["EndpointSpec"], Awaitable[Endpoint]]


async def open_endpoint(spec: str | EndpointSpec) -> Endpoint:
    """Open the endpoint that a specification describes. A checkpoint if its opener makes one.

    Args:
        spec: Text or a parsed specification.

    Returns:
        An open endpoint; the caller closes it.

    Raises:
        ConfigError: The text is wrong, the scheme is not installed, its plug-in is broken, or
            what it names cannot be opened.
    """
    if isinstance(spec, str):
        spec = EndpointSpec.parse(spec)
    level = _level.get()
    if level >= MAX_NESTING:
        raise ConfigError(
            f"more than {MAX_NESTING} endpoints around each other: {str(spec)[:40]}..."
        )
    token = _level.set(level + 1)
    try:
        return await _open(spec)
    finally:
        _level.reset(token)


async def _open(spec: EndpointSpec) -> Endpoint:
    opener = ENDPOINTS.load(spec.scheme)
    opening = cast("Opener", opener)(spec) if callable(opener) else None
    if not inspect.isawaitable(opening):
        raise ConfigError(
            f"endpoint plug-in {spec.scheme!r} is broken: it has to be an async function of one "
            "EndpointSpec"
        )
    try:
        endpoint = await opening
    except OSError as error:
        raise spec.error(error.strerror or str(error)) from error
    if not isinstance(endpoint, Endpoint):
        raise ConfigError(
            f"endpoint plug-in {spec.scheme!r} is broken: it returned {type(endpoint).__name__}, "
            "not an Endpoint"
        )
    return endpoint
