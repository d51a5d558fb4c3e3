"""A look at an engine: plain values that can be written as JSON, and a check of what must hold."""

from __future__ import annotations

from typing import Any

from vmbus.engine.channels import Channel
from vmbus.engine.engine import Engine
from vmbus.engine.states import (
    Closed,
    ClosingReopen,
    Disconnected,
    Disconnecting,
    GpadlState,
    Hidden,
    Kept,
    Link,
    Offered,
    Released,
    TearingDown,
    Unfinished,
)
from vmbus.wire.messages import MAX_MONITOR_ID, MAX_RELID

Snapshot = dict[str, Any]


def describe(engine: Engine) -> Snapshot:
    """Describe the connection and the counters. Never raises, in no state."""
    state = engine.connection
    found: Snapshot = {
        "state": type(state).__name__,
        "messages_received": engine.received,
        "messages_sent": engine.outbox.sent,
        "faults": engine.outbox.faults,
        "channels": len(engine.channel_table),
        "gpadls": engine.gpadl_table.count,
        "gpadl_pages": engine.gpadl_table.page_total,
        "unfinished_gpadls": engine.gpadl_table.unfinished_count,
        "pending_tl_connects": engine.sockets.pending_count,
    }
    if not isinstance(state, Disconnected | Disconnecting):
        found["offers_requested"] = state.offers_requested
    if not isinstance(state, Disconnected) and state.link is not None:
        found |= _link(state.link)
    return found


def _link(link: Link) -> Snapshot:
    return {
        "version": str(link.version),
        "features": int(link.features),
        "vp": link.slot.vp,
        "sint": link.slot.sint,
        "monitor_pages": list(link.monitor_pages) if link.monitor_pages is not None else None,
        "interrupt_page": link.interrupt_page,
    }


def describe_channels(engine: Engine) -> list[Snapshot]:
    """Describe all channels. Never raises, in no state."""
    return [_channel(channel) for channel in engine.channel_table]


def _channel(channel: Channel) -> Snapshot:
    placement, request = channel.placement, channel.request
    return {
        "key": channel.key,
        "class_id": str(channel.offer.class_id),
        "instance_id": str(channel.offer.instance_id),
        "subchannel_index": channel.subchannel_index,
        "primary_key": channel.primary_key,
        "presence": type(channel.presence).__name__,
        "life": type(channel.life).__name__,
        "relid": placement.relid if placement is not None else None,
        "monitor_id": placement.monitor_id if placement is not None else None,
        "connection_id": request.connection_id if request is not None else None,
        "event_flag": request.event_flag if request is not None else None,
        "target_vp": request.target_vp if request is not None else None,
        "reserved": channel.is_reserved,
        "gpadls": [_gpadl(handle, state) for handle, state in channel.gpadls.items()],
    }


def _gpadl(handle: int, state: GpadlState) -> Snapshot:
    described = state.assembly if isinstance(state, Unfinished) else state.gpadl
    return {
        "handle": handle,
        "state": type(state).__name__,
        "pages": described.page_count,
        "answer_owed": isinstance(state, TearingDown) and state.reply,
    }


def check(engine: Engine) -> None:
    """Raise AssertionError unless everything fits together. For tests; slow."""
    channels = tuple(engine.channel_table)
    connected = not isinstance(engine.connection, Disconnected | Disconnecting)
    assert (engine.outbox.link is not None) == connected
    if connected:
        assert engine.outbox.link == engine.connection.link

    placed = [channel.placement for channel in channels if channel.placement is not None]
    relids = [placement.relid for placement in placed]
    monitor_ids = [each.monitor_id for each in placed if each.monitor_id is not None]
    assert len(set(relids)) == len(relids)
    assert all(1 <= relid <= MAX_RELID for relid in relids)
    assert len(set(monitor_ids)) == len(monitor_ids)
    assert all(0 <= monitor_id <= MAX_MONITOR_ID for monitor_id in monitor_ids)
    engine.channel_table.check()

    known = [channel.identity for channel in channels if not channel.revoked]
    assert len(set(known)) == len(known)
    # What a channel that is to be opened again wants is looked at when its turn comes.
    flags = [
        channel.request.event_flag
        for channel in channels
        if channel.request is not None and not isinstance(channel.life, ClosingReopen)
    ]
    assert len(set(flags)) == len(flags)

    for channel in channels:
        _check_channel(engine, channel, connected=connected)
    engine.gpadl_table.check(channels)
    budgets = engine.config.budgets
    assert len(channels) <= budgets.max_channels
    assert engine.gpadl_table.count <= budgets.max_gpadls
    assert engine.gpadl_table.unfinished_count <= budgets.max_unfinished_gpadls
    assert engine.gpadl_table.page_total <= budgets.max_gpadl_pages
    assert engine.sockets.pending_count <= budgets.max_pending_tl_connects
    if isinstance(engine.connection, Disconnecting):
        assert not all(channel.is_quiet for channel in channels), "somebody is waited for"


def _check_channel(engine: Engine, channel: Channel, *, connected: bool) -> None:
    presence = channel.presence
    assert engine.channel_table.get(channel.key) is channel
    if isinstance(presence, Offered):
        assert connected, "no offer outlives its connection"
        if not channel.is_primary:
            primary = engine.channel_table.by_key(channel.primary_key)
            assert primary.is_open, "sub-channels are offered while the primary is open only"
    elif isinstance(presence, Hidden):
        assert channel.request is None, "an unknown channel is not open"
        assert channel.is_quiet or isinstance(engine.connection, Disconnecting)
    elif isinstance(presence, Kept):
        assert channel.request is None or channel.is_reserved
    else:
        assert channel.request is None, "a revoked channel is not open"
        if isinstance(presence, Released):
            assert not (isinstance(channel.life, Closed) and not channel.gpadls)
