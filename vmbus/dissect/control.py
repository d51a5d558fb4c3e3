"""Control messages: names and fields, by the version that was agreed on."""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from uuid import UUID

from vmbus.dissect.layers import Layer
from vmbus.errors import GuestProtocolError
from vmbus.wire.messages import (
    Direction,
    InitiateContact,
    Message,
    VersionResponse,
    message_name,
    parse_message_untrusted,
)
from vmbus.wire.versions import NO_FEATURES, Feature, Version

_HEXADECIMAL = frozenset({
    "flags", "gpadl", "ring_gpadl", "status", "connection_id", "target_info", "monitor_page_1",
    "monitor_page_2", "host_monitor_page_1", "host_monitor_page_2", "supported_features",
})  # fmt: skip


class ControlDissector:
    """Takes control messages apart, and remembers which version they are of."""

    def __init__(self) -> None:
        self.version: Version | None = None
        self.features: Feature = NO_FEATURES
        self._asked: int | None = None

    def message_untrusted(self, data: bytes, direction: Direction) -> Layer:
        """Return the layer of a control message. Cannot block.

        Raises:
            GuestProtocolError: It is none that could be sent now.
        """
        for version, features in ((self.version, self.features), (max(Version), NO_FEATURES)):
            try:
                message = parse_message_untrusted(
                    data, direction=direction, version=version, features=features
                )
                break
            except GuestProtocolError as error:
                first = error
        else:
            raise first
        self._follow(message)
        fields: dict[str, object] = {"type": message.NAME}
        words = [message.NAME]
        for each in dataclasses.fields(message):  # type: ignore[arg-type]  # every Message is one
            value = getattr(message, each.name)
            if value is None:
                continue
            fields[each.name] = _json(value)
            words.append(f"{each.name}={_text(each.name, value)}")
        return Layer("vmbus", " ".join(words), fields)

    def _follow(self, message: Message) -> None:
        match message:
            case InitiateContact():
                self._asked = message.version
            case VersionResponse() if message.version_supported and self._asked in set(Version):
                self.version = Version(self._asked)
                self.features = Feature(getattr(message, "supported_features", None) or 0)
            case _:
                pass


def name_of(data: bytes) -> str:
    """Return what a message is called, whatever is in it. Cannot block."""
    return message_name(int.from_bytes(data[:4], "little"))


def _json(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, UUID):
        return str(value)
    return int(value) if isinstance(value, IntEnum) else value


def _text(name: str, value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)}B"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int) and name == "version" and value in set(Version):
        return str(Version(value))
    if isinstance(value, int) and name in _HEXADECIMAL:
        return f"{value:#x}"
    return str(value)
