"""Payloads that the server sends, and the error reply that both sides send.

Pure, like :mod:`vmbus.attach.protocol.to_server`.
"""

from __future__ import annotations

import dataclasses
import errno
import struct
from typing import Any, ClassVar, Self

from vmbus.attach.protocol.layout import (
    Field,
    Layout,
    Payload,
    decode_text_untrusted,
    encode_text,
    printable,
    require,
)
from vmbus.attach.protocol.limits import (
    MAX_ERROR_TEXT,
    MAX_LOG_TEXT,
    PortKind,
    check_connection,
    check_flag,
    check_message,
    check_sint,
)


@dataclasses.dataclass(frozen=True, slots=True)
class AddMsgPort(Payload):
    """Request 0x81: take HvPostMessage calls for this connection id."""

    NAME: ClassVar[str] = "ADD_MSG_PORT"
    LAYOUT: ClassVar[Layout] = Layout(Field("connection_id", 4))

    connection_id: int

    def check(self) -> None:
        """Range."""
        check_connection(self.NAME, self.connection_id)


@dataclasses.dataclass(frozen=True, slots=True)
class AddEventPort(Payload):
    """Request 0x82: take HvSignalEvent calls; goes with the doorbell, one eventfd."""

    NAME: ClassVar[str] = "ADD_EVENT_PORT"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("connection_id", 4), Field("flag", 2), Field("reserved", 2)
    )

    connection_id: int
    flag: int

    def check(self) -> None:
        """Ranges."""
        check_connection(self.NAME, self.connection_id)
        check_flag(self.NAME, self.flag)


@dataclasses.dataclass(frozen=True, slots=True)
class DelPort(Payload):
    """Request 0x83: undo ADD_MSG_PORT (flag 0) or ADD_EVENT_PORT."""

    NAME: ClassVar[str] = "DEL_PORT"
    LAYOUT: ClassVar[Layout] = Layout(Field("connection_id", 4), Field("flag", 2), Field("kind", 2))

    connection_id: int
    flag: int
    kind: int

    def check(self) -> None:
        """Ranges."""
        check_connection(self.NAME, self.connection_id)
        check_flag(self.NAME, self.flag)
        require(
            self.kind in {PortKind.MESSAGE, PortKind.EVENT},
            f"DEL_PORT: kind {self.kind} must be 0 or 1",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class DeliverMessage:
    """Request 0x84: put a message into a SynIC slot; answered once it is there."""

    NAME: ClassVar[str] = "DELIVER_MESSAGE"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("vp", 4), Field("sint", 4), Field("message_type", 4), Field("size", 4)
    )

    vp: int
    sint: int
    message_type: int
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of payload."""
        return len(self.payload)

    def encode(self) -> bytes:
        """Return the payload."""
        return self.LAYOUT.pack(self) + self.payload

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse."""
        values: list[Any] = cls.LAYOUT.unpack_untrusted(cls.NAME, data, exact=False)
        vp, sint, message_type, size = values
        payload = data[cls.LAYOUT.size :]
        check_sint(cls.NAME, sint)
        check_message(cls.NAME, message_type, size, len(payload))
        return cls(vp, sint, message_type, payload)


@dataclasses.dataclass(frozen=True, slots=True)
class SignalFlag(Payload):
    """Async 0x85 (tier T0): set an event flag and interrupt."""

    NAME: ClassVar[str] = "SIGNAL_FLAG"
    LAYOUT: ClassVar[Layout] = Layout(Field("vp", 4), Field("sint", 4), Field("flag", 4))

    vp: int
    sint: int
    flag: int

    def check(self) -> None:
        """Ranges."""
        check_sint(self.NAME, self.sint)
        check_flag(self.NAME, self.flag)


@dataclasses.dataclass(frozen=True, slots=True)
class SetCallFd(Payload):
    """Request 0x86 (tier T1): with an eventfd, bind it to a flag; with none, drop the port."""

    NAME: ClassVar[str] = "SET_CALL_FD"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("port", 4), Field("vp", 4), Field("sint", 4), Field("flag", 4)
    )

    port: int
    vp: int
    sint: int
    flag: int

    def check(self) -> None:
        """Ranges."""
        check_sint(self.NAME, self.sint)
        check_flag(self.NAME, self.flag)


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """Async 0x87: something the VMM's user may want to read."""

    NAME: ClassVar[str] = "LOG"
    LAYOUT: ClassVar[Layout] = Layout(Field("level", 4))

    level: int
    text: str

    def encode(self) -> bytes:
        """Return the payload; long text is cut, control characters become spaces."""
        return self.LAYOUT.pack(self) + encode_text(printable(self.text), MAX_LOG_TEXT)

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse."""
        values: list[Any] = cls.LAYOUT.unpack_untrusted(cls.NAME, data, exact=False)
        (level,) = values
        text = decode_text_untrusted("LOG: text", data[cls.LAYOUT.size :], 0, MAX_LOG_TEXT)
        return cls(level, text)


@dataclasses.dataclass(frozen=True, slots=True)
class PostCredit(Payload):
    """Async 0x88: so many POST_MESSAGEs were taken; as many more may be sent."""

    NAME: ClassVar[str] = "POST_CREDIT"
    LAYOUT: ClassVar[Layout] = Layout(Field("count", 4))

    count: int

    def check(self) -> None:
        """Never empty."""
        require(self.count, "POST_CREDIT: count must not be 0")


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorReply:
    """Payload of every reply with the error flag."""

    NAME: ClassVar[str] = "error reply"

    errno: int
    """Linux errno, positive."""
    text: str

    def encode(self) -> bytes:
        """Return the payload; long text is cut, control characters become spaces."""
        return struct.pack("<i", self.errno) + encode_text(printable(self.text), MAX_ERROR_TEXT)

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse."""
        require(
            len(data) >= 4,
            f"error reply: length is {len(data)}, must be at least 4",
            errno.EMSGSIZE,
        )
        code = int.from_bytes(data[:4], "little", signed=True)
        require(0 < code < 4096, f"error reply: errno {code} must be 1 to 4095")
        return cls(code, decode_text_untrusted("error reply: text", data[4:], 0, MAX_ERROR_TEXT))
