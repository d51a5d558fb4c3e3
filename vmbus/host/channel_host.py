"""What a channel needs of its bus."""

from __future__ import annotations

from typing import Protocol

from vmbus.host.buffer import GpadlLease


class ChannelHost(Protocol):
    """The bus of one channel. Nothing here blocks."""

    def offer_subchannels(self, count: int) -> None:
        """Offer sub-channels of this channel.

        Raises:
            LocalProtocolError: Not a primary channel, not open, or it has some.
            ConfigError: More than the offer allows.
            BudgetError: The bus has no room for them.
        """

    def lease_gpadl(self, handle: int) -> GpadlLease:
        """Let the device use a GPADL. Raises GuestProtocolError if there is none."""

    def complain(self, text: str) -> None:
        """Count and log what the guest did wrong on this channel."""
