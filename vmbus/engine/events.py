"""What the engine tells its caller, in the order in which it happened.

:meth:`vmbus.engine.Engine.take` hands these out. Most are for information or say what to do;
five are questions, and each is to be answered exactly once, at any later time:

========================  ==================================
event                     answer
========================  ==================================
:class:`ChannelOpen`      ``open_done(key, ok=...)``
:class:`ChannelClose`     ``close_done(key)``
:class:`ChannelModify`    ``modify_done(key, ok=...)``
:class:`GpadlTeardown`    ``gpadl_released(key, handle)``
:class:`TlConnect`        ``tl_connect_done(request_id, ok=...)``
========================  ==================================

The order carries meaning. The :class:`SendMessage` with OPENCHANNEL_RESULT comes out only after
``open_done``, so whoever delivers messages and raises event flags in the order of the events never
interrupts a guest for a channel that it does not know to be open yet. From :class:`ChannelClose`
on nothing may be signalled for the channel, and its ring may not be written.
"""

from __future__ import annotations

import dataclasses
from uuid import UUID

from vmbus.engine.offers import Offer
from vmbus.gpadl import Gpadl
from vmbus.wire.versions import Feature, Version


class Event:
    """Base of all events."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SendMessage(Event):
    """Put a control message into a SynIC message slot. Per slot, order must be kept."""

    vp: int
    """VP index."""
    sint: int
    """1 to 15; also the number of the slot."""
    payload: bytes
    """A SynIC message payload of type 1, at most 240 bytes."""
    reserved: bool = False
    """It belongs to a reserved channel and so outlives the connection."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiscardMessages(Event):
    """The guest left: drop all messages handed out before this one and not in a slot yet.

    Without those that are ``reserved``. A kernel that starts anew must not be given the replies
    that its predecessor was waiting for.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOpen(Event):
    """The guest opens a channel. Set up its ring and doorbell, then call ``open_done``.

    No :class:`ChannelClose` comes before the answer.
    """

    key: int
    """What ``offer`` or ``offer_subchannels`` returned."""
    relid: int
    offer: Offer
    subchannel_index: int
    """0 for a primary channel."""
    primary_key: int
    """Key of the primary channel; the same as ``key`` if this is one."""
    gpadl: Gpadl
    """The ring's pages: checked to be memory and to split at the offset given here."""
    downstream_page_offset: int
    """Pages before the host-to-guest ring; see :meth:`vmbus.gpadl.Gpadl.ring_pages`."""
    target_vp: int | None
    """VP index to interrupt, or None: the guest wants no interrupts and polls."""
    user_data: bytes
    """120 bytes chosen by the guest; zeros for a reserved channel."""
    connection_id: int
    """What the guest passes to HvSignalEvent; 2, shared by all channels, in version 0.13."""
    event_flag: int
    """SINT event flag to raise, 1 to 2047. See ``outgoing_by_page``."""
    version: Version
    monitor_id: int | None
    """Bit that the guest sets in monitor page 2 instead of calling HvSignalEvent, or None."""
    outgoing_by_page: bool
    """Before 2.4: set bit ``event_flag`` in the first half of the interrupt page, raise flag 0."""
    incoming_by_page: bool
    """0.13: the guest sets bit ``relid`` in the second half of the page, signals connection 2."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChannelClose(Event):
    """Stop: no signal and no access to the ring from now on; then call ``close_done``."""

    key: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChannelModify(Event):
    """Interrupt another VP from now on, then call ``modify_done``.

    If a :class:`ChannelClose` follows before the answer, the answer may be left out.
    """

    key: int
    target_vp: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpadlTeardown(Event):
    """Let go of these pages once nobody uses them, then call ``gpadl_released``.

    A ring's pages may be asked back while the channel is open: answer when it has been closed.
    """

    key: int
    handle: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGone(Event):
    """The last trace of a revoked channel (or of a sub-channel) is gone; its key is dead."""

    key: int
    unwanted: bool = False
    """Nobody revoked it: the guest has no use for it, and would not have for the same offer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MonitorPages(Event):
    """From now on these are the monitor pages."""

    page_1: int | None
    """Host to guest: guest physical address in bytes; None: there are none."""
    page_2: int | None
    """Guest to host, the one to poll. Both are memory, or both are None."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InterruptPage(Event):
    """From now on this is the interrupt page. Only guests older than 2.4 have one."""

    gpa: int | None
    """Guest physical address in bytes of a page that is memory; None: there is none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Connected(Event):
    """The guest and the host agreed on a version."""

    version: Version
    features: Feature
    vp: int
    """VP index that gets the control messages."""
    sint: int
    """SINT of control messages and channel events."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected(Event):
    """Nothing of the guest is in use any more, but for reserved channels."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResetDone(Event):
    """Nothing of the guest is in use any more; answers all calls of ``reset`` so far."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlConnect(Event):
    """A guest process wants to connect to a host service (hv_sock).

    To accept, ``offer`` a channel of class ``service`` and instance ``endpoint``; then, or to
    refuse, call ``tl_connect_done``. Answers that come after the guest has left are ignored.
    """

    request_id: int
    endpoint: UUID
    service: UUID
    silo: UUID
    """All zeros before 5.2."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Event):
    """The guest broke a rule. Its message had no effect, but for a reply if one is due."""

    text: str
    relid: int | None
    """The channel concerned, as the guest named it."""
    message_type: int
    """Number of the message, or -1 if it was too short to have one."""
    field: str
    """The wire field concerned, or an empty string."""
    vp: int
    """VP that posted the message."""
