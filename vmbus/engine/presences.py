"""Offering channels to the guest, taking them back, and what becomes of them when it leaves."""

from __future__ import annotations

from vmbus.engine.channels import Channel, ChannelTable
from vmbus.engine.events import ChannelGone
from vmbus.engine.gpadls import GpadlTable
from vmbus.engine.lives import Lives
from vmbus.engine.outbox import Outbox
from vmbus.engine.states import (
    Closed,
    Gone,
    Hidden,
    Kept,
    Link,
    Offered,
    Presence,
    PresenceTrigger,
    Released,
    Rescinded,
    follow,
)
from vmbus.errors import ConfigError, LocalProtocolError
from vmbus.wire.messages import OfferChannel, RescindChannelOffer
from vmbus.wire.versions import Version


class Presences:
    """Moves :attr:`Channel.presence` and tells the guest."""

    def __init__(
        self, channels: ChannelTable, gpadls: GpadlTable, lives: Lives, outbox: Outbox
    ) -> None:
        self._channels = channels
        self._gpadls = gpadls
        self._lives = lives
        self._outbox = outbox

    def offer_waiting(self, link: Link) -> None:
        """Offer every channel that the guest does not know, in the order of their making.

        That order is stable, so relids are the same in every life of the guest. A channel waits on
        if there is no relid for it or if the guest still holds an older one of the same instance.
        """
        for channel in self._channels:
            if not isinstance(channel.presence, Hidden) or self._channels.is_blocked(channel):
                continue
            placement = self._channels.place(channel, link)
            if placement is None:
                return
            self._move(channel, PresenceTrigger.OFFER, Offered(placement))
            offer = channel.offer
            self._outbox.post(
                OfferChannel(
                    class_id=offer.class_id,
                    instance_id=offer.instance_id,
                    flags=offer.flags,
                    mmio_megabytes=offer.mmio_megabytes,
                    user_defined=offer.user_defined,
                    subchannel_index=channel.subchannel_index,
                    relid=placement.relid,
                    monitor_id=placement.monitor_id or 0,
                    monitor_allocated=placement.monitor_id is not None,
                    is_dedicated_interrupt=link.version >= Version.V1_1,
                    connection_id=placement.connection_id,
                )
            )

    def add_subchannels(self, primary: Channel, count: int) -> list[Channel]:
        """Make sub-channels of an open channel; they still have to be offered."""
        if not primary.is_primary or not primary.is_open:
            raise LocalProtocolError(f"channel {primary.key} is not an open primary channel")
        if isinstance(primary.presence, Kept):
            raise LocalProtocolError(f"channel {primary.key} has lost its guest")
        if any(not channel.revoked for channel in self._channels.subchannels(primary)):
            raise LocalProtocolError(f"channel {primary.key} has sub-channels already")
        limit = primary.offer.max_subchannels
        if not 0 <= count <= limit:
            raise ConfigError(f"channel {primary.key} may have {limit} sub-channels, not {count}")
        self._channels.check_room(count)
        return [
            self._channels.add(primary.offer, subchannel_index=index, primary_key=primary.key)
            for index in range(1, count + 1)
        ]

    def revoke(self, channel: Channel) -> None:
        """Take a channel back from guest and device; its sub-channels first. Idempotent.

        What the guest waits for is answered before the RESCIND, because some guests stop waiting
        at it.
        """
        if channel.revoked:
            return
        self.revoke_subchannels(channel)
        presence = channel.presence
        if isinstance(presence, Offered):
            self._gpadls.fail_unfinished(channel)
            self._lives.abandon(channel, tell=True)
            self._move(channel, PresenceTrigger.REVOKE, Rescinded(presence.placement))
            self._outbox.post(RescindChannelOffer(relid=presence.placement.relid))
        else:
            self._lives.abandon(channel, tell=True)
            self._gpadls.drop(channel, guest_left=True)
            self._move(channel, PresenceTrigger.REVOKE, Released(channel.placement))

    def revoke_subchannels(self, primary: Channel) -> None:
        """Revoke all sub-channels; FreeBSD waits for that when it closes the primary channel."""
        if primary.is_primary:
            for channel in self._channels.subchannels(primary):
                self.revoke(channel)

    def release(self, channel: Channel, presence: Rescinded | Offered) -> None:
        """RELID_RELEASED: the guest has forgotten a channel, rescinded or closed."""
        self._gpadls.fail_unfinished(channel)
        self._gpadls.drop(channel, guest_left=False)
        unwanted = isinstance(presence, Offered)
        self._move(
            channel, PresenceTrigger.RELEASE, Released(presence.placement, unwanted=unwanted)
        )

    def leave(self, channel: Channel, *, reset: bool) -> None:
        """The guest has left, with UNLOAD or without; nothing is sent to it any more.

        A reserved channel stays as it is, with its ring, unless the whole VM was reset.
        """
        presence = channel.presence
        request = channel.request
        if channel.is_reserved and not reset and isinstance(presence, Offered | Kept):
            assert request is not None
            self._gpadls.drop(channel, guest_left=True, keep=request.ring_gpadl)
            if isinstance(presence, Offered):
                self._move(channel, PresenceTrigger.KEEP, Kept(presence.placement))
            return
        self._lives.abandon(channel, tell=False)
        if reset:
            self._lives.forget_reply(channel)
        self._gpadls.drop(channel, guest_left=True)
        if not channel.is_primary and isinstance(presence, Offered):
            # Sub-channels do not outlive the opening of their primary channel.
            presence = Rescinded(presence.placement)
            self._move(channel, PresenceTrigger.REVOKE, presence)
        if not channel.is_primary and isinstance(presence, Hidden):
            # Nor do those that still waited for the guest to forget older ones.
            self._move(channel, PresenceTrigger.REVOKE, Released(None))
        elif isinstance(presence, Rescinded):
            self._move(channel, PresenceTrigger.LEAVE, Released(presence.placement))
        elif isinstance(presence, Offered | Kept):
            self._move(channel, PresenceTrigger.LEAVE, Hidden())
            self._channels.displace(presence.placement)

    def settle(self) -> bool:
        """Look at the channels that somebody has let go of.

        Returns:
            Whether there were any: numbers or an instance may be free now for another offer.
        """
        unsettled = self._channels.take_unsettled()
        for channel in unsettled:
            presence = channel.presence
            if not isinstance(channel.life, Closed):
                continue
            if isinstance(presence, Kept):
                # Of a guest that has left, so nobody else is going to ask for them.
                self._gpadls.drop(channel, guest_left=True)
            if channel.gpadls:
                continue
            if isinstance(presence, Released):
                if presence.placement is not None:
                    self._channels.displace(presence.placement)
                follow(presence, PresenceTrigger.FORGET, Gone())
                self._channels.remove(channel)
                self._outbox.emit(ChannelGone(key=channel.key, unwanted=presence.unwanted))
            elif isinstance(presence, Kept):
                self._move(channel, PresenceTrigger.LEAVE, Hidden())
                self._channels.displace(presence.placement)
        return bool(unsettled)

    def _move(self, channel: Channel, trigger: PresenceTrigger, successor: Presence) -> None:
        channel.presence = follow(channel.presence, trigger, successor)
        if isinstance(successor, Released):
            self._channels.unsettle(channel)
