"""How the channels of a guest share its receive buffer, and which of them stand still.

A guest may leave one of its channels alone: its processor has something else to do, or its driver
is broken. What comes for that channel holds up what comes for the others, for a moment, and then is
dropped; and it never has so much of the buffer that nothing is left for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import trio

from netvsp.statistics import Direction
from vmbus.host.channel import Channel

PATIENCE = 0.05
"""Seconds for which frames for other channels wait for one that stands still."""


class Shares:
    """What each channel has of the buffer.

    Args:
        statistics: Counts what is dropped.

    Attributes:
        channels: How many there are.
        reserve: Sub-allocations of which each channel may have its part only; the others are for
            whoever comes first.
    """

    def __init__(self, statistics: Direction) -> None:
        self.channels = 0
        self.reserve = 0
        self._statistics = statistics
        self._held: dict[Channel, int] = {}
        """Sub-allocations that are out."""
        self._still: dict[Channel, float] = {}
        """Channels that have had no room, and since when."""

    def resize(self, channels: int, parts: int) -> None:
        """There are so many channels, and so many sub-allocations for their frames."""
        self.channels = channels
        self.reserve = parts // 2 if channels > 1 else 0

    def took(self, channel: Channel, count: int) -> None:
        """Sub-allocations have gone out on a channel."""
        self._held[channel] = self._held.get(channel, 0) + count

    def gave(self, channel: Channel, count: int) -> None:
        """They have come back."""
        self._held[channel] -= count

    def may_have(
        self, channel: Channel, need: int, left: int, group: Sequence[Sequence[int]]
    ) -> bool:
        """Whether a channel may have some now. Cannot block.

        Args:
            channel: Which.
            need: How many.
            left: How many there will be then for frames of all channels.
            group: Length and offset of those that it is to have besides.
        """
        if left >= self.reserve:
            return True
        if left < 0:
            return False
        held = self._held.get(channel, 0) + sum(map(len, group)) // 2
        return not held or held + need <= self.reserve // self.channels

    def gives_up(self, channel: Channel) -> bool:
        """Whether a frame without room is dropped, so that others go on; counts it. Cannot block.

        Args:
            channel: The frame's.
        """
        if self.channels < 2:
            return False
        now = trio.current_time()
        if now - self._still.setdefault(channel, now) < PATIENCE:
            return False
        self._statistics.dropped["no buffer"] += 1
        return True

    def moves(self, channel: Channel) -> None:
        """A channel does not stand still. Cannot block."""
        self._still.pop(channel, None)

    def stop(self) -> None:
        """The whole guest stands still, so none of its channels does. Cannot block."""
        self._still.clear()

    @property
    def patience(self) -> float:
        """Seconds after which who waits for room is to look again."""
        return PATIENCE if self._still else math.inf

    def forget(self, channel: Channel | None) -> None:
        """A channel is over; None: all are. Cannot block."""
        if channel is None:
            self._held.clear()
            self._still.clear()
        else:
            self._held.pop(channel, None)
            self._still.pop(channel, None)
