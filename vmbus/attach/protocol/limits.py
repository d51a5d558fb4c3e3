"""Numbers of ``vmbus-user`` that are not layouts: limits, enumerations and their checks."""

from __future__ import annotations

import enum
import errno

from vmbus.attach.protocol.layout import require

MAGIC = 0x55424D56
"""``VMBU`` in ASCII, first bytes of both HELLO payloads."""
VERSION_MIN = VERSION_MAX = 1
MAX_PAYLOAD = 32 * 1024
"""Bytes after the header."""
MAX_FDS = 64
"""Descriptors with one frame; Linux itself stops at 253."""
MAX_REGIONS = 64
MAX_NAME = 255
MAX_KIND = 64
MAX_LOG_TEXT = 1024
MAX_ERROR_TEXT = 512
MAX_MESSAGE = 240
"""Payload bytes of a SynIC message (TLFS 11.2)."""
MAX_FLAG = 2047
"""Event flags of one SINT are numbered 0 to 2047 (TLFS 11.4)."""
MAX_SINT = 15
MAX_CONNECTION_ID = (1 << 24) - 1
DIRECT_SINT = 2
"""The SINT that tier T2 covers: the one VMBus uses."""


class Role(enum.IntEnum):
    """Who connected."""

    VMM = 0
    OPERATOR = 1


class Feature(enum.IntFlag):
    """Feature bits of HELLO; the reply holds a subset of the request's."""

    CALL_FD = 1 << 0
    """Tier T1: SET_CALL_FD may be used."""
    DIRECT = 1 << 1
    """Tier T2: SYNIC_STATE and SET_SINT_FD may be used."""
    LOG = 1 << 2
    """The server may send LOG."""


ALL_FEATURES = Feature.CALL_FD | Feature.DIRECT | Feature.LOG


class ResetReason(enum.IntEnum):
    """Why the guest's life ended; for logs only, any value is accepted."""

    RESET = 0
    CRASH = 1
    POWER_OFF = 2


class GoodbyeReason(enum.IntEnum):
    """Why the connection ends; for logs only, any value is accepted."""

    NORMAL = 0
    SHUTDOWN = 1
    FAILURE = 2


class PortKind(enum.IntEnum):
    """Field ``kind`` of DEL_PORT."""

    MESSAGE = 0
    EVENT = 1


class LogLevel(enum.IntEnum):
    """Field ``level`` of LOG."""

    INFO = 0
    WARNING = 1


def check_connection(owner: str, connection_id: int) -> None:
    """Raise PeerProtocolError unless the id has 24 bits and is not 0 (TLFS 11.3)."""
    require(
        0 < connection_id <= MAX_CONNECTION_ID,
        f"{owner}: connection_id {connection_id:#x} must be 1 to 0xffffff",
    )


def check_flag(owner: str, flag: int) -> None:
    """Raise PeerProtocolError for a flag number a SINT does not have."""
    require(flag <= MAX_FLAG, f"{owner}: flag {flag} must be 0 to {MAX_FLAG}")


def check_sint(owner: str, sint: int) -> None:
    """Raise PeerProtocolError for a SINT a VP does not have."""
    require(sint <= MAX_SINT, f"{owner}: sint {sint} must be 0 to {MAX_SINT}")


def check_message(owner: str, message_type: int, size: int, payload: int) -> None:
    """Check a SynIC message: the hypervisor's own types have bit 31 set and are not ours."""
    require(
        0 < message_type < 1 << 31,
        f"{owner}: message_type {message_type:#x} must be 1 to 0x7fffffff",
    )
    require(size <= MAX_MESSAGE, f"{owner}: size {size} must be at most {MAX_MESSAGE}")
    require(
        size == payload,
        f"{owner}: size is {size} but {payload} payload bytes follow",
        errno.EMSGSIZE,
    )
