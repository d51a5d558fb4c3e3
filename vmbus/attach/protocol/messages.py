"""The message table of ``vmbus-user``: who may send what, when, with how many descriptors.

This module is the one place that knows; server, client, tests and the specification's summary
table all read :data:`MESSAGES`.
"""

from __future__ import annotations

import enum
import errno
from typing import NamedTuple, Protocol, Self

from vmbus.attach.protocol.to_server import (
    Empty,
    Goodbye,
    Hello,
    HelloReply,
    JsonObject,
    MemoryRegion,
    PostMessage,
    Query,
    RemMem,
    Reset,
    SetMemTable,
    SetSintFd,
    SignalEvent,
    SynicState,
    VmInfo,
)
from vmbus.attach.protocol.to_vmm import (
    AddEventPort,
    AddMsgPort,
    DeliverMessage,
    DelPort,
    Log,
    PostCredit,
    SetCallFd,
    SignalFlag,
)
from vmbus.errors import AttachError, PeerProtocolError


class Number(enum.IntEnum):
    """Message types; the four without an entry in MESSAGES are reserved."""

    HELLO = 0x01
    SET_MEM_TABLE = 0x02
    ADD_MEM = 0x03
    REM_MEM = 0x04
    VM_INFO = 0x05
    SYNIC_STATE = 0x06
    SET_SINT_FD = 0x07
    POST_MESSAGE = 0x08
    SIGNAL_EVENT = 0x09
    RESET = 0x0A
    PAUSE = 0x0B
    RESUME = 0x0C
    SAVE = 0x0D
    RESTORE = 0x0E
    QUERY = 0x0F
    GOODBYE = 0x10
    DIRTY_LOG_START = 0x11
    DIRTY_LOG_GET = 0x12
    COMMAND = 0x13
    ADD_MSG_PORT = 0x81
    ADD_EVENT_PORT = 0x82
    DEL_PORT = 0x83
    DELIVER_MESSAGE = 0x84
    SIGNAL_FLAG = 0x85
    SET_CALL_FD = 0x86
    LOG = 0x87
    POST_CREDIT = 0x88


class State(enum.Enum):
    """Where a connection stands, as both sides see it.

    ::

        NEW --HELLO(role 0)--> GREETED --VM_INFO--> DESCRIBED --SET_MEM_TABLE--> ATTACHED
         |                                                             PAUSE |  ^ RESUME
         +--HELLO(role 1)--> OPERATOR                                        v  |
                                                                            PAUSED
        any --GOODBYE, end of file, framing error--> CLOSED
    """

    NEW = "new"
    GREETED = "greeted"
    DESCRIBED = "described"
    ATTACHED = "attached"
    PAUSED = "paused"
    OPERATOR = "operator"
    CLOSED = "closed"


class Direction(enum.Enum):
    """Who may send a request."""

    TO_SERVER = "to server"
    TO_VMM = "to VMM"
    BOTH = "both"


class AnyPayload(Protocol):
    """What all payload classes have."""

    def encode(self) -> bytes:
        """Return the bytes."""

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse; raises PeerProtocolError."""


class MessageSpec(NamedTuple):
    """One row of the table."""

    number: Number
    direction: Direction
    request: type[AnyPayload]
    reply: type[AnyPayload] | None
    """None: asynchronous, never answered."""
    min_fds: int
    max_fds: int
    states: frozenset[State]
    """In which the receiver accepts it."""
    reply_fds: int = 0
    """At most so many descriptors with the reply."""

    @property
    def name(self) -> str:
        """As in the specification."""
        return self.number.name

    @property
    def is_async(self) -> bool:
        """Whether it is never answered."""
        return self.reply is None


_LIVE = frozenset({State.ATTACHED, State.PAUSED})
_KNOWN = _LIVE | {State.DESCRIBED}
_GREETED = _KNOWN | {State.GREETED}
_S, _V, _B = Direction.TO_SERVER, Direction.TO_VMM, Direction.BOTH

MESSAGES: dict[int, MessageSpec] = {
    spec.number: spec
    for spec in (
        MessageSpec(Number.HELLO, _S, Hello, HelloReply, 0, 0, frozenset({State.NEW})),
        MessageSpec(Number.SET_MEM_TABLE, _S, SetMemTable, Empty, 1, 64, _KNOWN),
        MessageSpec(Number.ADD_MEM, _S, MemoryRegion, Empty, 1, 1, _LIVE),
        MessageSpec(Number.REM_MEM, _S, RemMem, Empty, 0, 0, _LIVE),
        MessageSpec(Number.VM_INFO, _S, VmInfo, Empty, 0, 0, frozenset({State.GREETED})),
        MessageSpec(Number.SYNIC_STATE, _S, SynicState, Empty, 0, 0, _KNOWN),
        MessageSpec(Number.SET_SINT_FD, _S, SetSintFd, Empty, 1, 1, _KNOWN),
        MessageSpec(Number.POST_MESSAGE, _S, PostMessage, None, 0, 0, _LIVE),
        MessageSpec(Number.SIGNAL_EVENT, _S, SignalEvent, None, 0, 0, _LIVE),
        MessageSpec(Number.RESET, _S, Reset, Empty, 0, 0, _LIVE),
        MessageSpec(Number.PAUSE, _S, Empty, Empty, 0, 0, frozenset({State.ATTACHED})),
        MessageSpec(Number.RESUME, _S, Empty, Empty, 0, 0, frozenset({State.PAUSED})),
        MessageSpec(
            Number.QUERY, _S, Query, JsonObject, 0, 0, _GREETED | {State.OPERATOR}, reply_fds=1
        ),
        MessageSpec(Number.GOODBYE, _B, Goodbye, Empty, 0, 0, _GREETED | {State.OPERATOR}),
        MessageSpec(
            Number.COMMAND,
            _S,
            JsonObject,
            JsonObject,
            0,
            0,
            frozenset({State.OPERATOR}),
            reply_fds=1,
        ),
        MessageSpec(Number.ADD_MSG_PORT, _V, AddMsgPort, Empty, 0, 0, _LIVE),
        MessageSpec(Number.ADD_EVENT_PORT, _V, AddEventPort, Empty, 1, 1, _LIVE),
        MessageSpec(Number.DEL_PORT, _V, DelPort, Empty, 0, 0, _LIVE),
        MessageSpec(Number.DELIVER_MESSAGE, _V, DeliverMessage, Empty, 0, 0, _LIVE),
        MessageSpec(Number.SIGNAL_FLAG, _V, SignalFlag, None, 0, 0, _LIVE),
        MessageSpec(Number.SET_CALL_FD, _V, SetCallFd, Empty, 0, 1, _LIVE),
        MessageSpec(Number.LOG, _V, Log, None, 0, 0, _LIVE),
        MessageSpec(Number.POST_CREDIT, _V, PostCredit, None, 0, 0, _LIVE),
    )
}

_NUMBERS = frozenset(map(int, Number))
_AT_SERVER = {n: spec for n, spec in MESSAGES.items() if spec.direction is not _V}
_AT_VMM = {n: spec for n, spec in MESSAGES.items() if spec.direction is not _S}

RESERVED = frozenset({Number.SAVE, Number.RESTORE, Number.DIRTY_LOG_START, Number.DIRTY_LOG_GET})
"""Numbers kept for later versions; answered like unknown ones, with ENOSYS."""


class RefusedError(AttachError):
    """The peer answered a request with an error.

    Attributes:
        request: Name of the request.
        errno: Linux errno.
        text: What the peer says of it, without the request's name, which it may begin with.
    """

    def __init__(self, request: str, code: int, text: str) -> None:
        name = errno.errorcode.get(code, str(code))
        self.text = text.removeprefix(f"{request}: ")
        super().__init__(f"{request}: {name}: {self.text}")
        self.request = request
        self.errno = code


def find_spec(number: int, receiver: Direction) -> MessageSpec:
    """Return the row of a request that arrived at ``receiver`` (TO_SERVER or TO_VMM).

    Raises:
        PeerProtocolError: ENOSYS, if there is no such request in this direction.
    """
    spec = (_AT_SERVER if receiver is Direction.TO_SERVER else _AT_VMM).get(number)
    if spec is None:
        name = Number(number).name if number in _NUMBERS else f"{number:#x}"
        raise PeerProtocolError(
            f"type: {name} is not a request {receiver.value}", errno=errno.ENOSYS
        )
    return spec


def check_kind(number: int, receiver: Direction, *, asynchronous: bool) -> MessageSpec:
    """Return the row of a message, request or not, that arrived at ``receiver``.

    Raises:
        PeerProtocolError: As :func:`find_spec`; EPROTO if the async flag is wrong, and fatal if
            an answer will be waited for that never comes.
    """
    known = MESSAGES.get(number)
    if known is not None and asynchronous and not known.is_async:
        raise PeerProtocolError(
            f"{known.name}: the async flag must be 0", errno=errno.EPROTO, fatal=True
        )
    spec = find_spec(number, receiver)
    if spec.is_async and not asynchronous:
        raise PeerProtocolError(f"{spec.name}: the async flag must be 1", errno=errno.EPROTO)
    return spec


_WHO = {State.NEW: "anybody", State.OPERATOR: "an operator"}
"""Whose connection it is, for texts; in all other states a VMM's."""


def check_state(spec: MessageSpec, state: State) -> None:
    """Raise PeerProtocolError if ``spec`` may not come; EPERM if the role may never send it."""
    if state not in spec.states:
        # The role can never be right, or only the time is wrong.
        forbidden = state is State.OPERATOR or spec.states == {State.OPERATOR}
        code = errno.EPERM if forbidden else errno.EPROTO
        raise PeerProtocolError(
            f"{spec.name}: not allowed to {_WHO.get(state, 'a VMM')} in state {state.value!r}",
            errno=code,
        )


def check_fds(spec: MessageSpec, fds: int) -> None:
    """Raise PeerProtocolError, EINVAL, for another number of descriptors than it takes."""
    if not spec.min_fds <= fds <= spec.max_fds:
        raise PeerProtocolError(
            f"{spec.name}: {fds} descriptors came along, must be {spec.min_fds} to {spec.max_fds}",
            errno=errno.EINVAL,
        )


def check_request(spec: MessageSpec, state: State, fds: int) -> None:
    """Check state, role and number of descriptors, in this order. Raises PeerProtocolError."""
    check_state(spec, state)
    check_fds(spec, fds)
