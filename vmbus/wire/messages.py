"""The 29 VMBus control messages: a frozen dataclass each, and one table of them all.

A control message travels as the payload of a SynIC message of type 1, at most 240 bytes. It
starts with an 8-byte header, type u32 and padding u32; all integers are little-endian.

Reading, as learnt from real guests: padding and reserved fields may hold anything; a message may
be longer than its layout (UEFI always posts 240 bytes); it must not be shorter. Writing: exactly
the size in the table, because UEFI resets the machine on any other and older drivers read stale
bytes of the slot where a message is too short.

The byte layouts stand in :mod:`vmbus.wire.layouts`.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import ClassVar, TypeVar, dataclass_transform
from uuid import UUID

import construct

from vmbus.errors import GuestProtocolError, LocalProtocolError
from vmbus.wire import layouts
from vmbus.wire.versions import NO_FEATURES, Feature, Version

_T = TypeVar("_T")

MAX_PAYLOAD = layouts.MAX_PAYLOAD
HEADER_SIZE = layouts.HEADER_SIZE
MESSAGE_TYPE_VMBUS = 1
"""SynIC message type of every VMBus control message."""
USER_DEFINED_SIZE = layouts.USER_DEFINED_SIZE
GPADL_HEADER_DATA = MAX_PAYLOAD - 20
"""Most bytes of range data in one GPADL_HEADER."""
GPADL_BODY_DATA = MAX_PAYLOAD - 16
"""Most bytes of range data in one GPADL_BODY."""

CONNECTION_MESSAGES = 1
"""Message connection id of guests that speak less than 5.0."""
CONNECTION_EVENTS = 2
"""Event connection id shared by all channels of a 0.13 guest."""
CONNECTION_MONITOR = 3
CONNECTION_MESSAGES_5 = 4
"""Message connection id that guests use from 5.0 on."""
DEFAULT_SINT = 2
"""SINT of control messages and channel events unless INITIATE_CONTACT names another."""
TARGET_VP_NONE = 0xFFFFFFFF
"""OPENCHANNEL target VP that means: no interrupts wanted."""

OFFER_ENUMERATE = 0x0001
OFFER_CONFIDENTIAL_RING = 0x0002
OFFER_CONFIDENTIAL_EXTERNAL_MEMORY = 0x0004
OFFER_REQUIRE_PINNED = 0x0008
OFFER_NAMED_PIPE_MODE = 0x0010
OFFER_TLNPI_PROVIDER = 0x2000
MAX_RELID = 2047
"""Highest relid: one event flag of 2048 each, flag 0 is reserved."""
MAX_MONITOR_ID = 127


class Direction(Enum):
    """Who sends a message."""

    HOST_TO_GUEST = "host to guest"
    GUEST_TO_HOST = "guest to host"


class Message:
    """Base of all control messages; ``TYPE`` is the number, ``NAME`` the field's name."""

    TYPE: ClassVar[int]
    NAME: ClassVar[str]
    __slots__ = ()


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _record(cls: type[_T]) -> type[_T]:
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)


@_record
class OfferChannel(Message):
    """A channel exists; sent for each one after REQUESTOFFERS and on hot add."""

    TYPE: ClassVar[int] = 1
    NAME: ClassVar[str] = "OFFERCHANNEL"
    class_id: UUID
    instance_id: UUID
    flags: int = OFFER_ENUMERATE
    mmio_megabytes: int = 0
    """MMIO space the guest should set aside, in MiB."""
    user_defined: bytes = bytes(USER_DEFINED_SIZE)
    """120 bytes; the pipe mode of pipe devices, the hv_sock direction."""
    subchannel_index: int = 0
    """0 for a primary channel, 1 to n for its sub-channels."""
    mmio_megabytes_optional: int = 0
    relid: int
    """1 to 2047; also the number of the channel's event flag."""
    monitor_id: int = 0
    """Bit in the monitor page, 0 to 127, if ``monitor_allocated``."""
    monitor_allocated: bool = False
    is_dedicated_interrupt: bool = True
    """Always from 1.1 on: signals use ``connection_id`` instead of the interrupt page."""
    connection_id: int
    """What the guest passes to HvSignalEvent."""


@_record
class RescindChannelOffer(Message):
    """The channel is going away; the relid stays taken until RELID_RELEASED."""

    TYPE: ClassVar[int] = 2
    NAME: ClassVar[str] = "RESCIND_CHANNELOFFER"
    relid: int


@_record
class RequestOffers(Message):
    """The guest wants all offers, once per connection."""

    TYPE: ClassVar[int] = 3
    NAME: ClassVar[str] = "REQUESTOFFERS"


@_record
class AllOffersDelivered(Message):
    """No more offers for now; most guests stop booting until they see it."""

    TYPE: ClassVar[int] = 4
    NAME: ClassVar[str] = "ALLOFFERS_DELIVERED"


@_record
class OpenChannel(Message):
    """The guest opens a channel over a ring GPADL it has created."""

    TYPE: ClassVar[int] = 5
    NAME: ClassVar[str] = "OPENCHANNEL"
    relid: int
    open_id: int
    """Any number; echoed in the result (UEFI uses 0)."""
    ring_gpadl: int
    target_vp: int
    """VP index to interrupt, or :data:`TARGET_VP_NONE`."""
    downstream_page_offset: int
    """Pages of the GPADL before the host-to-guest ring begins."""
    user_data: bytes = bytes(USER_DEFINED_SIZE)
    connection_id: int | None = None
    """With a 6.0 signal feature: the connection id the guest will signal."""
    event_flag: int | None = None
    """With a 6.0 signal feature: the event flag the guest wants, usually the relid."""
    open_flags: int | None = None
    """With a 6.0 signal feature: bit 0 asks for interrupt redirection."""


@_record
class OpenChannelResult(Message):
    """Answer to OPENCHANNEL."""

    TYPE: ClassVar[int] = 6
    NAME: ClassVar[str] = "OPENCHANNEL_RESULT"
    relid: int
    open_id: int
    status: int
    """0 for success."""


@_record
class CloseChannel(Message):
    """The guest closes a channel; there is no reply."""

    TYPE: ClassVar[int] = 7
    NAME: ClassVar[str] = "CLOSECHANNEL"
    relid: int


@_record
class GpadlHeader(Message):
    """First part of a guest physical address descriptor list."""

    TYPE: ClassVar[int] = 8
    NAME: ClassVar[str] = "GPADL_HEADER"
    relid: int
    gpadl: int
    """Handle chosen by the guest."""
    range_buflen: int
    """Bytes of all range data, over this message and the bodies."""
    range_count: int
    data: bytes
    """Range data in this message: as many of ``range_buflen`` bytes as fit, then maybe junk."""


@_record
class GpadlBody(Message):
    """Further range data of the GPADL; carries no relid."""

    TYPE: ClassVar[int] = 9
    NAME: ClassVar[str] = "GPADL_BODY"
    message_number: int
    """Meaningless: several drivers leave it 0 in every body."""
    gpadl: int
    data: bytes


@_record
class GpadlCreated(Message):
    """Answer to a complete GPADL_HEADER and its bodies."""

    TYPE: ClassVar[int] = 10
    NAME: ClassVar[str] = "GPADL_CREATED"
    relid: int
    gpadl: int
    status: int
    """0 for success."""


@_record
class GpadlTeardown(Message):
    """The guest wants its pages back."""

    TYPE: ClassVar[int] = 11
    NAME: ClassVar[str] = "GPADL_TEARDOWN"
    relid: int
    gpadl: int


@_record
class GpadlTorndown(Message):
    """The host has let go of the pages."""

    TYPE: ClassVar[int] = 12
    NAME: ClassVar[str] = "GPADL_TORNDOWN"
    gpadl: int


@_record
class RelidReleased(Message):
    """The guest has forgotten a rescinded channel; the relid may be used again."""

    TYPE: ClassVar[int] = 13
    NAME: ClassVar[str] = "RELID_RELEASED"
    relid: int


@_record
class InitiateContact(Message):
    """First message of a connection; asks for one version."""

    TYPE: ClassVar[int] = 14
    NAME: ClassVar[str] = "INITIATE_CONTACT"
    version: int
    """Any 32-bit value; known ones are :class:`Version`."""
    target_vp: int
    """VP index that is to get the control messages."""
    target_info: int
    """64 bits with two meanings; see :meth:`interrupt_page` and :meth:`target_sint`."""
    monitor_page_1: int
    """Guest physical address in bytes (host to guest), or 0."""
    monitor_page_2: int
    """Guest physical address in bytes (guest to host), or 0."""
    client_id: UUID | None = None
    """Present if the message is long enough; valid with :attr:`Feature.CLIENT_ID` only."""

    # Which meaning bytes 16..23 have depends on the connection id the message came in on, not on
    # the version alone: Haiku posts version 5.3 on connection 1 with an interrupt page there.

    @property
    def interrupt_page(self) -> int:
        """On connection 1: guest physical address of the interrupt page, in bytes."""
        return self.target_info

    @property
    def target_sint(self) -> int:
        """On connection 4: the SINT that is to get the control messages."""
        return self.target_info & 0xFF

    @property
    def target_vtl(self) -> int:
        """On connection 4: the virtual trust level asked for."""
        return self.target_info >> 8 & 0xFF

    @property
    def feature_flags(self) -> Feature:
        """On connection 4 and version 6.0: the features the guest would like."""
        return Feature(self.target_info >> 32 & sum(Feature))


@_record
class VersionResponse(Message):
    """Answer to INITIATE_CONTACT."""

    TYPE: ClassVar[int] = 15
    NAME: ClassVar[str] = "VERSION_RESPONSE"
    version_supported: bool
    connection_state: int = 0
    """0 for success; UEFI resets on anything else."""
    message_connection_id: int = 0
    """From 5.0 on: where the guest posts from now on."""
    supported_features: int | None = None
    """From 6.0 on."""
    host_monitor_page_1: int | None = None
    """With :attr:`Feature.SERVER_SPECIFIED_MONITOR_PAGES`: address in bytes."""
    host_monitor_page_2: int | None = None


@_record
class Unload(Message):
    """The guest leaves; everything it gave us is to be forgotten."""

    TYPE: ClassVar[int] = 16
    NAME: ClassVar[str] = "UNLOAD"


@_record
class UnloadResponse(Message):
    """Nothing of the guest's memory is in use any more."""

    TYPE: ClassVar[int] = 17
    NAME: ClassVar[str] = "UNLOAD_RESPONSE"


@_record
class OpenReservedChannel(Message):
    """Open a channel with a reply VP and SINT of its own, without interrupts (crash dumps)."""

    TYPE: ClassVar[int] = 18
    NAME: ClassVar[str] = "OPEN_RESERVED_CHANNEL"
    relid: int
    target_vp: int
    target_sint: int
    ring_gpadl: int
    downstream_page_offset: int


@_record
class CloseReservedChannel(Message):
    """Close a reserved channel; allowed without a connection."""

    TYPE: ClassVar[int] = 19
    NAME: ClassVar[str] = "CLOSE_RESERVED_CHANNEL"
    relid: int
    target_vp: int
    target_sint: int


@_record
class CloseReservedResponse(Message):
    """Answer to CLOSE_RESERVED_CHANNEL, sent to the VP and SINT named there."""

    TYPE: ClassVar[int] = 20
    NAME: ClassVar[str] = "CLOSE_RESERVED_RESPONSE"
    relid: int


@_record
class TlConnectRequest(Message):
    """A guest process connects to a host service over hv_sock."""

    TYPE: ClassVar[int] = 21
    NAME: ClassVar[str] = "TL_CONNECT_REQUEST"
    endpoint_id: UUID
    service_id: UUID
    silo_id: UUID | None = None
    """From 5.2 on, where a guest has one. Linux sends the request without it in every version
    (linux/drivers/hv/hv_sock: vmbus_send_tl_connect_request), and so may everybody."""


@_record
class ModifyChannel(Message):
    """Interrupt another VP for this channel from now on."""

    TYPE: ClassVar[int] = 22
    NAME: ClassVar[str] = "MODIFYCHANNEL"
    relid: int
    target_vp: int


@_record
class TlConnectResult(Message):
    """A connect request failed. Success is told by an offer instead."""

    TYPE: ClassVar[int] = 23
    NAME: ClassVar[str] = "TL_CONNECT_RESULT"
    endpoint_id: UUID
    service_id: UUID
    status: int


@_record
class ModifyChannelResponse(Message):
    """Answer to MODIFYCHANNEL, from 5.3 on."""

    TYPE: ClassVar[int] = 24
    NAME: ClassVar[str] = "MODIFYCHANNEL_RESPONSE"
    relid: int
    status: int


@_record
class ModifyConnection(Message):
    """Use other monitor pages: both, or none."""

    TYPE: ClassVar[int] = 25
    NAME: ClassVar[str] = "MODIFY_CONNECTION"
    monitor_page_1: int
    monitor_page_2: int


@_record
class ModifyConnectionResponse(Message):
    """Answer to MODIFY_CONNECTION."""

    TYPE: ClassVar[int] = 26
    NAME: ClassVar[str] = "MODIFY_CONNECTION_RESPONSE"
    connection_state: int
    """0 for success."""


@_record
class Pause(Message):
    """Send no control messages after the answer to this one."""

    TYPE: ClassVar[int] = 27
    NAME: ClassVar[str] = "PAUSE"


@_record
class PauseResponse(Message):
    """Answer to PAUSE; the last control message before RESUME."""

    TYPE: ClassVar[int] = 28
    NAME: ClassVar[str] = "PAUSE_RESPONSE"


@_record
class Resume(Message):
    """Control messages may flow again; no answer."""

    TYPE: ClassVar[int] = 29
    NAME: ClassVar[str] = "RESUME"


@dataclasses.dataclass(frozen=True, slots=True)
class MessageSpec:
    """One row of :data:`MESSAGES`: which layout a message has, and when."""

    message: type[Message]
    direction: Direction
    size: int
    """Bytes with header: exact when sent, a minimum when received."""
    layout: construct.Struct
    """What follows the 8-byte header."""
    min_version: Version | None = Version.V0_13
    """First version that has it; None: also without a connection."""
    features: Feature = NO_FEATURES
    """At least one of these must be in force (none needed if empty)."""
    trailing: bool = False
    """Variable data follows; ``size`` is that of the fixed part."""
    optional: bool = False
    """What is new in this layout may be left out, by guests too."""

    def allowed(self, version: Version | None, features: Feature) -> bool:
        """Whether the message may be used on a connection of ``version`` and ``features``."""
        if self.min_version is None:
            return True
        if version is None or version < self.min_version:
            return False
        return not self.features or bool(self.features & features)


_H2G = Direction.HOST_TO_GUEST
_G2H = Direction.GUEST_TO_HOST
_SIGNALS = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.CHANNEL_INTERRUPT_REDIRECTION

# Where a message has several layouts, the newest stands first: the first row that the
# connection allows is the one in force.
MESSAGES: tuple[MessageSpec, ...] = (
    MessageSpec(OfferChannel, _H2G, 196, layouts.OFFER_CHANNEL),
    MessageSpec(RescindChannelOffer, _H2G, 12, layouts.RELID),
    MessageSpec(RequestOffers, _G2H, 8, layouts.EMPTY),
    MessageSpec(AllOffersDelivered, _H2G, 8, layouts.EMPTY),
    MessageSpec(OpenChannel, _G2H, 156, layouts.OPEN_CHANNEL_2, Version.V6_0, _SIGNALS),
    MessageSpec(OpenChannel, _G2H, 148, layouts.OPEN_CHANNEL),
    MessageSpec(OpenChannelResult, _H2G, 20, layouts.OPEN_CHANNEL_RESULT),
    MessageSpec(CloseChannel, _G2H, 12, layouts.RELID),
    MessageSpec(GpadlHeader, _G2H, 20, layouts.GPADL_HEADER, trailing=True),
    MessageSpec(GpadlBody, _G2H, 16, layouts.GPADL_BODY, trailing=True),
    MessageSpec(GpadlCreated, _H2G, 20, layouts.GPADL_CREATED),
    MessageSpec(GpadlTeardown, _G2H, 16, layouts.GPADL_TEARDOWN),
    MessageSpec(GpadlTorndown, _H2G, 12, layouts.GPADL_TORNDOWN),
    MessageSpec(RelidReleased, _G2H, 12, layouts.RELID),
    MessageSpec(InitiateContact, _G2H, 40, layouts.INITIATE_CONTACT, None),
    MessageSpec(
        VersionResponse,
        _H2G,
        40,
        layouts.VERSION_RESPONSE_3,
        Version.V6_0,
        Feature.SERVER_SPECIFIED_MONITOR_PAGES,
    ),
    MessageSpec(VersionResponse, _H2G, 20, layouts.VERSION_RESPONSE_2, Version.V6_0),
    MessageSpec(VersionResponse, _H2G, 16, layouts.VERSION_RESPONSE, None),
    MessageSpec(Unload, _G2H, 8, layouts.EMPTY),
    MessageSpec(UnloadResponse, _H2G, 8, layouts.EMPTY, Version.V1_1),
    MessageSpec(OpenReservedChannel, _G2H, 28, layouts.OPEN_RESERVED_CHANNEL, Version.V4_0),
    MessageSpec(CloseReservedChannel, _G2H, 20, layouts.CLOSE_RESERVED_CHANNEL, None),
    MessageSpec(CloseReservedResponse, _H2G, 12, layouts.RELID, None),
    MessageSpec(
        TlConnectRequest, _G2H, 56, layouts.TL_CONNECT_REQUEST_2, Version.V5_2, optional=True
    ),
    MessageSpec(TlConnectRequest, _G2H, 40, layouts.TL_CONNECT_REQUEST, Version.V4_0),
    MessageSpec(ModifyChannel, _G2H, 16, layouts.MODIFY_CHANNEL, Version.V4_1),
    MessageSpec(TlConnectResult, _H2G, 44, layouts.TL_CONNECT_RESULT, Version.V4_1),
    MessageSpec(ModifyChannelResponse, _H2G, 16, layouts.MODIFY_CHANNEL_RESPONSE, Version.V5_3),
    MessageSpec(
        ModifyConnection,
        _G2H,
        24,
        layouts.MODIFY_CONNECTION,
        Version.V6_0,
        Feature.MODIFY_CONNECTION,
    ),
    MessageSpec(
        ModifyConnectionResponse,
        _H2G,
        9,
        layouts.MODIFY_CONNECTION_RESPONSE,
        Version.V6_0,
        Feature.MODIFY_CONNECTION,
    ),
    MessageSpec(Pause, _G2H, 8, layouts.EMPTY, Version.V6_0, Feature.PAUSE_RESUME),
    MessageSpec(PauseResponse, _H2G, 8, layouts.EMPTY, Version.V6_0, Feature.PAUSE_RESUME),
    MessageSpec(Resume, _G2H, 8, layouts.EMPTY, Version.V6_0, Feature.PAUSE_RESUME),
)

for _spec in MESSAGES:
    assert _spec.layout.sizeof() + HEADER_SIZE == _spec.size, _spec.message.NAME

_ROWS: dict[int, tuple[MessageSpec, ...]] = {
    number: tuple(spec for spec in MESSAGES if number == spec.message.TYPE)
    for number in sorted({spec.message.TYPE for spec in MESSAGES})
}
_FIELDS: dict[type[Message], tuple[str, ...]] = {
    spec.message: tuple(field.name for field in dataclasses.fields(spec.message))  # type: ignore[arg-type]  # every Message is a dataclass
    for spec in MESSAGES
}
CLIENT_ID_END = 56
"""Bytes of an INITIATE_CONTACT that carries a client id."""


def message_name(number: int) -> str:
    """Return the name of message ``number``, or ``"type N"`` for one that does not exist."""
    rows = _ROWS.get(number)
    return rows[0].message.NAME if rows else f"type {number}"


def parse_message_untrusted(
    data: bytes,
    *,
    direction: Direction,
    version: Version | None,
    features: Feature = NO_FEATURES,
) -> Message:
    """Parse one control message. Cannot block.

    Args:
        data: The SynIC message payload, already copied out of shared memory.
        direction: Who has sent it; the other side's messages are refused.
        version: The version in force, or None without a connection.
        features: The 6.0 features in force.

    Returns:
        One of the message classes; its fields hold what was sent, whatever the values.

    Raises:
        GuestProtocolError: Too short, unknown, the wrong direction, or not part of the version.
    """
    if len(data) < HEADER_SIZE or len(data) > MAX_PAYLOAD:
        raise GuestProtocolError(
            f"control message of {len(data)} bytes; 8 to 240 are possible", field="size"
        )
    number = int.from_bytes(data[:4], "little")
    rows = _ROWS.get(number)
    if rows is None:
        raise GuestProtocolError(f"there is no control message {number}", field="type")
    if rows[0].direction is not direction:
        raise GuestProtocolError(
            f"{rows[0].message.NAME} never goes from {direction.value}", field="type"
        )
    for spec in rows:
        # A host may answer with an older, shorter layout (a refusal has no features in it); a
        # guest may not, with one exception: the layout is a matter of the version in force.
        exact = direction is Direction.GUEST_TO_HOST and not spec.optional
        if spec.allowed(version, features) and (
            exact or len(data) >= spec.size or spec is rows[-1]
        ):
            break
    else:
        raise GuestProtocolError(
            f"{rows[0].message.NAME} is not part of "
            + (f"version {version}" if version is not None else "an unconnected bus"),
            field="type",
        )
    if len(data) < spec.size:
        raise GuestProtocolError(
            f"{spec.message.NAME} has {len(data)} bytes, needs {spec.size}", field="size"
        )
    # The layouts have fixed sizes, which were just checked, and no value in them can fail.
    values = dict(spec.layout.parse(data[HEADER_SIZE : spec.size]))
    values.pop("_io", None)
    if spec.trailing:
        values["data"] = data[spec.size :]
    elif spec.message is InitiateContact and len(data) >= CLIENT_ID_END:
        values["client_id"] = UUID(bytes_le=data[spec.size : CLIENT_ID_END])
    return spec.message(**values)


def _missing(message: Message, spec: MessageSpec) -> str:
    """Name a field of the layout that the message leaves open, or return ""."""
    for sub in spec.layout.subcons:
        if sub.name and getattr(message, sub.name) is None:
            return str(sub.name)
    return ""


def build_message(
    message: Message, *, version: Version | None, features: Feature = NO_FEATURES
) -> bytes:
    """Return the exact bytes of a control message. Cannot block.

    Args:
        message: Any of the message classes.
        version: The version in force, or None without a connection.
        features: The 6.0 features in force; together they choose the layout. Fields that the
            chosen layout does not have are left out, fields it has must not be None; where a
            host leaves such a field None, the newest layout without it is used.

    Raises:
        LocalProtocolError: The message is not part of the version, a field is missing, or a
            value does not fit.
    """
    rows = [spec for spec in _ROWS[message.TYPE] if spec.allowed(version, features)]
    if not rows:
        raise LocalProtocolError(
            f"{message.NAME} is not part of "
            + (f"version {version}" if version is not None else "an unconnected bus")
        )
    spec = rows[0]
    if spec.direction is Direction.HOST_TO_GUEST or spec.optional:
        # A host may use an older layout (a refusal has no features in it); see parsing.
        spec = next((each for each in rows if not _missing(message, each)), spec)
    missing = _missing(message, spec)
    if missing:
        raise LocalProtocolError(f"{message.NAME} needs {missing} on this connection")
    values = {name: getattr(message, name) for name in _FIELDS[type(message)]}
    try:
        body = spec.layout.build(values)
    except (construct.ConstructError, ValueError, TypeError, AttributeError) as error:
        raise LocalProtocolError(f"{message.NAME} cannot be written: {error}") from error
    tail = b""
    if spec.trailing:
        tail = values["data"]
    elif isinstance(message, InitiateContact) and message.client_id is not None:
        tail = message.client_id.bytes_le
    whole = message.TYPE.to_bytes(8, "little") + body + tail
    if len(whole) > MAX_PAYLOAD:
        raise LocalProtocolError(f"{message.NAME} has {len(whole)} bytes, 240 fit")
    return whole
