"""A passt for a guest whose own process may start no program.

Workers are confined before a guest is there (vmbus/supervisor/sandbox.py). So a keeper starts passt
for them, a process that sees nothing that a guest sends: a worker asks by :data:`START` on its
line, and gets passt's end of the stream, through which frames go without the keeper. It asks once
for each life of its adapter; the passt before ends then, and the last one with the line.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Hashable

import trio

from netvsp.endpoint import EndpointError
from netvsp.endpoints.passt import LocalStarter, Passt, end
from vmbus.errors import PeerProtocolError
from vmbus.plugins.sharing import Line

START = b"start"
"""What a worker says."""
STARTED, FAILED = b"started ", b"failed "
"""What it is answered: the process's number, with two descriptors; or why not."""
_LONGEST = 512
_GONE = "the process that starts it has ended"

_log = logging.getLogger("vmbus.netvsp")


class PasstKeeper:
    """Starts a passt for each guest; see :class:`vmbus.plugins.sharing.Keeper`.

    Args:
        starter: Returns what starts one, for a specification.
    """

    def __init__(self, starter: Callable[[str], LocalStarter]) -> None:
        self._starter = starter

    async def serve(self, line: Line, initiator: Hashable, spec: str) -> None:
        """See :meth:`vmbus.plugins.sharing.Keeper.serve`."""
        running: trio.Process | None = None
        sock = line.sock
        sock.setblocking(False)
        try:
            starter = self._starter(spec)
            while True:
                await trio.lowlevel.wait_readable(sock)
                if not asked_untrusted(sock.recv(len(START) + 1)):
                    break
                if running is not None:
                    await end(running)
                    running = None
                running = await _start(sock, starter)
        except PeerProtocolError as error:
            _log.warning("%s: %s", initiator, error)
        except OSError as error:
            _log.debug("%s: the line for passt has ended: %s", initiator, error)
        finally:
            trio.lowlevel.notify_closing(sock)
            line.close()
            if running is not None:
                await end(running)

    async def aclose(self) -> None:
        """See :meth:`vmbus.plugins.sharing.Keeper.aclose`."""
        await trio.lowlevel.checkpoint()


def asked_untrusted(message: bytes) -> bool:
    """Whether a worker wants a passt; otherwise its line has ended. Cannot block.

    Raises:
        PeerProtocolError: It has said something else.
    """
    if message not in {b"", START}:
        raise PeerProtocolError("a message that is none for passt", errno=errno.EPROTO)
    return bool(message)


async def _start(sock: socket.socket, starter: LocalStarter) -> trio.Process | None:
    """Start one and hand it over; None if that is impossible. Raises OSError: the line is gone."""
    try:
        process, stream, messages = await starter.spawn()
    except OSError as error:
        sock.send(FAILED + os.strerror(error.errno or 0).encode())
        return None
    try:
        with stream:
            descriptors = [stream.fileno(), messages]
            socket.send_fds(sock, [STARTED + str(process.pid).encode()], descriptors)
    except BaseException:
        await end(process)
        raise
    finally:
        os.close(messages)
    return process


class LineStarter:
    """Has a keeper start a passt; see :class:`netvsp.endpoints.passt.Starter`.

    Args:
        line: To the keeper; owned.
    """

    def __init__(self, line: Line) -> None:
        line.sock.setblocking(False)
        self._line = line

    async def start(self) -> Passt:
        """See :meth:`netvsp.endpoints.passt.Starter.start`."""
        sock = self._line.sock
        try:
            sock.send(START)
            await trio.lowlevel.wait_readable(sock)
            data, descriptors, _flags, _address = socket.recv_fds(sock, _LONGEST, 2)
        except trio.ClosedResourceError:
            raise EndpointError(_GONE) from None
        except OSError as error:
            raise EndpointError(_GONE) from error
        if not data.startswith(STARTED):
            raise EndpointError(data.removeprefix(FAILED).decode() or _GONE)
        stream, messages = descriptors
        pid = int(data.removeprefix(STARTED))
        return Passt(socket.socket(fileno=stream), messages, pid)

    def close(self) -> None:
        """See :meth:`netvsp.endpoints.passt.Starter.close`."""
        with contextlib.suppress(ValueError):  # it is closed
            trio.lowlevel.notify_closing(self._line.sock)
        self._line.close()
