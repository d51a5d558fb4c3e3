"""QUERY and COMMAND: what a server program tells, and does for, its operators."""

from __future__ import annotations

import errno
import fcntl
import inspect
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import MAX_PAYLOAD
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import JsonObject, Query
from vmbus.attach.server.link import Link
from vmbus.errors import NotBackError, VMBusError
from vmbus.log_budget import LogBudget

logger = logging.getLogger(__name__)

QueryCallback = Callable[[str], "dict[str, Any] | Awaitable[dict[str, Any]]"]
"""Takes a kind, returns what there is to say, now or later."""
CommandCallback = Callable[[dict[str, Any]], "dict[str, Any] | Awaitable[dict[str, Any]]"]
"""Takes a command, carries it out, returns the result, now or later."""


def big_reply(data: bytes) -> int:
    """Return a sealed memfd with ``data``, for JSON that is longer than a payload."""
    fd = os.memfd_create("vmbus-reply", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
    return fd


class Management:
    """Runs the callbacks of one connection, one request at a time.

    Args:
        query: Answers QUERY; None refuses with ENOSYS.
        command: Answers COMMAND; None refuses with ENOSYS.
        log: For callbacks that fail, with a traceback each.
    """

    def __init__(
        self, query: QueryCallback | None, command: CommandCallback | None, log: LogBudget
    ) -> None:
        self._query = query
        self._command = command
        self._log = log

    def begin(self, link: Link, frame: Frame) -> None:
        """Start answering. Raises PeerProtocolError for a bad or untimely request.

        A callback that raises :class:`VMBusError` or ``OSError`` refuses with its text; anything
        else it raises is logged and becomes EIO. Neither ends the connection.
        """
        work: Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]]
        if frame.kind == Number.QUERY:
            kind = Query.decode_untrusted(frame.payload).kind
            query = self._query
            require(query is not None, "QUERY: this server answers none", errno.ENOSYS)
            assert query is not None
            work = lambda: query(kind)  # noqa: E731
        else:
            value = JsonObject.decode_untrusted(frame.payload).value
            command = self._command
            require(command is not None, "COMMAND: this server takes none", errno.ENOSYS)
            assert command is not None
            work = lambda: command(value)  # noqa: E731
        number, seq = frame.kind, frame.seq
        name = Number(number).name
        require(
            not link.working, f"{name}: another QUERY or COMMAND is being answered", errno.EBUSY
        )
        link.working = True

        async def answer() -> None:
            try:
                result = work()
                if inspect.isawaitable(result):
                    result = await result
                data = JsonObject(result).encode()
                fds = [] if len(data) <= MAX_PAYLOAD else [big_reply(data)]
            except VMBusError as error:
                code = errno.ETIMEDOUT if isinstance(error, NotBackError) else errno.EINVAL
                link.reply_error(number, seq, code, str(error))
            except OSError as error:
                link.reply_error(number, seq, error.errno or errno.EIO, str(error))
            except Exception as error:
                if self._log.spend():
                    logger.exception("%s: %s failed%s", link.name, name, self._log.left_out())
                link.reply_error(number, seq, errno.EIO, f"the server failed: {error!r}")
            else:
                link.reply(number, seq, b"" if fds else data, fds)
            finally:
                link.working = False
                link.heard = trio.current_time()

        link.spawn(answer)
