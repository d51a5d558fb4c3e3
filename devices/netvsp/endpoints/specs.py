"""Endpoints by name: ``tap:vnet0``, ``nat:[tcp=8080:80]``; see :mod:`vmbus.plugins.specs`.

A scheme is an entry point in the group ``netvsp.endpoints``; its object is
``async def open_spec(spec: EndpointSpec) -> Endpoint``. The endpoints of this project are
registered in just that way, and nothing is imported before its scheme is asked for.
"""

from __future__ import annotations

from typing import cast

from netvsp.endpoint import Endpoint
from netvsp.spec import EndpointSpec
from vmbus.plugins.opening import open_backend
from vmbus.plugins.registry import Registry

ENDPOINTS = Registry("netvsp.endpoints", "endpoint", "scheme")
"""The endpoints that are installed."""


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
    return cast("Endpoint", await open_backend(ENDPOINTS, spec, Endpoint))
