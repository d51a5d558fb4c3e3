"""Which frames a guest sees, and how."""

from __future__ import annotations

from netvsp.frames.frame import ETHERNET_HEADER, ETHERTYPE_VLAN, Frame, hides_tag
from netvsp.link import AdapterConfig, Link
from netvsp.statistics import Direction
from netvsp.wire import oids


def guests_view(
    frame: Frame,
    wants: int,
    link: Link,
    config: AdapterConfig,
    statistics: Direction,
    *,
    tags_beside: bool,
) -> Frame | None:
    """Return a frame as the guest sees it, or None if it does not; counts why. Cannot block.

    Args:
        frame: From the endpoint.
        wants: ``FILTER_*`` of :mod:`netvsp.wire.oids`.
        link: The adapter's.
        config: The adapter's.
        statistics: Where it is counted.
        tags_beside: Whether the guest takes VLAN tags as per-packet information.
    """
    head = frame.head
    if len(head) < ETHERNET_HEADER:
        statistics.dropped["short"] += 1
        return None
    if not wants & oids.FILTER_PROMISCUOUS:
        if head[0] & 1:
            kind = (
                oids.FILTER_BROADCAST
                if head[:6] == b"\xff" * 6
                else oids.FILTER_MULTICAST | oids.FILTER_ALL_MULTICAST
            )
            if not wants & kind:
                statistics.dropped["filtered"] += 1
                return None
        elif head[:6] != link.mac or not wants & oids.FILTER_DIRECTED:
            statistics.dropped["filtered"] += 1
            return None
    if not link.up:
        statistics.dropped["link down"] += 1
        return None
    if config.vlan is not None or config.trunk is not None:
        frame = frame.untagged()
        number = (frame.tci or 0) & 0xFFF
        if config.vlan is not None:
            # In its one VLAN it sees no tags, so there is none behind that.
            if number != config.vlan or frame.head[12:14] == ETHERTYPE_VLAN:
                statistics.dropped["vlan"] += 1
                return None
            return Frame(frame.head, frame.rest, frame.offload, None, frame.flow)
        if config.trunk is not None and (number not in config.trunk or hides_tag(frame)):
            statistics.dropped["vlan"] += 1
            return None
    return frame.untagged() if tags_beside else frame.tagged()
