"""A server in a process of its own, as tests start it.

Run as a program, it serves until its input ends::

    python -m tests.support.server_process PATH MODE
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import trio
import trio.testing

from tests.support.house import ROOT
from tests.support.patience import PATIENCE
from tests.support.worlds import DISK_SIZE
from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.attach.server import listen_path, serve, serve_operators
from vmbus.server import DeviceSetup, GuestServer


@contextlib.contextmanager
def server_process(path: str | os.PathLike[str], mode: str) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own; it serves until the block ends."""
    command = [sys.executable, "-m", "tests.support.server_process", os.fspath(path), mode]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'devices'}"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            # The end of its input is the end of the server.
            process.stdin.close()
            assert process.wait(PATIENCE) == 0


async def _serve(path: str, mode: str) -> None:
    disk = f"ram:{DISK_SIZE}"
    server = GuestServer(
        [
            DeviceSetup("storvsp", (disk, disk), {"monitor": True}),
            DeviceSetup("storvsp", (disk,), {"max_subchannels": 0}),
        ]
    )
    listener, control = listen_path(path, mode=mode), listen_path(path + CONTROL_SUFFIX)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve, listener, server.handle, query=server.query_own))
        nursery.start_soon(
            partial(serve_operators, control, query=server.query, command=server.command)
        )
        print("ready", flush=True)  # the parent waits for it
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()
    listener.close()
    control.close()


if __name__ == "__main__":
    trio.run(_serve, sys.argv[1], sys.argv[2])
