"""Posting control messages, and finding the request that a reply belongs to.

Sources: linux/drivers/hv/connection.c (``vmbus_post_msg``), linux/drivers/hv/channel_mgmt.c
(lists of waiting requests), freebsd/sys/dev/hyperv/vmbus/vmbus.c (one result for everybody).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import trio

from vmbus.errors import GuestProtocolError, LocalProtocolError, VMBusError
from vmbus.guest.gpadl import JUNK_PFN
from vmbus.guest.machine import Panic
from vmbus.guest.personality import GpadlPadding, Matching, Personality
from vmbus.guest.processor import Processors
from vmbus.wire.messages import (
    CONNECTION_MESSAGES,
    MAX_PAYLOAD,
    MESSAGES,
    AllOffersDelivered,
    Direction,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTorndown,
    Message,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    UnloadResponse,
    build_message,
    parse_message_untrusted,
)
from vmbus.wire.versions import NO_FEATURES, Version

# mu_msvm/MsvmPkg/VmbusDxe: VmbusRootWaitForMessage and its callers. VmbusRootInitiateContact wants
# no more of a VERSION_RESPONSE than its least size, and nobody looks at that of a RESCIND.
_EXACT: tuple[type[Message], ...] = (
    OfferChannel,
    AllOffersDelivered,
    OpenChannelResult,
    GpadlCreated,
    GpadlTorndown,
    UnloadResponse,
)
_SIZES = {spec.message: spec.size for spec in MESSAGES if spec.message in _EXACT}
_OPEN_SIZE = max(spec.size for spec in MESSAGES if spec.message is OpenChannel)
_GARBAGE = b"\xa5\x5a\xa5\x5a"
"""What stands in the padding word of drivers that do not zero it."""

_Key = tuple[int, ...]


class HostRefusedError(VMBusError):
    """The host has answered a request with an error status, or no version suits both.

    Args:
        what: Name of the request.
        status: The status in the reply.
    """

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: the host refuses, status {status:#x}")
        self.status = status


class Reply:
    """A reply that somebody waits for."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.message: Message | None = None


class Mailbox:
    """Control messages of one guest, both ways.

    Args:
        personality: Whose habits to follow.
        processors: Post the messages.
        panic: Called when the host breaks a rule.
    """

    def __init__(self, personality: Personality, processors: Processors, panic: Panic) -> None:
        self.version: Version | None = None
        """The version in force, or None without a connection."""
        self.features = NO_FEATURES
        self.connection_id = CONNECTION_MESSAGES
        """Where messages are posted to."""
        self._personality = personality
        self._processors = processors
        self._panic = panic
        self._expected: dict[_Key, Reply] = {}
        self._unwanted: dict[_Key, Callable[[], None]] = {}
        """Replies that will come but that nobody waits for any more."""
        self._one_request = trio.Lock()

    def forget(self) -> None:
        """Forget the connection; who waits for a reply gets trio.BrokenResourceError."""
        for slot in self._expected.values():
            slot.arrived.set()
        self.version = None
        self.features = NO_FEATURES
        self.connection_id = CONNECTION_MESSAGES
        self._expected.clear()
        self._unwanted.clear()

    # -------------------------------------------------------------------------------- posting

    async def post(self, message: Message) -> None:
        """Post one control message in the personality's form. May be a checkpoint.

        Raises:
            LocalProtocolError: There is no such message in the version in force.
            GuestPanic: The host does not take it.
        """
        raw = build_message(message, version=self.version, features=self.features)
        await self.post_raw(raw)

    async def post_raw(self, raw: bytes) -> None:
        """Post ready-made bytes, at most 240. May be a checkpoint.

        Raises:
            GuestPanic: The host does not take them.
        """
        status = await self._processors.post(self.connection_id, self._dressed(raw))
        if status:
            self._panic(
                f"HvPostMessage of message {int.from_bytes(raw[:4], 'little')} to connection "
                f"{self.connection_id}: status {status}"
            )

    def _dressed(self, raw: bytes) -> bytes:
        """Add what the personality leaves in a message beside its contents."""
        if self._personality.garbage_padding:
            raw = raw[:4] + _GARBAGE + raw[8:]
        number = int.from_bytes(raw[:4], "little")
        full = self._personality.gpadl_padding is GpadlPadding.FULL_MESSAGE
        if full and number in (GpadlHeader.TYPE, GpadlBody.TYPE):
            raw = (raw + JUNK_PFN * (MAX_PAYLOAD // 8))[:MAX_PAYLOAD]
        if self._personality.long_open and number == OpenChannel.TYPE:
            raw = raw.ljust(_OPEN_SIZE, b"\0")
        return raw

    async def request(
        self, messages: Sequence[Message], reply: type[Message], *ids: int
    ) -> Message:
        """Post messages and wait for their one reply."""
        by_type = self._personality.matching is Matching.TYPE
        async with self._one_request if by_type else contextlib.nullcontext():
            key = (reply.TYPE, *(() if by_type else ids))
            with self._expecting(key) as slot:
                for message in messages:
                    await self.post(message)
                await slot.arrived.wait()
        if slot.message is None:
            raise trio.BrokenResourceError("the connection to the bus is gone")
        return slot.message

    def expecting(self, reply: type[Message]) -> contextlib.AbstractContextManager[Reply]:
        """Expect a reply by its type alone, as long as the context is open."""
        return self._expecting((reply.TYPE,))

    @contextlib.contextmanager
    def _expecting(self, key: _Key) -> Iterator[Reply]:
        if key in self._expected:
            raise LocalProtocolError(f"the answer {key} is waited for already")
        slot = self._expected[key] = Reply()
        try:
            yield slot
        except trio.Cancelled:
            if slot.message is None:
                self._unwanted[key] = _nothing
            raise
        finally:
            if self._expected.get(key) is slot:
                del self._expected[key]

    async def post_to(self, connection_id: int, raw: bytes) -> int:
        """Post bytes in the personality's form; return the hypercall's status."""
        return await self._processors.post(connection_id, self._dressed(raw))

    def disown(self, reply: type[Message], *ids: int, then: Callable[[], None]) -> None:
        """Expect a reply that nobody waits for; ``then`` is called when it comes."""
        self._unwanted[reply.TYPE, *ids] = then

    def abort(self, reply: type[Message], *ids: int) -> None:
        """Let whoever waits for this reply get trio.BrokenResourceError; it will not come."""
        for key, slot in self._expected.items():
            if key[0] == reply.TYPE and key[1 : 1 + len(ids)] in ((), ids):
                slot.arrived.set()

    def parse(self, payload: bytes, version: Version | None) -> Message:
        """Parse a message as of ``version``, with the personality's demands on its size."""
        features = self.features
        try:
            message = parse_message_untrusted(
                payload, direction=Direction.HOST_TO_GUEST, version=version, features=features
            )
        except GuestProtocolError as error:
            self._panic(f"control message: {error}")
        size = _SIZES.get(type(message), 0)
        if self._personality.exact_sizes and size and len(payload) != size:
            self._panic(f"{message.NAME}: {len(payload)} bytes instead of {size}")
        return message

    def answered(self, message: Message) -> None:
        """Give a reply to whoever waits for it."""
        ids: _Key
        match message:
            case OpenChannelResult():
                ids = (message.relid, message.open_id)
            case GpadlCreated():
                ids = (message.relid, message.gpadl)
            case GpadlTorndown():
                ids = (message.gpadl,)
            case ModifyChannelResponse():
                ids = (message.relid,)
            case _:
                ids = ()
        for key in ((message.TYPE, *ids), (message.TYPE,)):
            slot = self._expected.get(key)
            if slot is not None and slot.message is None:
                slot.message = message
                slot.arrived.set()
                return
            if key in self._unwanted:
                self._unwanted.pop(key)()
                return
        self._panic(f"{message}: nobody has asked for it")


def _nothing() -> None:
    """A reply came that nobody waits for any more."""
