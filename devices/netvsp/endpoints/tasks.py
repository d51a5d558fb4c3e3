"""The tasks of an endpoint: several, of which the first that fails ends all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from netvsp.endpoint import EndpointError

CLOSED = "it is closed"


async def run_together(*functions: Callable[[], Awaitable[None]]) -> None:
    """Run tasks until one of them fails, returns, or this one is cancelled. Is a checkpoint.

    What :meth:`netvsp.endpoint.Endpoint.run` may raise is a plain EndpointError, and a nursery
    would wrap it in a group.

    Raises:
        EndpointError: The first of a task; also if what it has waited for was closed.
    """
    failure: EndpointError | None = None

    async def run(function: Callable[[], Awaitable[None]]) -> None:
        nonlocal failure
        try:
            await function()
        except EndpointError as error:
            failure = failure or error
        except trio.ClosedResourceError:
            failure = failure or EndpointError(CLOSED)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(run, function)
    if failure is not None:
        raise failure
