"""Guests of the demo in this process: a server for them, and what they tell."""

from __future__ import annotations

import contextlib
import json

import trio

from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.attach.server import open_listener, serve, serve_operators
from vmbus.demo import DemoGuest
from vmbus.server import DeviceSetup, GuestServer


class Told:
    """What a guest has told."""

    def __init__(self, captured: str) -> None:
        self.events = [json.loads(line) for line in captured.splitlines()]

    def of(self, kind: str) -> list[dict[str, object]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def problems(self) -> list[tuple[str, str]]:
        return [(str(event["where"]), str(event["text"])) for event in self.of("problem")]


@contextlib.asynccontextmanager
async def server_for(tmp_path, *specs, controllers=1, **options):
    """A server in this task's nursery; yields it, the socket's path, and the nursery."""
    path = tmp_path / "s"
    server = GuestServer([DeviceSetup("storvsp", specs, options)] * controllers)
    with open_listener(path) as listener, open_listener(f"{path}{CONTROL_SUFFIX}") as control:
        async with trio.open_nursery() as nursery:

            async def run():
                await serve(listener, server.handle, query=server.query_own)

            async def operate():
                await serve_operators(control, query=server.query, command=server.command)

            nursery.start_soon(run)
            nursery.start_soon(operate)
            yield server, str(path), nursery
            nursery.cancel_scope.cancel()


async def live(guest: DemoGuest) -> bool:
    """Run the guest in a thread of its own: its MSR writes block until the server has answered."""
    return await trio.to_thread.run_sync(trio.run, guest.run)
