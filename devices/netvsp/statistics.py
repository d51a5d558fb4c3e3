"""What an adapter counts: frames and bytes by kind, drops by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from netvsp.frames.frame import BROADCAST, VLAN_TAG, Frame

DIRECTED, MULTICAST, BROADCAST_KIND = range(3)
NO_BUFFER = "no buffer"
"""Why frames were dropped that the guest had no room for."""
KINDS = ("directed", "multicast", "broadcast")


class Direction:
    """Frames that went one way.

    Attributes:
        frames: Count of each kind: directed, multicast, broadcast.
        bytes: The same in bytes, Ethernet headers included, and tags wherever they are.
        dropped: Frames that were not passed on, by reason.
        segments: Large segments among the frames.
        checksums: Frames whose sum was left to the other side.
        errors: Packets that made no sense.
    """

    def __init__(self) -> None:
        self.frames = [0, 0, 0]
        self.bytes = [0, 0, 0]
        self.dropped: Counter[str] = Counter()
        self.segments = 0
        self.checksums = 0
        self.errors = 0

    def count(self, frame: Frame) -> None:
        """Count a frame that was passed on. Cannot block."""
        head, length, kind = frame.head, len(frame), DIRECTED
        if head[0] & 1:
            kind = BROADCAST_KIND if head[:6] == BROADCAST else MULTICAST
        if frame.tci is not None:
            length += VLAN_TAG
        self.frames[kind] += 1
        self.bytes[kind] += length

    def count_all(self, frames: Sequence[Frame]) -> None:
        """Count frames that were passed on. Cannot block."""
        directed = size = 0
        for frame in frames:
            head = frame.head
            if head[0] & 1:
                self.count(frame)
            else:
                directed += 1
                size += len(frame) if frame.rest else len(head)
                if frame.tci is not None:
                    size += VLAN_TAG
        self.frames[DIRECTED] += directed
        self.bytes[DIRECTED] += size

    @property
    def total_frames(self) -> int:
        """Frames of all kinds."""
        return sum(self.frames)

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes)

    def describe(self) -> dict[str, object]:
        """Return the counters as JSON types. Cannot block."""
        return {
            "frames": self.total_frames,
            "bytes": self.total_bytes,
            "multicast": self.frames[MULTICAST],
            "broadcast": self.frames[BROADCAST_KIND],
            "segments": self.segments,
            "checksums": self.checksums,
            "errors": self.errors,
            "dropped": dict(self.dropped),
        }


class AdapterStatistics:
    """Both directions, as the guest names them."""

    def __init__(self) -> None:
        self.transmit = Direction()
        """From the guest."""
        self.receive = Direction()
        """To the guest."""
