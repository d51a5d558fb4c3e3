"""The control plane as a driver sees it: contact, offers, GPADLs, opening and closing channels.

All the checks here are those of real drivers, taken together: a host that passes them for every
personality keeps each of these drivers alive. Whatever the host sends that nobody has asked for, a
reply too many, or a field that does not match its request, crashes the guest.
Sources: linux/drivers/hv/{connection,channel,channel_mgmt}.c, freebsd/sys/dev/hyperv/vmbus,
openbsd/sys/dev/pv/hyperv.c, mu_msvm/MsvmPkg/VmbusDxe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from uuid import UUID

import trio

from vmbus.guest.channels import Channels, gone
from vmbus.guest.machine import Panic
from vmbus.guest.mailbox import HostRefusedError
from vmbus.guest.personality import Personality, Rescind, Unload
from vmbus.guest.processor import Processors
from vmbus.guest.ram import Ram
from vmbus.wire.messages import (
    CONNECTION_MESSAGES,
    CONNECTION_MESSAGES_5,
    DEFAULT_SINT,
    MAX_MONITOR_ID,
    MAX_RELID,
    OFFER_CONFIDENTIAL_EXTERNAL_MEMORY,
    OFFER_CONFIDENTIAL_RING,
    AllOffersDelivered,
    CloseChannel,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    OfferChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Unload as UnloadMessage,
    UnloadResponse,
    VersionResponse,
    build_message,
)
from vmbus.wire.synic import HvStatus
from vmbus.wire.versions import NO_FEATURES, Feature, Version

_CLIENT_ID = UUID("5f2d1b8e-9f7a-4a6b-8c61-0f8a4b1f6f3d")
_CONFIDENTIAL = OFFER_CONFIDENTIAL_RING | OFFER_CONFIDENTIAL_EXTERNAL_MEMORY


class Connection(Channels):
    """One guest's connection to the bus.

    Args:
        personality: Whose habits to follow.
        ram: Gives pages.
        processors: Post messages, ring doorbells.
        panic: Called when the host breaks a rule.
        start_soon: Starts a task that lives as long as the guest.
    """

    def __init__(
        self,
        personality: Personality,
        ram: Ram,
        processors: Processors,
        panic: Panic,
        start_soon: Callable[..., None],
    ) -> None:
        super().__init__(personality, ram, processors, panic)
        self.offers: dict[int, OfferChannel] = {}
        """Live offers that this driver serves, by relid."""
        self.ignored: dict[int, tuple[OfferChannel, str]] = {}
        """Live offers that this driver does not serve, and why."""
        self.stale_messages = 0
        """Messages of an earlier connection that arrived before the new one was up."""
        self.on_offer: Callable[[OfferChannel], None] | None = None
        """Called for each new offer that is served; must not block."""
        self._start_soon = start_soon
        self._contacting: Version | None = None
        self._leaving = True
        """Nothing is expected; whatever comes belongs to an earlier connection."""

    # ---------------------------------------------------------------------- contact and offers

    async def contact(self, versions: Sequence[Version] | None = None) -> Version:
        """Agree on a version, and forget whatever was before. A checkpoint.

        Without :meth:`unload` before, this is what a crash kernel does.

        Args:
            versions: Instead of the personality's.

        Returns:
            The version in force from now on.

        Raises:
            HostRefusedError: The host refuses all versions.
            GuestPanic: It answers in a way that the drivers cannot stand.
        """
        self.forget()
        personality = self.personality
        for version in versions or personality.versions:
            on_4 = personality.contact_on_4 and version >= Version.V5_0
            connection = CONNECTION_MESSAGES_5 if on_4 else CONNECTION_MESSAGES
            wanted = personality.features if version >= Version.V6_0 else NO_FEATURES
            info = self._doorbells.interrupt_page
            if on_4 or wanted:
                info = DEFAULT_SINT | wanted << 32
            message = InitiateContact(
                version=version,
                target_vp=0,
                target_info=info,
                monitor_page_1=self._doorbells.monitor_page_1,
                monitor_page_2=self._doorbells.monitor_page_2,
                client_id=_CLIENT_ID if wanted & Feature.CLIENT_ID else None,
            )
            reply = await self._probe(connection, version, message)
            if reply is None or not reply.version_supported:
                continue
            if personality.exact_sizes and reply.connection_state:
                self._panic(f"VERSION_RESPONSE: connection_state {reply.connection_state}")
            self._mailbox.connection_id = connection
            if (
                personality.connection_from_reply is not None
                and version >= personality.connection_from_reply
            ):
                self._mailbox.connection_id = reply.message_connection_id
                if not self._mailbox.connection_id:
                    self._panic("VERSION_RESPONSE: message connection id 0")
            self._mailbox.version = version
            if reply.supported_features is None and version >= Version.V6_0:
                self._panic("VERSION_RESPONSE: no feature flags in the answer to 6.0")
            self._mailbox.features = Feature((reply.supported_features or 0) & wanted)
            return version
        self._leaving = True
        raise HostRefusedError("INITIATE_CONTACT", 0)

    async def _probe(
        self, connection: int, version: Version, message: InitiateContact
    ) -> VersionResponse | None:
        """Ask for one version. Returns None if the host has no such connection id."""
        raw = build_message(message, version=None)
        self._contacting = version
        self._leaving = False
        with self._mailbox.expecting(VersionResponse) as slot:
            status = await self._mailbox.post_to(connection, raw)
            if status == HvStatus.INVALID_CONNECTION_ID and connection == CONNECTION_MESSAGES_5:
                return None
            if status:
                self._panic(f"HvPostMessage of INITIATE_CONTACT {version}: status {status}")
            await slot.arrived.wait()
        assert isinstance(slot.message, VersionResponse)
        return slot.message

    def forget(self) -> None:
        """Forget everything about the bus, as a newly booted kernel. Cannot block.

        Open channels end; their pages are not given back, because the host may still use them.
        """
        self.forget_channels()
        self._contacting = None
        self._leaving = True
        self.offers.clear()
        self.ignored.clear()
        self._changed.unpark_all()

    async def request_offers(self) -> list[OfferChannel]:
        """Ask for all offers, once per connection, and wait until they have come. A checkpoint.

        Linux 6.1 goes on without waiting for the end of the list; all others wait.
        """
        await self._mailbox.request([RequestOffers()], AllOffersDelivered)
        return list(self.offers.values())

    async def connect(self) -> list[OfferChannel]:
        """Contact, then all offers. A checkpoint; see :meth:`contact` for what is raised."""
        await self.contact()
        return await self.request_offers()

    async def wait_offers(
        self,
        wanted: Callable[[OfferChannel], bool],
        count: int = 1,
        *,
        primary: OfferChannel | None = None,
    ) -> list[OfferChannel]:
        """Wait until at least ``count`` live offers are ``wanted``; return them by sub-channel.

        A checkpoint.

        Args:
            wanted: Which offers.
            count: How many of them.
            primary: A live offer without which there will be none of the wanted ones.

        Raises:
            trio.BrokenResourceError: The connection has ended, or the host has taken ``primary``
                away (which drivers that ignore this never get to know).
        """
        await trio.lowlevel.checkpoint()
        while True:
            found = [offer for offer in self.offers.values() if wanted(offer)]
            if len(found) >= count:
                return sorted(found, key=lambda offer: (offer.subchannel_index, offer.relid))
            if self.version is None:
                raise trio.BrokenResourceError("the connection to the bus is gone")
            if primary is not None and self.offers.get(primary.relid) is not primary:
                raise gone()
            await self._changed.park()

    async def wait_gone(self, relid: int) -> None:
        """Wait until there is no offer ``relid`` any more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while relid in self.offers or relid in self.ignored:
            await self._changed.park()

    async def unload(self) -> None:
        """Leave the bus as the personality does: with UNLOAD and its answer, or silently."""
        personality = self.personality
        version = self.version
        if version is None:
            return
        habit = personality.unload if version >= personality.unload_since else Unload.NEVER
        self._leaving = True
        if habit is Unload.WAITS and version > Version.V0_13:
            await self._mailbox.request([UnloadMessage()], UnloadResponse)
            self.forget()
            self._leaving = False  # whatever comes after the answer is unsolicited
            return
        if habit is not Unload.NEVER:
            await self._mailbox.post(UnloadMessage())
        self.forget()

    # ------------------------------------------------------------------------------- incoming

    def message(self, payload: bytes) -> None:
        """Handle one control message, in the interrupt. Cannot block.

        Raises:
            GuestPanic: The message is malformed, unsolicited, or breaks a rule.
        """
        number = int.from_bytes(payload[:4], "little")
        if self._contacting is not None:
            if number != VersionResponse.TYPE:
                self.stale_messages += 1
                return
        elif self._leaving and (self.version is None or number != UnloadResponse.TYPE):
            self.stale_messages += 1
            return
        message = self._mailbox.parse(payload, self._contacting or self.version)
        match message:
            case OfferChannel():
                self._offered(message)
            case RescindChannelOffer():
                self._rescind(message.relid)
            case VersionResponse():
                self._mailbox.answered(message)
                self._contacting = None
                # A refusal is followed by the next probe, or by nothing at all.
                self._leaving = not message.version_supported
            case OpenChannelResult():
                self._mailbox.answered(message)
                # Here and not in the task that waits: the host may signal right behind it.
                if not message.status and message.relid in self._opening:
                    self._once_open.add(message.relid)
                    self.channels[message.relid] = self._opening[message.relid]
            case _:
                self._mailbox.answered(message)

    def _offered(self, offer: OfferChannel) -> None:
        personality = self.personality
        relid = offer.relid
        if not 1 <= relid <= MAX_RELID:
            self._panic(f"OFFERCHANNEL: relid {relid} is not between 1 and {MAX_RELID}")
        if relid in self.offers or relid in self.ignored:
            self._panic(f"OFFERCHANNEL: relid {relid} is in use")
        if offer.monitor_allocated and offer.monitor_id > MAX_MONITOR_ID:
            self._panic(f"OFFERCHANNEL: monitor id {offer.monitor_id}")
        others = [*self.offers.values(), *(other for other, _ in self.ignored.values())]
        for other in others:
            if (
                other.instance_id == offer.instance_id
                and other.subchannel_index == offer.subchannel_index
                and other.relid not in self._rescinded
            ):
                self._panic(f"OFFERCHANNEL: instance {offer.instance_id} is there already")
        reason = ""
        if relid > personality.max_relid:
            reason = f"{personality} serves relids up to {personality.max_relid}"
        elif personality.needs_monitor and not offer.monitor_allocated:
            reason = f"{personality} needs a monitor id"
        elif personality.drops_confidential and offer.flags & _CONFIDENTIAL:
            reason = f"{personality} takes the channel for a confidential one"
        if reason:
            self.ignored[relid] = offer, reason
        else:
            self.offers[relid] = offer
            if self.on_offer is not None:
                self.on_offer(offer)
        self._changed.unpark_all()

    def _rescind(self, relid: int) -> None:
        if relid not in self.offers and relid not in self.ignored:
            self._panic(f"RESCIND_CHANNELOFFER: there is no relid {relid}")
        if relid in self._rescinded:
            self._panic(f"RESCIND_CHANNELOFFER: relid {relid} for the second time")
        self._rescinded.add(relid)
        if relid in self._opening and relid not in self.channels:
            # The host answers no OPENCHANNEL of a rescinded channel.
            self._mailbox.abort(OpenChannelResult, relid)
        if self.personality.rescind is Rescind.RELEASE:
            self._start_soon(self._remove, relid)

    def _is_connected(self) -> bool:
        """Whether messages may be posted; nothing follows UNLOAD."""
        return self.version is not None and not self._leaving

    async def _remove(self, relid: int) -> None:
        """Remove a rescinded device: close, tear down without waiting, release the relid."""
        while relid in self._opening:
            await self._changed.park()
        if relid not in self._rescinded:
            return  # the connection has ended meanwhile
        channel = self.channels.pop(relid, None)
        if channel is not None:
            channel.end(gone())
            if channel.on_removed is not None:
                channel.on_removed()
            if self._is_connected():
                await self._mailbox.post(CloseChannel(relid=relid))
        gpadl = self._rings.pop(relid, None) if self._is_connected() else None
        if gpadl is not None:
            released = partial(self._released, gpadl)
            self._mailbox.disown(GpadlTorndown, gpadl.handle, then=released)
            await self._mailbox.post(GpadlTeardown(relid=relid, gpadl=gpadl.handle))
        # Forgotten first: the host may use the relid again as soon as it has read the message.
        self._rescinded.discard(relid)
        self._once_open.discard(relid)
        self.offers.pop(relid, None)
        self.ignored.pop(relid, None)
        if self._is_connected():
            await self._mailbox.post(RelidReleased(relid=relid))
        self._changed.unpark_all()
