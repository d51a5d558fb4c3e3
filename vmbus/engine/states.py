"""The state machines of the bus: connection, presence and life of a channel, GPADL.

Rules of this file:

1. What may follow what stands here and nowhere else, in four tables.
2. A state changes only through :func:`follow`, which looks into the tables. Code that has to
   decide whether something is allowed asks :func:`permits`.
3. A state is a value. It carries what is true only while it lasts, so that no field can be left
   over from an earlier state, and saving a state means writing it out.
4. Nothing acts here: no message is sent and no event is made.

There are two machines per channel because two parties have to be told about it, each at its own
pace: *presence* is what the guest knows of the channel, *life* is what the device has been told.
A rescinded channel, say, may still be closing.

The tables are drawn in ``docs/reference/states.md``. That page is made from them, by
``docs/make_state_diagrams.py``; run it after a change here, a test compares the two.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import ClassVar, NamedTuple, TypeVar

from vmbus.gpadl import Gpadl, GpadlAssembly
from vmbus.wire import messages as m
from vmbus.wire.versions import Feature, Version


class Slot(NamedTuple):
    """A SynIC message slot: where control messages for the guest go."""

    vp: int
    sint: int


class Gone:
    """Final state: there is no record any more."""


Table = dict[type, dict[Enum, type]]
"""State -> trigger -> the state that follows; the first row is the state to start in."""


# --- Connection ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What INITIATE_CONTACT settled; holds until the guest leaves."""

    version: Version
    features: Feature
    slot: Slot
    monitor_pages: tuple[int, int] | None
    """Guest physical addresses in bytes, host to guest and guest to host; both are memory."""
    interrupt_page: int | None
    """Guest physical address in bytes; only before 2.4."""


class Contact(NamedTuple):
    """An INITIATE_CONTACT that has to wait until everything of the guest's past is cleaned up."""

    connection_id: int
    message: m.InitiateContact


@dataclasses.dataclass(frozen=True, slots=True)
class Disconnected:
    """No version is agreed on. Reserved channels may exist still."""

    link: ClassVar[None] = None
    """There is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Connected:
    """The guest has a version."""

    link: Link
    offers_requested: bool = False
    """The guest has sent REQUESTOFFERS: offers go out as soon as they are made."""


@dataclasses.dataclass(frozen=True, slots=True)
class Paused:
    """The guest has it, but wants no control messages; they are held back."""

    link: Link
    offers_requested: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Disconnecting:
    """The guest is gone or about to start anew; devices have been told and have yet to let go."""

    link: Link | None
    """The connection that ends; None if only reserved channels had to go."""
    unload: bool = False
    """UNLOAD_RESPONSE is owed. Void once a new contact arrives: a new life of the guest must not
    see the reply to a request of the old one."""
    reset: bool = False
    """ResetDone is owed."""
    contact: Contact | None = None
    """To be answered when done."""


ConnectionState = Disconnected | Connected | Paused | Disconnecting


class ConnectionTrigger(Enum):
    """What moves the connection."""

    ACCEPT = "version accepted"
    REQUEST_OFFERS = "REQUESTOFFERS"
    MODIFY = "MODIFY_CONNECTION"
    PAUSE = "PAUSE"
    RESUME = "RESUME"
    LEAVE = "UNLOAD, reset or new contact"
    DRAINED = "all devices let go"


_C = ConnectionTrigger
CONNECTION: Table = {
    Disconnected: {_C.ACCEPT: Connected, _C.LEAVE: Disconnecting},
    Connected: {
        _C.REQUEST_OFFERS: Connected,
        _C.MODIFY: Connected,
        _C.PAUSE: Paused,
        _C.LEAVE: Disconnecting,
    },
    Paused: {_C.RESUME: Connected, _C.LEAVE: Disconnecting},
    Disconnecting: {_C.LEAVE: Disconnecting, _C.DRAINED: Disconnected},
}

_ALWAYS = frozenset({Disconnected, Connected, Paused, Disconnecting})
_CONNECTED = frozenset({Connected})
ACCEPTED: dict[type[m.Message], frozenset[type]] = {
    m.InitiateContact: _ALWAYS,
    m.Unload: frozenset({Connected, Paused}),
    m.Resume: frozenset({Paused}),
    m.CloseReservedChannel: frozenset({Disconnected, Connected, Disconnecting}),
    m.RequestOffers: _CONNECTED,
    m.GpadlHeader: _CONNECTED,
    m.GpadlBody: _CONNECTED,
    m.GpadlTeardown: _CONNECTED,
    m.OpenChannel: _CONNECTED,
    m.CloseChannel: _CONNECTED,
    m.ModifyChannel: _CONNECTED,
    m.RelidReleased: _CONNECTED,
    m.OpenReservedChannel: _CONNECTED,
    m.TlConnectRequest: _CONNECTED,
    m.ModifyConnection: _CONNECTED,
    m.Pause: _CONNECTED,
}
"""In which states of the connection a message of the guest has an effect; else it is a fault."""


# --- Presence: what the guest knows of a channel ------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The numbers under which the guest knows a channel; taken until the guest releases them."""

    relid: int
    connection_id: int
    monitor_id: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Hidden:
    """The guest does not know it: not connected, offers not asked for, or numbers not free."""


@dataclasses.dataclass(frozen=True, slots=True)
class Offered:
    """OFFERCHANNEL has been sent."""

    placement: Placement


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """The guest has left, but uses the channel on as a reserved one (crash dump, debugger)."""

    placement: Placement


@dataclasses.dataclass(frozen=True, slots=True)
class Rescinded:
    """RESCIND_CHANNELOFFER has been sent; the guest has yet to release the relid."""

    placement: Placement


@dataclasses.dataclass(frozen=True, slots=True)
class Released:
    """The channel is revoked and the guest has let go of it; the device has yet to."""

    placement: Placement | None
    """None if the guest never knew it."""
    unwanted: bool = False
    """The guest gave it back of its own accord."""


Presence = Hidden | Offered | Kept | Rescinded | Released


class PresenceTrigger(Enum):
    """What moves the presence of a channel."""

    OFFER = "offered to the guest"
    REVOKE = "revoked by the host"
    RELEASE = "RELID_RELEASED"
    LEAVE = "guest left"
    KEEP = "guest left, channel is reserved"
    FORGET = "device let go"


_P = PresenceTrigger
PRESENCE: Table = {
    Hidden: {_P.OFFER: Offered, _P.REVOKE: Released},
    Offered: {_P.REVOKE: Rescinded, _P.RELEASE: Released, _P.LEAVE: Hidden, _P.KEEP: Kept},
    Kept: {_P.REVOKE: Released, _P.LEAVE: Hidden},
    Rescinded: {_P.RELEASE: Released, _P.LEAVE: Released},
    Released: {_P.FORGET: Gone},
    Gone: {},
}


# --- Life: what the device of a channel has been told -------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """OPENCHANNEL or OPEN_RESERVED_CHANNEL, checked as far as it stands for itself."""

    version: Version
    relid: int
    open_id: int
    ring_gpadl: int
    target_vp: int | None
    """None: no interrupts."""
    downstream_page_offset: int
    user_data: bytes
    connection_id: int
    event_flag: int
    reserved: Slot | None = None
    """Where the result goes, if this is a reserved channel."""


class CloseReply(NamedTuple):
    """A CLOSE_RESERVED_RESPONSE that is owed."""

    relid: int
    slot: Slot


@dataclasses.dataclass(frozen=True, slots=True)
class Closed:
    """The device does not use the channel."""


@dataclasses.dataclass(frozen=True, slots=True)
class Opening:
    """ChannelOpen is out; the guest waits for the result."""

    request: OpenRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Abandoned:
    """ChannelOpen is out, but nobody wants the result any more: close as soon as it is there."""

    reply: CloseReply | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Open:
    """The device works."""

    request: OpenRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Modifying:
    """ChannelModify is out; otherwise the channel is open."""

    request: OpenRequest
    target_vp: int
    newest: int | None = None
    """What a guest before 5.3 has asked for since; it gets no replies and needs not wait."""


@dataclasses.dataclass(frozen=True, slots=True)
class Closing:
    """ChannelClose is out."""

    reply: CloseReply | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ClosingReopen:
    """ChannelClose is out, and the guest, which gets no reply to CLOSECHANNEL, opens again."""

    request: OpenRequest


Life = Closed | Opening | Abandoned | Open | Modifying | Closing | ClosingReopen


class LifeTrigger(Enum):
    """What moves the life of a channel."""

    OPEN = "OPENCHANNEL"
    OPENED = "open_done, ok"
    REFUSED = "open_done, not ok"
    ABANDON = "guest left, or revoked"
    MODIFY = "MODIFYCHANNEL"
    MODIFIED = "modify_done"
    CLOSE = "CLOSECHANNEL"
    AWAIT = "CLOSE_RESERVED_CHANNEL"
    CLOSED = "close_done"


_L = LifeTrigger
LIFE: Table = {
    Closed: {_L.OPEN: Opening},
    Opening: {_L.OPENED: Open, _L.REFUSED: Closed, _L.ABANDON: Abandoned},
    Abandoned: {
        _L.OPENED: Closing,
        _L.REFUSED: Closed,
        _L.AWAIT: Abandoned,
        _L.ABANDON: Abandoned,
    },
    Open: {_L.MODIFY: Modifying, _L.CLOSE: Closing},
    Modifying: {_L.MODIFY: Modifying, _L.MODIFIED: Open, _L.CLOSE: Closing},
    Closing: {
        _L.OPEN: ClosingReopen,
        _L.AWAIT: Closing,
        _L.ABANDON: Closing,
        _L.MODIFIED: Closing,
        _L.CLOSED: Closed,
    },
    ClosingReopen: {
        _L.ABANDON: Closing,
        _L.MODIFIED: ClosingReopen,
        _L.CLOSED: Closed,
    },
}


# --- GPADL --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Unfinished:
    """The header is here, bodies are missing; GPADL_CREATED is owed."""

    assembly: GpadlAssembly


@dataclasses.dataclass(frozen=True, slots=True)
class Usable:
    """GPADL_CREATED with status 0 has been sent."""

    gpadl: Gpadl


@dataclasses.dataclass(frozen=True, slots=True)
class TearingDown:
    """GpadlTeardown is out; the device may use the pages until it answers."""

    gpadl: Gpadl
    reply: bool
    """GPADL_TORNDOWN is owed."""


GpadlState = Unfinished | Usable | TearingDown


class GpadlTrigger(Enum):
    """What moves a GPADL."""

    COMPLETE = "last body"
    FAIL = "refused, or given up"
    TEARDOWN = "GPADL_TEARDOWN, or channel gone"
    LEAVE = "guest left"
    RELEASED = "gpadl_released"


_G = GpadlTrigger
GPADL: Table = {
    Unfinished: {_G.COMPLETE: Usable, _G.FAIL: Gone},
    Usable: {_G.TEARDOWN: TearingDown},
    TearingDown: {_G.TEARDOWN: TearingDown, _G.LEAVE: TearingDown, _G.RELEASED: Gone},
    Gone: {},
}


# --- The only way from one state to the next ----------------------------------------------------

Trigger = ConnectionTrigger | PresenceTrigger | LifeTrigger | GpadlTrigger
_TABLES: dict[type[Enum], Table] = {
    ConnectionTrigger: CONNECTION,
    PresenceTrigger: PRESENCE,
    LifeTrigger: LIFE,
    GpadlTrigger: GPADL,
}
S = TypeVar("S")


def permits(state: object, trigger: Trigger) -> bool:
    """Whether anything follows ``state`` on ``trigger``."""
    return trigger in _TABLES[type(trigger)][type(state)]


def follow(state: object, trigger: Trigger, successor: S) -> S:
    """Return ``successor``, having made sure that it is what follows ``state`` on ``trigger``."""
    expected = _TABLES[type(trigger)][type(state)].get(trigger)
    if expected is not type(successor):
        raise AssertionError(f"{state} cannot become {successor} on {trigger}")
    return successor
