"""The way out of the engine: events, and control messages on their way to the guest."""

from __future__ import annotations

from vmbus.engine.events import DiscardMessages, Event, Fault, SendMessage
from vmbus.engine.states import Link, Slot
from vmbus.errors import GuestProtocolError
from vmbus.wire.messages import Message, build_message
from vmbus.wire.versions import NO_FEATURES, Feature, Version


class Outbox:
    """Collects events in order. Messages are built here, with the layouts of the connection."""

    __slots__ = ("_events", "_held", "faults", "link", "sent")

    def __init__(self) -> None:
        self.link: Link | None = None
        """The connection that :meth:`post` sends on."""
        self.sent = 0
        self.faults = 0
        self._events: list[Event] = []
        self._held: list[SendMessage] | None = None

    def take(self) -> list[Event]:
        """Hand out what has happened since the last call."""
        events, self._events = self._events, []
        return events

    def emit(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    def fault(self, error: GuestProtocolError, *, message: int, relid: int | None, vp: int) -> None:
        """Report a broken rule."""
        self.faults += 1
        self.emit(
            Fault(text=str(error), relid=relid, message_type=message, field=error.field, vp=vp)
        )

    def post(self, message: Message) -> None:
        """Send on the connection; held back while the guest has paused it."""
        link = self.link
        assert link is not None, f"no connection to send {message} on"
        payload = build_message(message, version=link.version, features=link.features)
        event = SendMessage(vp=link.slot.vp, sint=link.slot.sint, payload=payload)
        if self._held is None:
            self._send(event)
        else:
            self._held.append(event)

    def post_to(
        self,
        slot: Slot,
        message: Message,
        *,
        version: Version | None,
        features: Feature = NO_FEATURES,
        reserved: bool = False,
    ) -> None:
        """Send to ``slot``, whether there is a connection or not; never held back."""
        payload = build_message(message, version=version, features=features)
        self._send(SendMessage(vp=slot.vp, sint=slot.sint, payload=payload, reserved=reserved))

    def _send(self, event: SendMessage) -> None:
        self.sent += 1
        self.emit(event)

    def hold(self) -> None:
        """Hold back what :meth:`post` sends from now on."""
        self._held = []

    def flow(self) -> None:
        """Send what was held back."""
        held, self._held = self._held or [], None
        for event in held:
            self._send(event)

    def disconnect(self) -> None:
        """End the connection: what the guest has not been given yet, it must not see any more."""
        self.link = None
        self._held = None
        self._events = [
            event for event in self._events if not isinstance(event, SendMessage) or event.reserved
        ]
        self.emit(DiscardMessages())
