"""The exceptions this project raises on purpose.

::

    VMBusError
     +-- ProtocolError               somebody broke a protocol rule
     |    +-- LocalProtocolError     you did: the call was not allowed in this state
     |    +-- GuestProtocolError     the guest did; carries the status to answer with
     |    |    +-- RingError         ... in a ring's control page: that channel is dead
     |    +-- PeerProtocolError      the other end of a vmbus-user socket did; carries an errno
     +-- BudgetError                 a guest asked us to hold more than its budget allows
     +-- AttachError                 a vmbus-user connection could not be made or was lost
     +-- ConfigError (ValueError)    a specification, option or offer that cannot be honoured
     +-- TraceError                  a file is no trace, or no longer one from a position on
     |    +-- TraceCutError          ... because it ends there
     +-- DeviceError                 a device or back-end failed (devices derive their own)
          +-- NotBackError           ... to give back what it was asked to let go of

Beside these, the asynchronous layer raises trio's own ``trio.ClosedResourceError`` (you closed
it), ``trio.BrokenResourceError`` (the other side is gone) and ``trio.BusyResourceError`` (two
tasks at one end), exactly with the meanings trio gives them.

A function whose name ends in ``_untrusted`` reads bytes chosen by a guest or a peer and lets
nothing but :class:`GuestProtocolError` (or :class:`PeerProtocolError` for socket peers,
:class:`TraceError` for files) escape.
Any other exception from such a function is a bug in this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, overload

E = TypeVar("E", bound=BaseException)

# NTSTATUS values that hosts put into replies ([MS-ERREF] 2.3.1).
STATUS_SUCCESS = 0x00000000
STATUS_UNSUCCESSFUL = 0xC0000001
STATUS_INVALID_PARAMETER = 0xC000000D
STATUS_INVALID_DEVICE_REQUEST = 0xC0000010
STATUS_INSUFFICIENT_RESOURCES = 0xC000009A
STATUS_REVISION_MISMATCH = 0xC0000059
STATUS_INVALID_DEVICE_STATE = 0xC0000184
STATUS_CONNECTION_REFUSED = 0xC0000236


class VMBusError(Exception):
    """Base of every exception this project raises on purpose."""


class ProtocolError(VMBusError):
    """A protocol rule was broken; the subclass says by whom."""


class LocalProtocolError(ProtocolError):
    """The caller asked for something the protocol does not allow in this state."""


class GuestProtocolError(ProtocolError):
    """The guest broke a rule.

    Args:
        message: One sentence naming the field and the rule.
        field: The wire field concerned, as the specifications name it.
        status: NTSTATUS to put into the reply, where the message has one.
    """

    def __init__(
        self, message: str, *, field: str = "", status: int = STATUS_INVALID_PARAMETER
    ) -> None:
        super().__init__(message)
        self.field = field
        self.status = status


class RingError(GuestProtocolError):
    """A ring's indices or a packet's framing are corrupt; the channel cannot go on."""


class PeerProtocolError(ProtocolError):
    """The peer of a ``vmbus-user`` socket broke a rule.

    Args:
        message: One sentence naming the field and the rule.
        errno: The ``errno`` value to put into the error reply.
        fatal: Whether the connection has to be closed, because framing is lost.
    """

    def __init__(self, message: str, *, errno: int, fatal: bool = False) -> None:
        super().__init__(message)
        self.errno = errno
        self.fatal = fatal


class BudgetError(VMBusError):
    """The guest would make us hold more than its budget allows."""


class AttachError(VMBusError):
    """A ``vmbus-user`` connection could not be made, or was lost."""


class ConfigError(VMBusError, ValueError):
    """A specification, an option or an offer that cannot be honoured; says what would be."""


class TraceError(VMBusError):
    """A file is no trace, or is one no longer from a position on.

    Args:
        message: What is wrong there, in a few words.
        position: Where, in bytes from the beginning of the file.
    """

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(f"{message}, at byte {position}")
        self.position = position


class TraceCutError(TraceError):
    """A file ends in the middle: its writer was killed, or the disk was full."""


class DeviceError(VMBusError):
    """A device or one of its back-ends failed; devices derive their own."""


class NotBackError(DeviceError):
    """What is under way has not come back in time, and may still touch memory and files.

    The text names it. Whatever was asked for has not been done to the end; operators are told
    ETIMEDOUT.
    """


@overload
def leaves(error: BaseExceptionGroup[E]) -> list[E]: ...
@overload
def leaves(error: BaseException) -> list[BaseException]: ...
def leaves(error: BaseException) -> Sequence[BaseException]:
    """Return the exceptions inside nested groups, in order, or the exception itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
