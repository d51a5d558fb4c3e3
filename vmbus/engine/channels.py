"""The channels of a bus and the numbers they go by: keys, relids, connection and monitor ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from uuid import UUID

from vmbus.engine.offers import Offer
from vmbus.engine.states import (
    Closed,
    ClosingReopen,
    GpadlState,
    Hidden,
    Kept,
    Life,
    Link,
    Modifying,
    Offered,
    Open,
    Opening,
    OpenRequest,
    Placement,
    Presence,
    Rescinded,
)
from vmbus.errors import BudgetError, ConfigError, GuestProtocolError, LocalProtocolError
from vmbus.wire.messages import CONNECTION_EVENTS, DEFAULT_SINT, MAX_MONITOR_ID, MAX_RELID
from vmbus.wire.versions import Version

_FIRST_FREE_CONNECTION_ID = 5
"""1 to 4 belong to the bus itself."""
_CONNECTION_ID_END = 1 << 24
"""Connection ids have 24 bits (TLFS 11.3)."""


def connection_id_of(relid: int) -> int:
    """Return the connection id that a channel is offered with, from version 1.1 on.

    Never one of the bus's own, and different for every relid. Hyper-V numbers them likewise.
    """
    return relid | DEFAULT_SINT << 12


@dataclasses.dataclass(slots=True, eq=False)
class Channel:
    """One channel, primary or sub. Owned by :class:`ChannelTable`."""

    key: int
    offer: Offer
    subchannel_index: int
    primary_key: int
    presence: Presence = dataclasses.field(default_factory=Hidden)
    life: Life = dataclasses.field(default_factory=Closed)
    gpadls: dict[int, GpadlState] = dataclasses.field(default_factory=dict)
    """By the guest's handle."""

    @property
    def identity(self) -> tuple[UUID, int]:
        """What guests recognise a channel by."""
        return self.offer.instance_id, self.subchannel_index

    @property
    def is_primary(self) -> bool:
        """Whether it is no sub-channel."""
        return self.key == self.primary_key

    @property
    def placement(self) -> Placement | None:
        """The numbers it has taken, if any."""
        presence = self.presence
        return None if isinstance(presence, Hidden) else presence.placement

    @property
    def revoked(self) -> bool:
        """Whether the host has taken it back."""
        return not isinstance(self.presence, Hidden | Offered | Kept)

    @property
    def known(self) -> bool:
        """Whether the guest of this connection may speak of it."""
        return isinstance(self.presence, Offered | Rescinded)

    @property
    def request(self) -> OpenRequest | None:
        """The OPENCHANNEL that is in force or being carried out."""
        life = self.life
        if isinstance(life, Opening | Open | Modifying | ClosingReopen):
            return life.request
        return None

    @property
    def is_open(self) -> bool:
        """Whether the guest has been told that it is open, and has not closed it."""
        return isinstance(self.life, Open | Modifying)

    @property
    def is_reserved(self) -> bool:
        """Whether it was opened as a reserved channel."""
        request = self.request
        return request is not None and request.reserved is not None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing of the guest is in use, or only what a reserved channel keeps."""
        if isinstance(self.presence, Kept) and isinstance(self.life, Opening | Open):
            return self.gpadls.keys() <= {self.life.request.ring_gpadl}
        return isinstance(self.life, Closed) and not self.gpadls


class ChannelTable:
    """All channels, by key in the order of their offers.

    Args:
        max_channels: Budget for all of them together.
    """

    def __init__(self, max_channels: int) -> None:
        self._max_channels = max_channels
        self._channels: dict[int, Channel] = {}
        self._next_key = 1
        # Several channels may have one identity: revoked ones that the guest has not released,
        # oldest first, and then one that waits for them to be gone.
        self._identities: dict[tuple[UUID, int], list[Channel]] = {}
        self._relids: dict[int, Channel] = {}
        self._lowest_relid = 1
        self._monitor_ids: set[int] = set()
        # Signals chosen by a 6.0 guest, where they differ from those of the offer.
        self._claims: dict[int, tuple[int, int]] = {}
        self._unsettled: dict[Channel, None] = {}

    def __iter__(self) -> Iterator[Channel]:
        """Go through a copy of the list, so that channels may be removed on the way."""
        return iter(tuple(self._channels.values()))

    def __len__(self) -> int:
        return len(self._channels)

    def add(self, offer: Offer, *, subchannel_index: int = 0, primary_key: int = 0) -> Channel:
        """Make a channel that the guest does not know yet.

        Raises:
            ConfigError: A channel of this identity exists and is not revoked.
            BudgetError: There are too many already.
        """
        key = self._next_key
        channel = Channel(key, offer, subchannel_index, primary_key or key)
        same = self._identities.get(channel.identity, [])
        if same and not same[-1].revoked:
            raise ConfigError(f"offer: instance {offer.instance_id} is on the bus already")
        self.check_room(1)
        self._next_key += 1
        self._channels[key] = channel
        self._identities.setdefault(channel.identity, []).append(channel)
        return channel

    def check_room(self, count: int) -> None:
        """Raise BudgetError unless ``count`` more channels are allowed."""
        if len(self._channels) + count > self._max_channels:
            raise BudgetError(
                f"offer: {self._max_channels} channels are allowed, {len(self._channels)} exist"
            )

    def remove(self, channel: Channel) -> None:
        """Forget a channel that has no placement any more."""
        del self._channels[channel.key]
        same = self._identities[channel.identity]
        same.remove(channel)
        if not same:
            del self._identities[channel.identity]

    def by_key(self, key: int) -> Channel:
        """Look a channel up. Raises LocalProtocolError if there is none."""
        channel = self._channels.get(key)
        if channel is None:
            raise LocalProtocolError(f"there is no channel with key {key}")
        return channel

    def get(self, key: int) -> Channel | None:
        """Look a channel up."""
        return self._channels.get(key)

    def was_used(self, key: int) -> bool:
        """Whether a channel has, or had, this key."""
        return 0 < key < self._next_key

    def by_relid(self, relid: int) -> Channel | None:
        """Return the channel that holds a relid, whatever its presence."""
        return self._relids.get(relid)

    def subchannels(self, channel: Channel) -> list[Channel]:
        """Return the sub-channels of a primary channel."""
        return [each for each in self if each.primary_key == channel.key and each is not channel]

    def is_blocked(self, channel: Channel) -> bool:
        """Whether an older channel of the same identity is still known to the guest.

        Linux 6.1 takes an offer of an instance that it knows for the same channel after a resume,
        whatever the relid, so the new one has to wait.
        """
        return self._identities[channel.identity][0] is not channel

    def unsettle(self, channel: Channel) -> None:
        """Note that somebody has let go of something: the channel may be gone, or free again."""
        self._unsettled[channel] = None

    def take_unsettled(self) -> list[Channel]:
        """Hand out what was noted since the last call."""
        unsettled, self._unsettled = self._unsettled, {}
        return list(unsettled)

    # --- Numbers ---------------------------------------------------------------------------------

    def place(self, channel: Channel, link: Link) -> Placement | None:
        """Take numbers for a channel that is about to be offered.

        Relids are dense from 1: Haiku serves up to 31, macOS up to 255 of them.

        Returns:
            The numbers, or None if no relid is free.
        """
        relid = self._lowest_relid
        while relid in self._relids or self._is_claimed(relid):
            relid += 1
        if relid > MAX_RELID:
            return None
        self._relids[relid] = channel
        if not self._claims:
            self._lowest_relid = relid + 1
        monitor_id = None
        if channel.offer.monitor_latency is not None and link.monitor_pages is not None:
            monitor_id = self._take_monitor_id()
        if link.version == Version.V0_13:
            connection_id = CONNECTION_EVENTS
        else:
            connection_id = connection_id_of(relid)
        return Placement(relid=relid, connection_id=connection_id, monitor_id=monitor_id)

    def displace(self, placement: Placement) -> None:
        """Give numbers back."""
        del self._relids[placement.relid]
        self._lowest_relid = min(self._lowest_relid, placement.relid)
        if placement.monitor_id is not None:
            self._monitor_ids.remove(placement.monitor_id)

    def _take_monitor_id(self) -> int | None:
        for monitor_id in range(MAX_MONITOR_ID + 1):
            if monitor_id not in self._monitor_ids:
                self._monitor_ids.add(monitor_id)
                return monitor_id
        return None

    def _is_claimed(self, relid: int) -> bool:
        connection_id = connection_id_of(relid)
        return any(
            connection_id == claim[0] or relid == claim[1] for claim in self._claims.values()
        )

    def claim(self, channel: Channel, request: OpenRequest) -> None:
        """Take the connection id and event flag that a 6.0 guest wants to signal with.

        Raises:
            GuestProtocolError: Out of range, or in use by another channel.
        """
        placement = channel.placement
        assert placement is not None, "only a channel that the guest knows can be opened"
        connection_id, flag = request.connection_id, request.event_flag
        if (connection_id, flag) == (placement.connection_id, placement.relid):
            return
        if not _FIRST_FREE_CONNECTION_ID <= connection_id < _CONNECTION_ID_END:
            raise GuestProtocolError(
                f"connection id {connection_id:#x} is not one of a channel", field="connection_id"
            )
        if not 1 <= flag <= MAX_RELID:
            raise GuestProtocolError(f"event flag {flag} is not 1 to 2047", field="event_flag")
        others = [claim for key, claim in self._claims.items() if key != channel.key]
        # All relids are below 4096, so an offered connection id tells its relid.
        owner = self._relids.get(connection_id & 0xFFF)
        taken = owner not in (None, channel) and connection_id == connection_id_of(
            connection_id & 0xFFF
        )
        if taken or any(connection_id == claim[0] for claim in others):
            raise GuestProtocolError(
                f"connection id {connection_id:#x} is in use", field="connection_id"
            )
        if self._relids.get(flag, channel) is not channel or any(
            flag == claim[1] for claim in others
        ):
            raise GuestProtocolError(f"event flag {flag} is in use", field="event_flag")
        self._claims[channel.key] = (connection_id, flag)

    def unclaim(self, channel: Channel) -> None:
        """Give back what :meth:`claim` took, if anything."""
        self._claims.pop(channel.key, None)

    def check(self) -> None:
        """Raise AssertionError unless the numbers taken are those that channels have."""
        placed = {
            channel.placement.relid: channel for channel in self if channel.placement is not None
        }
        assert placed == self._relids
        assert all(relid in placed for relid in range(1, self._lowest_relid)) or self._claims
        monitored = {
            channel.placement.monitor_id for channel in placed.values() if channel.placement
        }
        assert monitored - {None} == self._monitor_ids
        assert not self._unsettled
        for key in self._claims:
            assert not isinstance(self._channels[key].life, Closed)
        for same in self._identities.values():
            assert all(channel.revoked for channel in same[:-1])
