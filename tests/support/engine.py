"""A guest's view of an engine, for tests: posts messages, reads replies, answers for devices."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar
from uuid import UUID

from vmbus.engine import (
    ChannelClose,
    ChannelModify,
    ChannelOpen,
    Connected,
    Engine,
    EngineConfig,
    Event,
    Fault,
    GpadlTeardown,
    Offer,
    SendMessage,
    TlConnect,
    check,
    describe,
    describe_channels,
)
from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory
from vmbus.wire import messages as m
from vmbus.wire.gpa import build_range
from vmbus.wire.guids import CLASS_SCSI
from vmbus.wire.versions import NO_FEATURES, Feature, Version

MEMORY_PAGES = 4096
MONITOR_1, MONITOR_2, INTERRUPT_PAGE = 0x10000, 0x11000, 0x12000
T = TypeVar("T")


def make_memory(pages: int = MEMORY_PAGES) -> GuestMemory:
    """Guest memory from address 0 on."""
    return allocate_memory(pages * PAGE_SIZE)


class CheckedEngine(Engine):
    """An engine whose invariants are looked at after every call that may change it."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CHECKED:
            return found

        def checked(*arguments: Any, **options: Any) -> Any:
            try:
                return found(*arguments, **options)
            finally:
                check(self)
                assert describe(self) is not None
                assert describe_channels(self) is not None

        return checked


CHECKED = {
    "receive_untrusted",
    "reset",
    "offer",
    "revoke",
    "offer_subchannels",
    "open_done",
    "close_done",
    "gpadl_released",
    "modify_done",
    "tl_connect_done",
}


def make_offer(number: int = 1, **options: Any) -> Offer:
    """An offer whose instance is ``number``."""
    return Offer(class_id=CLASS_SCSI, instance_id=UUID(int=number), **options)


def pages_message(relid: int, gpadl: int, pfns: list[int], **changes: Any) -> list[Any]:
    """GPADL_HEADER and bodies for one range of whole pages."""
    data = build_range(len(pfns) * PAGE_SIZE, 0, pfns)
    header = m.GpadlHeader(
        relid=relid, gpadl=gpadl, range_buflen=len(data), range_count=1, data=data[:216]
    )
    found: list[Any] = [dataclasses.replace(header, **changes)]
    for number, start in enumerate(range(216, len(data), 224)):
        body = data[start : start + 224]
        found.append(m.GpadlBody(message_number=number, gpadl=gpadl, data=body))
    return found


class Guest:
    """A guest and its host program around one engine."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.memory = make_memory()
        self.engine = CheckedEngine(self.memory, config)
        self.version: Version | None = None
        self.features: Feature = NO_FEATURES
        self.events: list[Event] = []
        self.connection_id = 4

    # --- Guest -----------------------------------------------------------------------------------

    def contact(self, version: int = Version.V5_3, **changes: Any) -> list[Any]:
        """Post INITIATE_CONTACT as Linux does."""
        self.connection_id = changes.pop("connection_id", 4 if version >= Version.V5_0 else 1)
        info = 2 if self.connection_id == 4 else INTERRUPT_PAGE
        if version >= Version.V6_0:
            info = 2 | int(changes.pop("features", sum(Feature))) << 32
        message = m.InitiateContact(
            version=version,
            target_vp=0,
            target_info=info,
            monitor_page_1=MONITOR_1,
            monitor_page_2=MONITOR_2,
            client_id=UUID(int=7) if version >= Version.V6_0 else None,
        )
        payload = m.build_message(dataclasses.replace(message, **changes), version=None)
        return self.post_bytes(payload)

    def post(self, *messages: m.Message) -> list[Any]:
        """Post messages; return what came of them, replies decoded."""
        found: list[Any] = []
        for message in messages:
            version = self.version or Version.V5_3
            payload = m.build_message(message, version=version, features=self.features)
            found += self.post_bytes(payload)
        return found

    def post_bytes(self, payload: bytes, connection_id: int | None = None) -> list[Any]:
        """Post any bytes."""
        self.engine.receive_untrusted(connection_id or self.connection_id, payload)
        return self.take()

    def take(self) -> list[Any]:
        """Return the events so far, with messages decoded."""
        found: list[Any] = []
        for event in self.engine.take():
            self.events.append(event)
            if isinstance(event, Connected):
                self.version, self.features = event.version, event.features
            if isinstance(event, SendMessage):
                found.append(
                    m.parse_message_untrusted(
                        event.payload,
                        direction=m.Direction.HOST_TO_GUEST,
                        version=self.version,
                        features=self.features,
                    )
                )
            else:
                found.append(event)
        return found

    # --- Shortcuts -------------------------------------------------------------------------------

    def connect(self, version: int = Version.V5_3, **changes: Any) -> None:
        """Contact and request offers."""
        self.contact(version, **changes)
        self.post(m.RequestOffers())

    def create(self, relid: int = 1, gpadl: int = 0xE1E10, pages: int = 8) -> None:
        """Create a GPADL; it has to succeed."""
        found = self.post(*pages_message(relid, gpadl, list(range(100, 100 + pages))))
        assert found == [m.GpadlCreated(relid=relid, gpadl=gpadl, status=0)]

    def open_message(self, relid: int = 1, **changes: Any) -> m.OpenChannel:
        """OPENCHANNEL over the GPADL that :meth:`create` makes."""
        signals = bool(
            self.features
            & (Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.CHANNEL_INTERRUPT_REDIRECTION)
        )
        message = m.OpenChannel(
            relid=relid,
            open_id=relid,
            ring_gpadl=0xE1E10,
            target_vp=0,
            downstream_page_offset=4,
            user_data=bytes(range(120)),
            connection_id=0 if signals else None,
            event_flag=0 if signals else None,
            open_flags=0 if signals else None,
        )
        return dataclasses.replace(message, **changes)

    def opened(self, relid: int = 1, **changes: Any) -> ChannelOpen:
        """Open a channel; it has to succeed."""
        (event,) = self.post(self.open_message(relid, **changes))
        assert isinstance(event, ChannelOpen)
        self.engine.open_done(event.key, ok=True)
        (result,) = self.take()
        assert isinstance(result, m.OpenChannelResult)
        assert result.status == 0
        return event

    def answer(self, events: list[Any] | None = None) -> list[Any]:
        """Answer like a willing device until no question is left; return what came of it."""
        todo = self.take() if events is None else events
        found: list[Any] = []
        while todo:
            for event in todo:
                match event:
                    case ChannelOpen():
                        self.engine.open_done(event.key, ok=True)
                    case ChannelClose():
                        self.engine.close_done(event.key)
                    case ChannelModify():
                        self.engine.modify_done(event.key, ok=True)
                    case GpadlTeardown():
                        self.engine.gpadl_released(event.key, event.handle)
                    case TlConnect():
                        self.engine.tl_connect_done(event.request_id, ok=False)
                    case _:
                        pass
            todo = self.take()
            found += todo
        return found


def only(kind: type[T], events: list[Any]) -> list[T]:
    """The events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def fault_field(events: list[Any]) -> str:
    """The field that the only fault among the events is about."""
    (fault,) = only(Fault, events)
    return fault.field
