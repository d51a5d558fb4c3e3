"""RNDIS requests, each with two answers: the completion of its packet, and a reply of its own.

Sources: linux/drivers/net/hyperv/rndis_filter.c (``rndis_filter_send_request``,
``rndis_filter_receive_response``), freebsd/sys/dev/hyperv/netvsc/hn_rndis.c
(``hn_rndis_xact_execute``), dpdk/drivers/net/netvsc/hn_rndis.c (``hn_rndis_exec1``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from itertools import count, cycle

import trio

from netvsp.guest.habits import NetworkHabits
from netvsp.guest.replies import check_query_reply, name_of, strictly
from netvsp.wire import rndis
from vmbus.guest.machine import Panic

Post = Callable[[bytes, int], Awaitable[None]]
"""Sends a control message, whose request id is given, and waits for its completion."""


class _Waiting:
    """A request that has no reply yet."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        """Type of the reply that is due."""
        self.arrived = trio.Event()
        self.message: bytes | None = None


class Control:
    """The requests of one adapter.

    Args:
        habits: What the driver does in its own way.
        panic: Called when the host breaks a rule.
        post: Sends a message.
    """

    def __init__(self, habits: NetworkHabits, panic: Panic, post: Post) -> None:
        self._habits = habits
        self._panic = panic
        self._post = post
        self._ids: Iterator[int] = count(*habits.request_ids)
        self._fixed = {kind: cycle(ids) for kind, ids in habits.fixed_ids}
        self._waiting: dict[int, _Waiting] = {}
        self._error: Exception | None = None

    def _take_id(self, kind: int) -> int:
        ids = self._fixed.get(kind, self._ids)
        return next(ids) & 0xFFFFFFFF

    async def _request(self, kind: int, build: Callable[[int], bytes]) -> bytes:
        """Send a request and wait for both answers; return the reply. A checkpoint."""
        if self._error is not None:
            raise self._error
        number = self._take_id(kind)
        waiting = self._waiting[number] = _Waiting(kind | rndis.COMPLETE)
        # Who gives up leaves the entry: the reply will come, and is not one that nobody wants.
        await self._post(build(number), number)
        await waiting.arrived.wait()
        if waiting.message is None:
            assert self._error is not None
            raise self._error
        return waiting.message

    async def initialize(self) -> rndis.InitializeReply:
        """Send INITIALIZE; return its reply. A checkpoint."""
        largest = self._habits.max_transfer
        message = await self._request(
            rndis.INITIALIZE, lambda number: rndis.build_initialize(number, largest)
        )
        return strictly(self._panic, rndis.parse_initialize_reply_untrusted, message)

    async def query(self, oid: int, data: bytes, room: int) -> rndis.QueryReply:
        """Send QUERY; return its reply. A checkpoint.

        Args:
            oid: What is asked.
            data: That goes with the question.
            room: Bytes of the longest answer.
        """
        message = await self._request(
            rndis.QUERY, lambda number: rndis.build_request(rndis.QUERY, number, oid, data)
        )
        return check_query_reply(message, oid, room, self._habits, self._panic)

    async def set(self, oid: int, data: bytes) -> int:
        """Send SET; return the status of its reply. A checkpoint."""
        message = await self._request(
            rndis.SET, lambda number: rndis.build_request(rndis.SET, number, oid, data)
        )
        return self._status(message, f"SET {name_of(oid)}")

    async def keepalive(self) -> int:
        """Send KEEPALIVE; return the status of its reply. A checkpoint."""
        message = await self._request(
            rndis.KEEPALIVE, lambda number: rndis.build_id_message(rndis.KEEPALIVE, number)
        )
        return self._status(message, "KEEPALIVE")

    def _status(self, message: bytes, what: str) -> int:
        if len(message) < 16:
            self._panic(f"{what}: an answer of {len(message)} bytes")
        _number, status = rndis.parse_status_reply_untrusted(message)
        return status

    async def halt(self) -> None:
        """Send HALT, which has no reply; wait for its completion. A checkpoint."""
        number = self._take_id(rndis.HALT)
        await self._post(rndis.build_id_message(rndis.HALT, number), number)

    def reply(self, message: bytes, channel: int) -> None:
        """Take a reply, in the interrupt. Cannot block.

        Args:
            message: As long as it says.
            channel: Number of the channel it came on.
        """
        kind, _length = rndis.HEADER.unpack_from(message)
        name = rndis.MESSAGE_NAMES[kind]
        if channel:
            self._panic(f"RNDIS {name} on channel {channel}: hn_rndis_exec1 looks at the first one")
        if kind == rndis.RESET | rndis.COMPLETE:
            self._panic("RNDIS RESET_CMPLT: nobody has asked for a reset")
        number = rndis.parse_request_id_untrusted(message)
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            self._panic(f"RNDIS {name}: there is no request {number:#x}")
        if waiting.kind != kind:
            self._panic(
                f"RNDIS {name}: the answer to {number:#x} is {rndis.MESSAGE_NAMES[waiting.kind]}"
            )
        room = self._habits.reply_room
        if room is not None and len(message) > room:
            self._panic(f"RNDIS {name} of {len(message)} bytes, there is room for {room}")
        waiting.message = message
        waiting.arrived.set()

    def end(self, error: Exception) -> None:
        """Let every waiting and later request raise ``error``. Cannot block."""
        self._error = error
        for waiting in self._waiting.values():
            waiting.arrived.set()
        self._waiting.clear()
