"""Connect requests of hv_sock, the sockets between guest and host processes."""

from __future__ import annotations

from vmbus.engine.config import EngineConfig
from vmbus.engine.events import TlConnect
from vmbus.engine.outbox import Outbox
from vmbus.errors import (
    STATUS_CONNECTION_REFUSED,
    STATUS_INSUFFICIENT_RESOURCES,
    GuestProtocolError,
    LocalProtocolError,
)
from vmbus.wire.guids import NULL_GUID
from vmbus.wire.messages import TlConnectRequest, TlConnectResult
from vmbus.wire.versions import Version


class SocketRequests:
    """Requests that the host program has yet to answer."""

    def __init__(self, config: EngineConfig, outbox: Outbox) -> None:
        self._config = config
        self._outbox = outbox
        self._next_id = 1
        self._pending: dict[int, TlConnectRequest | None] = {}
        """By request id; None for a guest that has left."""

    @property
    def pending_count(self) -> int:
        """Requests without an answer, those of a guest that has left included."""
        return len(self._pending)

    def on_connect(self, message: TlConnectRequest) -> None:
        """TL_CONNECT_REQUEST."""
        if not self._config.hv_sock:
            self._refuse(message)
            return
        limit = self._config.budgets.max_pending_tl_connects
        if len(self._pending) >= limit:
            self._refuse(message)
            raise GuestProtocolError(
                f"only {limit} connect requests may be pending",
                field="endpoint_id",
                status=STATUS_INSUFFICIENT_RESOURCES,
            )
        request_id = self._next_id
        self._next_id += 1
        self._pending[request_id] = message
        self._outbox.emit(
            TlConnect(
                request_id=request_id,
                endpoint=message.endpoint_id,
                service=message.service_id,
                silo=message.silo_id or NULL_GUID,
            )
        )

    def done(self, request_id: int, *, ok: bool) -> None:
        """The host program's answer. Success is told to the guest by an offer alone."""
        if request_id not in self._pending:
            raise LocalProtocolError(f"there is no connect request {request_id}")
        message = self._pending.pop(request_id)
        if message is not None and not ok:
            self._refuse(message)

    def abandon(self) -> None:
        """The guest has left: nobody waits for the answers."""
        self._pending = dict.fromkeys(self._pending)

    def _refuse(self, message: TlConnectRequest) -> None:
        link = self._outbox.link
        # Guests of 4.0 find out by a time limit of their own.
        if link is not None and link.version >= Version.V4_1:
            self._outbox.post(
                TlConnectResult(
                    endpoint_id=message.endpoint_id,
                    service_id=message.service_id,
                    status=STATUS_CONNECTION_REFUSED,
                )
            )
