"""Endpoints by name: ``tap:vnet0``, ``nat:[tcp=8080:80]``; see :mod:`vmbus.plugins.specs`.

A scheme is an entry point in the group ``netvsp.endpoints``; its object is
``async def open_spec(spec: EndpointSpec) -> Endpoint``. The endpoints of this project are
registered in just that way, and nothing is imported before its scheme is asked for.
"""

from __future__ import annotations

import contextvars
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar, cast

from netvsp.endpoint import Endpoint
from vmbus.errors import ConfigError
from vmbus.plugins.registry import Registry
from vmbus.plugins.specs import Spec

ENDPOINTS = Registry("netvsp.endpoints", "endpoint", "scheme")
"""The endpoints that are installed."""

MAX_NESTING = 32
"""Endpoints around each other: captures."""
_level: contextvars.ContextVar[int] = contextvars.ContextVar("level", default=0)

Opener = Callable[["EndpointSpec"], Awaitable[Endpoint]]


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointSpec(Spec):
    """The specification of an endpoint."""

    noun: ClassVar[str] = "endpoint"
    example: ClassVar[str] = "tap:vnet0"
    reserved: ClassVar[Mapping[str, str]] = {
        "mac": "the adapter's address, as 00:15:5d:01:02:03; by default one that goes with the "
        "guest's name and the adapter's number",
        "mtu": "bytes of payload of the longest frame that the guest may ask for, 68 to 9202 "
        "(default)",
        "channels": "queues of the adapter, 1 to 64; by default 8",
        "name": "what the guest may call it; Linux makes it the alias of the interface",
        "nic-vlan": "the VLAN that the guest is in, 1 to 4094; it sees no tags",
        "nic-trunk": "VLANs whose tags the guest may use, as 0+7+20-29; 0 is no tag",
        "spoof": "let the guest send with addresses that are not its own",
        "mac-change": "let the guest choose another address",
        "offloads": "on (default) or off: checksums and large segments are left to the host",
        "monitor": "ring through the monitor page: slower, but DPDK and OpenBSD need it",
    }

    def without_target(self) -> None:
        """Refuse a target, for schemes that have none. Raises ConfigError."""
        if self.target:
            raise self.error(f"{self.scheme}: has nothing behind it but its options")


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
